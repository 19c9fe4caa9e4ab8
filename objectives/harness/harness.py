"""lm-eval's tasks, loaded once, asked of one live model item by item.

``simple_evaluate`` loads tasks, builds prompts and wraps a model on every call. Here that happens
once, in ``load_tasks`` and ``Harness.prepare``; ``score`` only asks the model, and gives lm-eval's
own values, item for item. Three things make that hold:

* prompts of the whole split are built at once, with ``simple_evaluate``'s seeds, because the
  few-shot sampler is one random stream: building a subset would change everybody's examples;
* answers are cleared before each call, because lm-eval appends to them and reads the first;
* decoding settings a model ships with (a repetition penalty, say) are set aside while it
  generates, because they would change greedy answers; its end-of-text tokens are kept.

No cache of lm-eval's is used: they are keyed by prompt, and here the weights change under them.

What can go wrong with an answer ends with the item or the model, never with the study: generation
has its limit of tokens from the start, NaN in the model's output is an error of this model, and
what cannot be judged is worth 0 and says why (``judging``).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from objectives.base import Item, ItemResult, ItemSnapshot, ObjectiveError, Response
from objectives.harness.judging import JUDGE_SECONDS, NAN, judge, response_of
from objectives.harness.prompts import PLAIN, Prompting, Question, build_questions, snapshots
from objectives.harness.quiet import quiet
from objectives.harness.tasks import LoadedTask
from objectives.inference.agreement import settle_modes
from objectives.inference.fast_hflm import FastHFLM


class Harness:
    """An objective made of lm-eval tasks, for one live model. Made by ``Harness.prepare``."""

    def __init__(
        self, tasks: Mapping[str, float], questions: Sequence[Question], language_model: FastHFLM
    ) -> None:
        self.tasks = tasks
        self.items: Sequence[Item] = tuple(question.item for question in questions)
        self._questions = questions
        self._language_model = language_model
        self.judge_seconds = JUDGE_SECONDS

    @classmethod
    def prepare(  # the study file's own settings, each by name
        cls,
        tasks: Sequence[LoadedTask],
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        prompting: Prompting = PLAIN,
        max_length: int | None = None,
    ) -> Harness:
        """Build every prompt and wrap the model, once for the whole study.

        Global random states are left as found. The model is put in evaluation mode; do this
        before writing weights into it, because lm-eval ties what its config says is tied.

        Args:
            tasks: The study's, loaded; for this one harness.
            model: The live model every later ``score`` is given.
            tokenizer: Its tokenizer; copied, so that lm-eval's padding token stays ours.
            batch_size: Sequences per forward pass.
            prompting: Chat template and system prompt, the same for every task.
            max_length: Tokens of prompt and answer together, longer ones lose their beginning;
                None takes the model's.

        Raises:
            ObjectiveError: Prompts cannot be built, or do not suit the model.
        """
        _check_model(model, tokenizer, batch_size, prompting)
        with quiet(logging.ERROR):  # it warns that a model object is not a path
            language_model = FastHFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                max_length=max_length,
            )
            settle_modes(language_model)
        with quiet(logging.WARNING):
            questions = [
                question
                for loaded in tasks
                for question in build_questions(loaded, language_model, prompting)
            ]
        return cls({loaded.name: loaded.weight for loaded in tasks}, questions, language_model)

    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        """What a model is shown for the numbered items; see ``Objective.snapshots``."""
        return snapshots([self._questions[number] for number in items], self._language_model)

    def score(self, model: nn.Module, items: Sequence[int]) -> list[ItemResult]:
        """Ask the model the numbered items; see ``Objective.score``.

        Raises:
            ObjectiveError: The model is another one or in training mode, a number is not an
                item's, or the model's output or a value is not a number.
        """
        wanted, written = self._ask(model, items)
        tokens = iter(written)
        with quiet(logging.ERROR):
            judged = judge(list(wanted.values()), self.judge_seconds)
        answers = {
            number: replace(answer, tokens=next(tokens)) if question.item.generated else answer
            for (number, question), answer in zip(wanted.items(), judged, strict=True)
        }
        return [answers[number] for number in items]

    def respond(self, model: nn.Module, items: Sequence[int]) -> list[Response]:
        """Ask the model the numbered items, for the words; see ``Objective.respond``.

        Raises:
            ObjectiveError: As ``score``.
        """
        wanted, _ = self._ask(model, items)
        said = {number: response_of(question) for number, question in wanted.items()}
        return [
            replace(said[number], prompt=each.prompt)
            for number, each in zip(items, self.snapshots(items), strict=True)
        ]

    def _ask(self, model: nn.Module, items: Sequence[int]) -> tuple[dict[int, Question], list[int]]:
        """The questions by number, answered, and how many tokens were written for each written."""
        if model is not self._language_model.model:
            raise ObjectiveError(
                "score: got another model than the one prepared; write weights into that one"
            )
        if model.training:
            raise ObjectiveError("score: the model is in training mode; call model.eval() first")
        for number in items:
            if not 0 <= number < len(self._questions):
                raise ObjectiveError(
                    f"score: item {number} does not exist; there are {len(self._questions)}"
                )
        wanted = {number: self._questions[number] for number in items}
        written = [question for question in wanted.values() if question.item.generated]
        predicted = [question for question in wanted.values() if not question.item.generated]
        with quiet(logging.ERROR), _plain_decoding(model):  # cut prompts were reported once
            self._answer(predicted)
            with _numbers_alone(model):
                return wanted, self._answer(written)

    def _answer(self, questions: Sequence[Question]) -> list[int]:
        """Put the model's output into the requests.

        Returns:
            How many tokens it wrote for each question.
        """
        by_type: dict[str, list[tuple[int, Instance]]] = defaultdict(list)
        for place, question in enumerate(questions):
            for request in question.requests:
                request.resps, request.filtered_resps = [], {}
                by_type[request.request_type] += [(place, request)] * (request.repeats or 1)
        tokens = [0] * len(questions)
        for request_type, asked in by_type.items():
            responses = self._responses(request_type, [request for _, request in asked])
            for (place, request), (response, count) in zip(asked, responses, strict=True):
                request.resps.append(response)
                tokens[place] += count
        return tokens

    def _responses(self, request_type: str, requests: Sequence[Instance]) -> list[tuple[Any, int]]:
        """What the model says, and how many tokens it wrote to say so; batches fit into memory."""
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):  # what it held is let go of here
                if request_type == "generate_until":
                    return self._language_model.generate_counted(requests)
                ask = getattr(self._language_model, request_type)
                return [(response, 0) for response in ask(requests, disable_tqdm=True)]
            self._language_model.halve_batches()


def _check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    prompting: Prompting,
) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ObjectiveError(f"got a {type(model).__name__}; lm-eval asks transformers models only")
    if batch_size < 1:
        raise ObjectiveError(f"batch_size is {batch_size}; make it 1 or more")
    if tokenizer.eos_token_id is None:
        raise ObjectiveError("the tokenizer has no end-of-text token; set its eos_token")
    if prompting.apply_chat_template and tokenizer.chat_template is None:
        raise ObjectiveError(
            "apply_chat_template is set but the tokenizer has no chat template; unset it"
        )


@contextlib.contextmanager
def _plain_decoding(model: nn.Module) -> Iterator[None]:
    """Set the model's decoding defaults aside, all but its special tokens."""
    own = model.generation_config
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    make = cast("Any", GenerationConfig)  # its constructor has no types
    plain = make(**{name: getattr(own, name, None) for name in tokens})
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _numbers_alone(model: PreTrainedModel) -> Iterator[None]:
    """Refuse a model that writes with NaN: greedy decoding takes it for a token.

    The flag stays on the model's device until the end, so that no step waits for it.
    """
    broken: list[torch.Tensor] = []

    def watch(_module: nn.Module, _inputs: object, logits: torch.Tensor) -> None:
        last = logits[..., -1, :].amax().isnan()  # the largest of numbers and NaN is NaN
        broken[:] = [broken[0] | last] if broken else [last]

    hook = model.get_output_embeddings().register_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()
    if broken and broken[0].item():
        raise ObjectiveError(f"the model's output is not a number (NaN) while it writes; {NAN}")
