"""Evaluate one live model on lm-eval's tasks, item by item.

Tasks, prompts and the model's wrapper are made once; ``score`` only runs the model. It gives the
values of lm-eval's ``simple_evaluate``, item for item, because:

* prompts of the whole split are built at once, with ``simple_evaluate``'s seeds: the few-shot
  sampler is one random stream, so building a subset would change all examples;
* responses are cleared before each call: lm-eval appends to them and reads the first
  (``responding``);
* generation settings that a model ships with (a repetition penalty, say) are ignored: they would
  change greedy responses. Its end-of-text tokens are kept.

lm-eval's caches are not used: they are keyed by prompt, but here the weights change. A failure
affects an item (``judging``) or a candidate, never the study.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
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
from objectives.harness.judging import JUDGE_SECONDS, judge, response_of
from objectives.harness.losses import generated_label, is_right, losses, targets
from objectives.harness.prompts import Question, build_questions, check_tokens, snapshots
from objectives.harness.quiet import quiet
from objectives.harness.responding import Responder
from objectives.harness.tasks import LoadedTask
from objectives.inference.agreement import settle_engine, settle_modes
from objectives.inference.fast_hflm import FastHFLM
from objectives.inference.vllm_engine import VllmEngine, check_installed
from objectives.journal import Journal


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
        responder: Asks it, in batches that fit into memory.
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
        self.responder = Responder(self.language_model)
        self.judge_seconds = JUDGE_SECONDS
        self._chat = prompting.apply_chat_template

    def find_batch_size(self, memory: int, block: int) -> int:
        """Try larger batches with the longest items (``Responder.find_batch_size``).

        Args:
            memory: Bytes that a forward pass may take.
            block: Number of items that are scored at once.

        Returns:
            Most tokens of a batch from here on.
        """
        snapshots = self.snapshots(range(len(self.items)))
        lengths = [one.input_tokens + one.max_new_tokens for one in snapshots]
        longest = sorted(range(len(lengths)), key=lambda number: -lengths[number])[:block]
        tokens = sum(lengths[number] for number in longest)
        return self.responder.find_batch_size(
            [self.questions[number] for number in longest], tokens, memory
        )

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
        generated = [number for number in items if self.questions[number].item.generated]
        questions, _ = self._evaluate(model, generated)
        with quiet(logging.ERROR):
            judged = judge(list(questions.values()), self.judge_seconds)
        right = {
            number: generated_label(question, self.language_model)
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
        with quiet(logging.ERROR):  # truncated prompts were reported once
            return questions, self.responder.respond(questions, journal)

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
