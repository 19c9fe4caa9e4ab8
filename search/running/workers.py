"""Workers: each owns a live model, builds recipes in it and evaluates them.

``LocalWorker`` is the one in this process; ``ray_workers`` has those in processes of their own.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from traceback import clear_frames
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from merge_engine.building.export import CheckpointFiles, write_checkpoint
from merge_engine.building.recipe_gradient import RecipeGradient
from merge_engine.building.units import Units
from merge_engine.errors import MergeError
from merge_engine.numerics.heap import trim_heap
from merge_engine.out_of_memory import is_out_of_memory, shortage
from merge_engine.recipe.recipe import Recipe
from merge_engine.replacing import replace_text
from objectives.base import ItemResult, ObjectiveError, Response
from objectives.entries import PromptEntry
from objectives.items import blocks
from objectives.journal import Journal
from search.preparing.context import LiveContext, load_prompts
from search.proposing.tuning import AT_ONCE
from search.racing.race import Floats
from search.storing.folder import CARD, Interrupted
from search.study.public_names import public_names, public_recipe
from search.study.spec import StudyError

ROUNDED: Final = 0.02  # share of an export's results that may differ by rounding
FAILURES: Final = (MergeError, ObjectiveError)  # the candidate's own: the search goes on


@dataclass(frozen=True)
class EvalJob:
    """A recipe, and the numbers of the items it is evaluated on."""

    recipe: Recipe
    items: tuple[int, ...]
    template: str | None = None  # donor whose own chat template is used; None: the study's
    journal: Path | None = None  # file of its responses so far; None: they are not noted


@dataclass(frozen=True)
class EvalReply:
    """Results of an evaluation job."""

    results: Sequence[ItemResult]  # one per item
    build_seconds: float  # time of the build
    score_seconds: float  # time of the evaluation
    notes: Sequence[str] = ()  # warnings of the worker's libraries


@dataclass(frozen=True)
class LossJob:
    """A recipe, and labelled items whose losses are computed."""

    recipe: Recipe
    items: tuple[int, ...]
    labels: tuple[str, ...]  # of the items, see `Objective.targets`
    # Weights of the items in the sum to differentiate; empty: no gradient is computed.
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class LossReply:
    """Losses and gradient of a loss job."""

    losses: Sequence[float]  # one per item
    gradient: Floats | None  # of the weighted sum, (U, m) for m models in U units
    seconds: float  # that building and computing took
    notes: Sequence[str] = ()  # warnings of the worker's libraries


@dataclass(frozen=True)
class AnswerJob:
    """A recipe, and the numbers of items to answer; right answers may become labels."""

    recipe: Recipe
    items: tuple[int, ...]


@dataclass(frozen=True)
class AnswerReply:
    """Answers of an answer job."""

    answers: Sequence[str | None]  # one per item; None: it is not judged right
    notes: Sequence[str] = ()  # warnings of the worker's libraries


Job = EvalJob | LossJob | AnswerJob
Reply = EvalReply | LossReply | AnswerReply


class ExportCheck(NamedTuple):
    """How the results of a saved recipe, built again, compare with the stored ones."""

    compared: int  # results that were evaluated again
    differing: int  # those of them that are not the same to the bit
    machine: str  # name of the machine that has the folder


class WorkerDied(Interrupted):
    """A worker's process ended while it did a job."""


