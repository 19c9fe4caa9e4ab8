"""Get a live model's responses to questions, in batches that fit into its device's memory."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import GenerationConfig, PreTrainedModel

from objectives.base import ObjectiveError
from objectives.harness.judging import NAN
from objectives.harness.prompts import Question
from objectives.harness.quiet import quiet
from objectives.inference.batch_size import find_batch_size, fits_in
from objectives.inference.fast_hflm import FastHFLM
from objectives.inference.nan_watch import NanError
from objectives.journal import Journal

_LOG = logging.getLogger(__name__)


class Responder:
    """Fills questions' requests with a language model's responses."""

    def __init__(self, language_model: FastHFLM) -> None:
        self._language_model = language_model

    def hold(self, memory: int) -> None:
        """Limit cached keys and values to a quarter of the bytes that a forward pass may take.

        The limit is rounded down to a power of two, so that small differences in free memory do not
        change the batches.
        """
        self._language_model.runner.held_bytes = 1 << max(1, memory // 4).bit_length() - 1

    def find_batch_size(self, questions: Sequence[Question], tokens: int, memory: int) -> int:
        """Try larger batches, unless the batch size is fixed.

        Args:
            questions: The longest that are evaluated together; their requests are emptied.
            tokens: All their tokens.
            memory: Bytes that a forward pass may take.

        Returns:
            Most tokens of a batch from here on.
        """
        language_model = self._language_model

        def respond() -> None:
            for request_type, numbered in _empty_requests(dict(enumerate(questions))).items():
                with contextlib.suppress(ObjectiveError):  # it is raised when items are scored
                    self._respond_to(request_type, [request for _, request in numbered], None)

        def fits(size: int) -> bool:
            language_model.resize_batches(size)
            with quiet(logging.ERROR):
                return fits_in(respond, language_model.device, memory)

        size = find_batch_size(language_model.sizes, tokens, fits)
        language_model.resize_batches(size)
        return size * language_model.sizes.tokens

    def respond(
        self, questions: Mapping[int, Question], journal: Journal | None = None
    ) -> dict[int, int]:
        """Fill the questions' requests with responses; return the generated tokens of each.

        Responses are noted in a journal; those that it has are not computed again.

        Raises:
            ObjectiveError: A response is NaN, or memory is too small for one sequence.
        """
        tokens = dict.fromkeys(questions, 0)
        for request_type, numbered in _empty_requests(questions).items():
            requests = [request for _, request in numbered]
            responses = self._in_smaller_batches(request_type, requests, journal)
            for (number, request), (response, count) in zip(numbered, responses, strict=True):
                request.resps.append(response)
                tokens[number] += count
        return tokens

    def _in_smaller_batches(
        self, request_type: str, requests: Sequence[Instance], journal: Journal | None
    ) -> list[tuple[Any, int]]:
        """Return ``_respond_to``'s responses, in batches that are halved until they fit."""
        while True:
            # leaving the block lets go of the tensors that the failed batch held
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._respond_to(request_type, requests, journal)
            self._halve_batches()

    def _halve_batches(self) -> None:
        size = self._language_model.batch_size_per_gpu
        if size == 1:
            raise ObjectiveError(
                "not enough memory for a batch of one sequence; free memory on the device, use "
                "fewer examples (num_fewshot), shorter answers or a smaller model"
            )
        self._language_model.decoder.most_rows = size // 2
        self._language_model.resize_batches(size // 2)
        torch.cuda.empty_cache()
        _LOG.warning("out of memory: batch size halved to %d", size // 2)

    def _respond_to(
        self, request_type: str, requests: Sequence[Instance], journal: Journal | None
    ) -> list[tuple[Any, int]]:
        """Return the response to each request and its number of generated tokens.

        Raises:
            torch.OutOfMemoryError: A batch does not fit into memory.
        """
        language_model = self._language_model
        if request_type == "generate_until":
            with _plain_decoding(language_model.model), _nan_refused():
                return language_model.generate_counted(requests, journal)
        noted = {"journal": journal} if journal and request_type == "loglikelihood" else {}
        run = getattr(language_model, request_type)
        return [(response, 0) for response in run(requests, disable_tqdm=True, **noted)]


def _empty_requests(
    questions: Mapping[int, Question],
) -> dict[str, list[tuple[int, Instance]]]:
    """Return the requests of questions without responses, with their questions' keys, by type."""
    by_type: dict[str, list[tuple[int, Instance]]] = defaultdict(list)
    for number, question in questions.items():
        for request in question.requests:
            request.resps, request.filtered_resps = [], {}
            by_type[request.request_type] += [(number, request)] * (request.repeats or 1)
    return by_type


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
