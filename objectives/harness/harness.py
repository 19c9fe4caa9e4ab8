"""Evaluate one live model on lm-eval's tasks, item by item.

``simple_evaluate`` loads tasks, builds prompts and wraps a model on every call. Here that happens
once, in ``load_tasks`` and ``Harness.prepare``; ``score`` only runs the model, and gives lm-eval's
own values, item for item. Three things make that hold:

* prompts of the whole split are built at once, with ``simple_evaluate``'s seeds, because the
  few-shot sampler is one random stream: building a subset would change the examples of all;
* responses are cleared before each call, because lm-eval appends to them and reads the first;
* generation settings a model ships with (a repetition penalty, say) are set aside during
  generation, because they would change greedy responses; its end-of-text tokens are kept.

None of lm-eval's caches is used: they are keyed by prompt, and here the weights change under them.

A failure ends with the item or the model, never with the study: generation has its limit of
tokens, NaN in the model's output is an error of this model, and a response that cannot be scored
has value 0 and a reason (``judging``).
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
from typing_extensions import override

from objectives.base import ItemResult, ItemSnapshot, Objective, ObjectiveError, Response
from objectives.harness.judging import JUDGE_SECONDS, NAN, judge, response_of
from objectives.harness.prompts import PLAIN, Prompting, Question, build_questions, snapshots
from objectives.harness.quiet import quiet
from objectives.harness.tasks import LoadedTask
from objectives.inference.agreement import settle_modes
from objectives.inference.fast_hflm import FastHFLM


class Harness(Objective):
    """Objective of lm-eval tasks for one live model; made by ``Harness.prepare``.

    Attributes:
        questions: One per item, in the items' order; their requests hold the latest responses.
        language_model: The live model as lm-eval calls it.
        judge_seconds: Time limit for scoring one response.
    """

    def __init__(
        self, tasks: Mapping[str, float], questions: Sequence[Question], language_model: FastHFLM
    ) -> None:
        self.tasks = tasks
        self.items = tuple(question.item for question in questions)
        self.questions = questions
        self.language_model = language_model
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

        Global random states are left as found. The model is put in evaluation mode. Call this
        before writing weights into it, because lm-eval ties weights as its config says.

        Args:
            tasks: Loaded for this one harness.
            model: The live model that every later ``score`` gets.
            tokenizer: Its tokenizer; copied, because lm-eval sets a padding token.
            batch_size: Sequences per forward pass.
            prompting: Chat template and system prompt, the same for every task.
            max_length: Limit of prompt and answer in tokens, longer prompts lose their beginning;
                None takes the model's context length.

        Raises:
            ObjectiveError: Prompts cannot be built, or do not fit the model.
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

    @override
    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        return snapshots([self.questions[number] for number in items], self.language_model)

    @override
    def score(self, model: nn.Module, items: Sequence[int]) -> list[ItemResult]:
        questions, tokens = self._evaluate(model, items)
        with quiet(logging.ERROR):
            judged = judge(list(questions.values()), self.judge_seconds)
        results = {
            number: replace(result, tokens=tokens[number])
            for number, result in zip(questions, judged, strict=True)
        }
        return [results[number] for number in items]

    @override
    def respond(self, model: nn.Module, items: Sequence[int]) -> list[Response]:
        questions, _ = self._evaluate(model, items)
        responses = {number: response_of(question) for number, question in questions.items()}
        return [
            replace(responses[number], prompt=snapshot.prompt)
            for number, snapshot in zip(items, self.snapshots(items), strict=True)
        ]

    def _evaluate(
        self, model: nn.Module, items: Sequence[int]
    ) -> tuple[dict[int, Question], dict[int, int]]:
        """Put the model's responses into the requests of the numbered items.

        Returns:
            The items' questions, and their generated tokens, by item number.

        Raises:
            ObjectiveError: The model is another one or in training mode, an item does not exist,
                or the model's output is not a number.
        """
        if model is not self.language_model.model:
            raise ObjectiveError(
                "score: got another model than the one prepared; write weights into that one"
            )
        if model.training:
            raise ObjectiveError("score: the model is in training mode; call model.eval() first")
        for number in items:
            if not 0 <= number < len(self.questions):
                raise ObjectiveError(
                    f"score: item {number} does not exist; there are {len(self.questions)}"
                )
        questions = {number: self.questions[number] for number in items}
        generated = {n: question for n, question in questions.items() if question.item.generated}
        tokens = dict.fromkeys(questions, 0)
        with quiet(logging.ERROR), _plain_decoding(model):  # truncated prompts were reported once
            self._run([question for n, question in questions.items() if n not in generated])
            with _nan_refused(model):
                counts = self._run([*generated.values()])
        return questions, tokens | dict(zip(generated, counts, strict=True))

    def _run(self, questions: Sequence[Question]) -> list[int]:
        """Put the model's responses into the questions' requests.

        Returns:
            Generated tokens of each question.
        """
        by_type: dict[str, list[tuple[int, Instance]]] = defaultdict(list)
        for index, question in enumerate(questions):
            for request in question.requests:
                request.resps, request.filtered_resps = [], {}
                by_type[request.request_type] += [(index, request)] * (request.repeats or 1)
        tokens = [0] * len(questions)
        for request_type, indexed in by_type.items():
            responses = self._responses(request_type, [request for _, request in indexed])
            for (index, request), (response, count) in zip(indexed, responses, strict=True):
                request.resps.append(response)
                tokens[index] += count
        return tokens

    def _responses(self, request_type: str, requests: Sequence[Instance]) -> list[tuple[Any, int]]:
        """Return the model's response to each request and its generated tokens.

        Batches are halved until they fit into memory.
        """
        while True:
            # leaving the block lets go of the tensors that the failed batch held
            with contextlib.suppress(torch.OutOfMemoryError):
                if request_type == "generate_until":
                    return self.language_model.generate_counted(requests)
                run = getattr(self.language_model, request_type)
                return [(response, 0) for response in run(requests, disable_tqdm=True)]
            self.language_model.halve_batches()


def _check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    prompting: Prompting,
) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ObjectiveError(
            f"got a {type(model).__name__}; lm-eval evaluates transformers models only"
        )
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
    """Set the model's own generation settings aside, all but its special tokens."""
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
def _nan_refused(model: PreTrainedModel) -> Iterator[None]:
    """Refuse a model whose logits are NaN during generation: greedy decoding would take a token.

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
        raise ObjectiveError(f"the model's output is not a number (NaN) during generation; {NAN}")