class Workers(Protocol):
    """Several workers, indexed from 0; each does one job at a time."""

    @property
    def count(self) -> int:
        """How many workers there are."""

    def submit(self, worker: int, job: Job) -> None:
        """Give an idle worker a job."""

    def next(self) -> tuple[int, Reply | Exception]:
        """Wait for a job to end.

        Returns:
            The worker, and its reply, one of ``FAILURES``, or ``WorkerDied``: a new worker has
            then taken its index.
        """

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of ``Worker`` on any of them, while all are idle."""

    def close(self) -> None:
        """Release the workers."""


class Worker:
    """Builds recipes in one live model and evaluates them."""

    def __init__(self, context: LiveContext) -> None:
        self.context = context
        self._prompts = cache(partial(load_prompts, context))
        self._gradient: RecipeGradient | None = None  # made when it is needed

    def do(self, job: Job) -> Reply:
        """Do a job; raise as ``evaluate``, ``losses`` and ``right_answers`` do."""
        if isinstance(job, EvalJob):
            return self.evaluate(job)
        return self.losses(job) if isinstance(job, LossJob) else self.right_answers(job)

    def evaluate(self, job: EvalJob) -> EvalReply:
        """Build a recipe, unless the live model has it already, and score items with it.

        Raises:
            MergeError: The recipe cannot be built.
            ObjectiveError: The model it makes gives no usable result.
        """
        start = time.perf_counter()
        with self._built(job.recipe) as model, Journal.opened(job.journal) as journal:
            built = time.perf_counter()
            results = self.context.objective_of(job.template).score(model, job.items, journal)
        return EvalReply(results, built - start, time.perf_counter() - built)

    def losses(self, job: LossJob) -> LossReply:
        """Compute losses of labelled items, and the gradient of their weighted sum.

        Raises:
            MergeError: The recipe cannot be built, or has no gradient.
            ObjectiveError: A loss is not a number, or does not fit into memory.
        """
        start = time.perf_counter()
        labels = dict(zip(job.items, job.labels, strict=True))
        objective, model = self.context.objective, self.context.builder.model

        def loss(items: Sequence[int]) -> Tensor:
            return saturate(objective.loss(model, items, [labels[item] for item in items]))

        with self._built(job.recipe):
            if job.weights:
                trim_heap()  # scoring leaves holes, and so do activations
                found, gradient = self._gradients().values_and_grad(loss, job.items, job.weights)
                trim_heap()
                by_model = self._by_model(job.recipe, gradient)
                return LossReply(found.tolist(), by_model, time.perf_counter() - start)
            with torch.no_grad():
                values = [
                    float(value) for part in blocks(job.items, AT_ONCE) for value in loss(part)
                ]
        return LossReply(values, None, time.perf_counter() - start)

    def _by_model(self, recipe: Recipe, gradient: Tensor) -> Floats:
        """Return a gradient (U, n) for the n donors a recipe names as one for all m models."""
        models = self.context.space.models
        found = np.zeros((len(gradient), len(models)))
        for column, source in enumerate(recipe.donors):
            if source.model in models:  # the base is named for its config alone
                found[:, models.index(source.model)] = gradient[:, column].numpy()
        return found

    def _gradients(self) -> RecipeGradient:
        if self._gradient is None:
            units = self.context.tuned_units
            if units is None:
                raise MergeError("the study tunes no weights")
            builder = self.context.builder
            names = builder.model_set.names
            self._gradient = RecipeGradient(builder, Units.of_filters(names, units.filters))
        return self._gradient

    def labels(self, items: Sequence[int]) -> list[str | None]:
        """Return the labels that the tasks have for items, else None."""
        return self.context.objective.targets(items)

    def right_answers(self, job: AnswerJob) -> AnswerReply:
        """Generate a recipe's answers, and return those that are judged right.

        Raises:
            MergeError: The recipe cannot be built.
            ObjectiveError: The model it makes gives no usable text.
        """
        with self._built(job.recipe) as model:
            return AnswerReply(self.context.objective.right_answers(model, job.items))

    def respond(
        self, recipe: Recipe, to: Sequence[int] | PromptEntry, template: str | None
    ) -> list[Response]:
        """Generate a recipe's text for items of the study, or for prompts.

        ``template`` is the donor whose own chat template they are under; None: the study's.

        Raises:
            MergeError: The recipe cannot be built.
            ObjectiveError: The model it makes gives no usable text, or a prompt cannot be used.
        """
        with self._built(recipe) as model:
            if isinstance(to, PromptEntry):
                return self._prompts(to, template).respond(model, range(len(to.prompts)))
            return self.context.objective_of(template).respond(model, to)

    def export(
        self,
        recipe: Recipe,
        evaluated: Sequence[tuple[EvalJob, Sequence[ItemResult]]],
        out: Path,
        card: str,
    ) -> ExportCheck:
        """Build a recipe once more, compare its results with those stored, and save it.

        An empty ``card`` writes none.

        Raises:
            ObjectiveError: The recipe built now is not the one that was scored.
        """
        builder = self.context.builder
        with self._unchanged_weights():
            builder.build(recipe, force=True)
        check = self._compare(evaluated)
        models = builder.model_set
        files = CheckpointFiles.of(models.reference, recipe, models.vocabulary)
        public = public_recipe(recipe, public_names(self.context.spec))
        files = replace(files, text=public.to_yaml())
        with self._unchanged_weights():
            write_checkpoint(builder.tensors(), out, shapes=builder.shapes(), files=files)
        if card:
            replace_text(out / CARD, card)
        return check

    def _compare(self, evaluated: Sequence[tuple[EvalJob, Sequence[ItemResult]]]) -> ExportCheck:
        """Do jobs again, and compare their results with the stored ones.

        On another machine, or in smaller batches, rounding may change a few. Items whose judging
        failed, now or before, are not compared: they hit a time limit.

        Raises:
            ObjectiveError: More than ``ROUNDED`` of the results differ.
        """
        pairs = [
            (new.value, old.value)
            for job, results in evaluated
            for new, old in zip(self.evaluate(job).results, results, strict=True)
            if new.fault is None and old.fault is None
        ]
        differing = sum(new != old for new, old in pairs)
        others = sum(not math.isclose(new, old, rel_tol=1e-3, abs_tol=1e-6) for new, old in pairs)
        if others > ROUNDED * len(pairs):
            raise ObjectiveError(
                f"the recipe, built once more, answers {others} of {len(pairs)} items differently "
                "than before, so it is not saved: models, packages or the machine have changed; "
                "restore them, or start over with --force-new"
            )
        return ExportCheck(len(pairs), differing, socket.gethostname())

    @contextmanager
    def _built(self, recipe: Recipe) -> Iterator[nn.Module]:
        """Build a recipe, unless the live model has it already, and guard what is done with it."""
        with self._unchanged_weights(), self._oom_fails_candidate():
            self.context.builder.build(recipe)
            yield self.context.builder.model

    @contextmanager
    def _oom_fails_candidate(self) -> Iterator[None]:
        """Turn an out-of-memory error into an ``ObjectiveError``: only this candidate fails.

        Its tensors, and all statistics that can be computed again, are freed.
        """
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            clear_frames(error.__traceback__)  # they hold the tensors of a failed batch
            why = shortage(error)
        else:
            return
        self.context.builder.model_set.measurements.release()
        torch.cuda.empty_cache()  # does nothing without CUDA
        raise ObjectiveError(f"{why}; free some, or use smaller batches (batch_size)")

    @contextmanager
    def _unchanged_weights(self) -> Iterator[None]:
        """Raise if a model's weights have changed since they were first read.

        Raises:
            StudyError: They have; it takes precedence over any error inside.
        """
        try:
            yield
        finally:
            models = self.context.models
            if changed := [name for name, model in models.items() if model.has_changed()]:
                raise StudyError(
                    f"the weights of {', '.join(changed)} have changed while they were used, so "
                    "the run has stopped; restore them, and run it again"
                )

    def check_finite(self) -> None:
        """Read all donors.

        Raises:
            MergeError: There is NaN or Inf in one.
        """
        self.context.builder.model_set.check_finite()


def saturate(losses: Tensor) -> Tensor:
    """Return ``log(1 + L)`` of losses L in nats, and those below zero as they are.

    A long or very unlikely answer has a hundred times the loss of a multiple choice, and its
    gradient would dominate the step. Of ``log(1 + L)``, relative changes of large losses count, and
    absolute changes of small ones.
    """
    return torch.where(losses > 0, losses.clamp_min(0).log1p(), losses)


class LocalWorker(Workers):
    """A single worker in this process; a job runs when its reply is waited for."""

    def __init__(self, context: LiveContext) -> None:
        self._worker = Worker(context)
        self._jobs: list[Job] = []

    @property
    @override
    def count(self) -> int:
        return 1

    @override
    def submit(self, worker: int, job: Job) -> None:
        self._jobs.append(job)

    @override
    def next(self) -> tuple[int, Reply | Exception]:
        try:
            return 0, self._worker.do(self._jobs.pop())
        except FAILURES as error:
            return 0, error

    @override
    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)

    @override
    def close(self) -> None:
        pass
