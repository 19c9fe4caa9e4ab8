"""Evaluate one live model on lm-eval's tasks, item by item.

Tasks, prompts and the model's wrapper are made once; ``score`` only runs the model. It gives the
values of lm-eval's ``simple_evaluate``, item for item, because:

* prompts of the whole split are built at once, with ``simple_evaluate``'s seeds: the few-shot
  sampler is one random stream, so building a subset would change all examples;
* responses are cleared before each call: lm-eval appends to them and reads the first;
* generation settings that a model ships with (a repetition penalty, say) are ignored: they would
  change greedy responses. Its end-of-text tokens are kept.

lm-eval's caches are not used: they are keyed by prompt, but here the weights change. A failure
affects an item (``judging``) or a candidate, never the study.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from objectives.base import (
    ItemResult,
    ItemSnapshot,
    Objective,
    ObjectiveError,
    Response,
    objective_errors,
)
from objectives.entries import Engine
from objectives.harness.encoding import Prompting, check_encoding
from objectives.harness.judging import JUDGE_SECONDS, NAN, judge, response_of
from objectives.harness.losses import is_right, losses, targets, written_answer
from objectives.harness.prompts import Question, build_questions, check_tokens, snapshots
from objectives.harness.quiet import quiet
from objectives.harness.tasks import LoadedTask
from objectives.inference.agreement import settle_engine, settle_modes
from objectives.inference.batch_size import find_batch_size, fits_in
from objectives.inference.fast_hflm import FastHFLM
from objectives.inference.nan_watch import NanError
from objectives.inference.vllm_engine import VllmEngine, check_installed
from objectives.journal import Journal

_LOG = logging.getLogger(__name__)


class Harness(Objective):
    """Objective of lm-eval tasks for one live model, its prompts built once for the whole study.

    Global random states are left as found. The model is put in evaluation mode. Make this before
    writing weights into it, because lm-eval ties weights as its config says.

    Args:
        tasks: Loaded for this one harness.
        model: The live model that every later ``score`` gets.
        tokenizer: Its tokenizer; copied, because lm-eval sets a padding token.
        batch_size: Sequences per forward pass; None: the first size for its device.
        prompting: Chat template and system prompt, the same for every task.
        engine: What generates text; None: the live model itself.

    Attributes:
        questions: One per item, in the items' order; their requests hold the latest responses.
        language_model: The live model as lm-eval calls it.
        judge_seconds: Limit per item for scoring responses.

    Raises:
        ObjectiveError: Prompts cannot be built, or do not fit the model.
    """

    def __init__(
        self,
        tasks: Sequence[LoadedTask],
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        prompting: Prompting | None = None,
        engine: Engine | None = None,
    ) -> None:
        prompting = prompting or Prompting()
        if engine:
            check_installed()
        _check_model(model, tokenizer, prompting)
        check_encoding(tokenizer, prompting)
        where = f"{tokenizer.name_or_path}: correct its config.json or tokenizer, which fail"
        with quiet(logging.ERROR), objective_errors(where):  # it warns that this is not a path
            self.language_model = FastHFLM(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
            )
            settle_modes(self.language_model)
            if engine and any(item.generated for loaded in tasks for item in loaded.items):
                _use_engine(self.language_model)
        with quiet(logging.WARNING):
            self.questions = [
                question
                for loaded in tasks
                for question in build_questions(loaded, self.language_model, prompting)
            ]
        self.tasks = {loaded.name: loaded.weight for loaded in tasks}
        self.items = tuple(question.item for question in self.questions)
        self.judge_seconds = JUDGE_SECONDS
        self._chat = prompting.apply_chat_template

    def hold(self, memory: int) -> None:
        """Limit cached keys and values to a quarter of the bytes that a forward pass may take.

        The limit is rounded down to a power of two, so that small differences in free memory do not
        change the batches.
        """
        self.language_model.runner.held_bytes = 1 << max(1, memory // 4).bit_length() - 1

    def find_batch_size(self, memory: int, block: int) -> int:
        """Try larger batches with the longest items, unless the batch size is fixed.

        Args:
            memory: Bytes that a forward pass may take.
            block: Number of items that are scored at once.

        Returns:
            Most tokens of a batch from here on.
        """
        language_model = self.language_model
        snapshots = self.snapshots(range(len(self.items)))
        lengths = [one.input_tokens + one.max_new_tokens for one in snapshots]
        longest = sorted(range(len(lengths)), key=lambda number: -lengths[number])[:block]

        def fits(size: int) -> bool:
            language_model.resize_batches(size)
            with quiet(logging.ERROR):
                return fits_in(respond, language_model.device, memory)

        def respond() -> None:
            questions = {number: self.questions[number] for number in longest}
            for request_type, numbered in _empty_requests(questions).items():
                with contextlib.suppress(ObjectiveError):  # it is raised when items are scored
                    requests = [request for _, request in numbered]
                    _respond_to(self.language_model, request_type, requests)

        tokens = sum(lengths[number] for number in longest)
        size = find_batch_size(language_model.sizes, tokens, fits)
        language_model.resize_batches(size)
        return size * language_model.sizes.tokens

    def check_tokens(self, items: Sequence[int]) -> None:
        """Refuse items whose prompts the model has no tokens for.

        Raises:
            ObjectiveError: There is one; the message names it.
        """
        check_tokens([self.questions[number] for number in items], self.language_model)

    @override
    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        return snapshots([self.questions[number] for number in items], self.language_model)

    @override
    def score(
        self, model: nn.Module, items: Sequence[int], journal: Journal | None = None
    ) -> list[ItemResult]:
        questions, tokens = self._evaluate(model, items, journal)
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

    @override
    def targets(self, items: Sequence[int]) -> list[str | None]:
        questions = [self.questions[number] for number in items]
        with quiet(logging.ERROR):
            return targets(questions, self.language_model, self.judge_seconds, chat=self._chat)

    @override
    def right_answers(self, model: nn.Module, items: Sequence[int]) -> list[str | None]:
        if not self.language_model.is_differentiable:
            return [None] * len(items)
        written = [number for number in items if self.questions[number].item.generated]
        questions, _ = self._evaluate(model, written)
        with quiet(logging.ERROR):
            judged = judge(list(questions.values()), self.judge_seconds)
        right = {
            number: written_answer(question, self.language_model)
            for (number, question), result in zip(questions.items(), judged, strict=True)
            if is_right(result)
        }
        return [right.get(number) for number in items]

    @override
    def loss(self, model: nn.Module, items: Sequence[int], targets: Sequence[str]) -> Tensor:
        self._check(model, items)
        questions = [self.questions[number] for number in items]
        with quiet(logging.ERROR):
            return losses(questions, targets, self.language_model)

    def _evaluate(
        self, model: nn.Module, items: Sequence[int], journal: Journal | None = None
    ) -> tuple[dict[int, Question], dict[int, int]]:
        """Fill the requests of the numbered items with the model's responses.

        Returns:
            The items' questions, and their numbers of generated tokens, by item number.
        """
        self._check(model, items)
        questions = {number: self.questions[number] for number in items}
        tokens = dict.fromkeys(questions, 0)
        with quiet(logging.ERROR):  # truncated prompts were reported once
            for request_type, numbered in _empty_requests(questions).items():
                requests = [request for _, request in numbered]
                responses = self._responses(request_type, requests, journal)
                for (number, request), (response, count) in zip(numbered, responses, strict=True):
                    request.resps.append(response)
                    tokens[number] += count
        return questions, tokens

    def _check(self, model: nn.Module, items: Sequence[int]) -> None:
        if model is not self.language_model.model:
            raise ObjectiveError(
                "got another model than the one prepared; write weights into that one"
            )
        if model.training:
            raise ObjectiveError("the model is in training mode; call model.eval() first")
        for number in items:
            if not 0 <= number < len(self.questions):
                raise ObjectiveError(
                    f"item {number} does not exist; there are {len(self.questions)}"
                )

    def _responses(
        self, request_type: str, requests: Sequence[Instance], journal: Journal | None
    ) -> list[tuple[Any, int]]:
        """Return the model's response to each request and its number of generated tokens.

        Batches are halved until they fit into memory.
        """
        while True:
            # leaving the block lets go of the tensors that the failed batch held
            with contextlib.suppress(torch.OutOfMemoryError):
                return _respond_to(self.language_model, request_type, requests, journal)
            self._halve_batches()

    def _halve_batches(self) -> None:
        size = self.language_model.batch_size_per_gpu
        if size == 1:
            raise ObjectiveError(
                "not enough memory for a batch of one sequence; free memory on the device, use "
                "fewer examples (num_fewshot), shorter answers or a smaller model"
            )
        self.language_model.decoder.most_rows = size // 2
        self.language_model.resize_batches(size // 2)
        torch.cuda.empty_cache()
        _LOG.warning("out of memory: batch size halved to %d", size // 2)


def _respond_to(
    language_model: FastHFLM,
    request_type: str,
    requests: Sequence[Instance],
    journal: Journal | None = None,
) -> list[tuple[Any, int]]:
    """Return the model's response to each request and its number of generated tokens.

    Raises:
        torch.OutOfMemoryError: A batch does not fit into memory.
    """
    if request_type == "generate_until":
        with _plain_decoding(language_model.model), _nan_refused():
            return language_model.generate_counted(requests, journal)
    noted = {"journal": journal} if journal and request_type == "loglikelihood" else {}
    run = getattr(language_model, request_type)
    return [(response, 0) for response in run(requests, disable_tqdm=True, **noted)]


def _empty_requests(
    questions: Mapping[int, Question],
) -> dict[str, list[tuple[int, Instance]]]:
    """Return the requests of questions without responses, with the items' numbers, by type."""
    by_type: dict[str, list[tuple[int, Instance]]] = defaultdict(list)
    for number, question in questions.items():
        for request in question.requests:
            request.resps, request.filtered_resps = [], {}
            by_type[request.request_type] += [(number, request)] * (request.repeats or 1)
    return by_type


def _check_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompting: Prompting
) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ObjectiveError(
            f"got a {type(model).__name__}; lm-eval evaluates transformers models only"
        )
    if tokenizer.eos_token_id is None:
        raise ObjectiveError("the tokenizer has no end-of-text token; set its eos_token")
    if prompting.apply_chat_template and tokenizer.chat_template is None:
        raise ObjectiveError(
            "apply_chat_template is set but the tokenizer has no chat template; unset it"
        )


def _use_engine(language_model: FastHFLM) -> None:
    """Let vLLM generate the text, unless the model has no weights (a coordinator's)."""
    if language_model.device.type != "meta":
        own = language_model
        settle_engine(own, VllmEngine(own.runner, own.decoder, own.tokenizer))


@contextlib.contextmanager
def _plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Ignore the model's own generation settings, except its special tokens."""
    own = model.generation_config
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    plain = {name: getattr(own, name, None) for name in tokens}
    model.generation_config = GenerationConfig(**plain)
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _nan_refused() -> Iterator[None]:
    try:
        yield
    except NanError:
        what = "the model's output is not a number (NaN) during generation"
        raise ObjectiveError(f"{what}; {NAN}") from None
