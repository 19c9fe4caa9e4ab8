"""Who builds and asks: a worker owns a live model, the coordinator hands it jobs.

``LocalWorker`` is the one in this process; ``ray_workers`` has those in processes of their own.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import torch

from merge_engine.building.export import CheckpointFiles, write_checkpoint
from merge_engine.errors import MergeError
from merge_engine.recipe.recipe import Recipe
from objectives.base import ItemResult, ObjectiveError, Response
from search.preparing.context import LiveContext, load_prompts
from search.storing.folder import CARD
from search.study.spec import StudyError

if TYPE_CHECKING:
    from objectives.entries import PromptEntry

ROUNDED: Final = 0.02  # of the answers may be others by rounding, and no more
FAILURES: Final = (MergeError, ObjectiveError)  # the candidate's own: the search goes on


@dataclass(frozen=True)
class EvalJob:
    """A recipe, and the numbers of the items it is asked."""

    recipe: Recipe
    items: tuple[int, ...]


@dataclass(frozen=True)
class EvalReply:
    """One answer per item, the seconds that building and asking took, and what was warned of."""

    answers: Sequence[ItemResult]
    build_seconds: float
    ask_seconds: float
    notes: Sequence[str] = ()


class ExportCheck(NamedTuple):
    """What came of building a recipe once more and saving it.

    Args:
        compared: Answers that were asked again.
        differing: Those of them that are not the same to the bit.
        machine: The name of the machine that has the folder.
    """

    compared: int
    differing: int
    machine: str


class WorkerDied(StudyError):  # noqa: N818  what happened, not what is wrong
    """A worker's process ended while it did a job."""


class Workers(Protocol):
    """Several workers, known by their places from 0 on; each does one job at a time."""

    @property
    def count(self) -> int:
        """How many there are."""

    def submit(self, place: int, job: EvalJob) -> None:
        """Give an idle worker a job."""

    def next(self) -> tuple[int, EvalReply | Exception]:
        """Wait for a job to end.

        Returns:
            Whose it was, and the reply, one of ``FAILURES``, or ``WorkerDied``: there is then a
            new worker at its place.
        """

    def save(
        self,
        recipe: Recipe,
        asked: Sequence[tuple[EvalJob, Sequence[ItemResult]]],
        out: Path,
        card: str,
    ) -> ExportCheck:
        """As ``Worker.save``, by any of them while all are idle."""

    def say(self, recipe: Recipe, asked: Sequence[int] | PromptEntry) -> list[Response]:
        """As ``Worker.say``, by any of them while all are idle."""

    def look_through(self) -> None:
        """Read all donors.

        Raises:
            RecipeError: There is NaN or Inf in one.
        """

    def close(self) -> None:
        """Let go of them."""


class Worker:
    """A live model, and what builds and asks it.

    Args:
        bench: What to work at.
    """

    def __init__(self, bench: LiveContext) -> None:
        self.bench = bench
        self._prompts = cache(partial(load_prompts, bench))

    def ask(self, job: EvalJob) -> EvalReply:
        """Do a job; a recipe that is still in the live model is not built again.

        Raises:
            RecipeError: The recipe cannot be built.
            ObjectiveError: The model it makes gives no usable answer.
        """
        start = time.perf_counter()
        with _room_needed():
            self.bench.builder.build(job.recipe)
            built = time.perf_counter()
            answers = self.bench.objective.score(self.bench.builder.model, job.items)
        return EvalReply(answers, built - start, time.perf_counter() - built)

    def say(self, recipe: Recipe, asked: Sequence[int] | PromptEntry) -> list[Response]:
        """What a recipe's model says, in words, to items of the study or to prompts.

        Raises:
            RecipeError: The recipe cannot be built.
            ObjectiveError: The model it makes gives no usable answer, or a prompt cannot be asked.
        """
        from objectives.entries import PromptEntry

        with _room_needed():
            if isinstance(asked, PromptEntry):
                objective, items = self._prompts(asked), [*range(len(asked.prompts))]
            else:
                objective, items = self.bench.objective, [*asked]
            self.bench.builder.build(recipe)
            return objective.respond(self.bench.builder.model, items)

    def save(
        self,
        recipe: Recipe,
        asked: Sequence[tuple[EvalJob, Sequence[ItemResult]]],
        out: Path,
        card: str,
    ) -> ExportCheck:
        """Build a recipe once more, make sure that it answers as it did, and save it.

        On another machine, or in smaller batches, rounding may decide a few answers otherwise.
        Where judging failed, now or then, there is nothing to compare: a time limit was in play.

        Args:
            recipe: To be saved.
            asked: What it was asked before, and its answers.
            out: The folder to make.
            card: To be written into it.

        Raises:
            ObjectiveError: More than ``ROUNDED`` of the answers are others: what would be saved is
                not what was scored.
        """
        builder = self.bench.builder
        with _room_needed():
            builder.build(recipe, force=True)
        pairs = [
            (new.value, old.value)
            for job, answers in asked
            for new, old in zip(self.ask(job).answers, answers, strict=True)
            if new.fault is None and old.fault is None
        ]
        differing = sum(new != old for new, old in pairs)
        others = sum(not math.isclose(new, old, rel_tol=1e-3, abs_tol=1e-6) for new, old in pairs)
        if others > ROUNDED * len(pairs):
            raise ObjectiveError(
                f"the recipe, built once more, answers {others} of {len(pairs)} items otherwise "
                "than it did, so it is not saved: models, packages or the machine have changed; "
                "restore them, or begin anew with --force-new"
            )
        files = CheckpointFiles(reference=builder.model_set.reference, recipe=recipe)
        write_checkpoint(builder.tensors(), out, shapes=dict(builder.tensors()), files=files)
        (out / CARD).write_text(card, encoding="utf-8")
        return ExportCheck(len(pairs), differing, socket.gethostname())


@contextmanager
def _room_needed() -> Iterator[None]:
    """That there is no memory for a candidate is the candidate's failure."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ObjectiveError(f"out of memory: {str(error).splitlines()[0]}") from error


class LocalWorker:
    """The one worker in this process.

    Args:
        bench: What it works at.
    """

    count = 1

    def __init__(self, bench: LiveContext) -> None:
        self._worker = Worker(bench)
        self._jobs: list[EvalJob] = []

    def submit(self, place: int, job: EvalJob) -> None:  # noqa: ARG002
        """Take the job; it is done when somebody waits for it."""
        self._jobs.append(job)

    def next(self) -> tuple[int, EvalReply | Exception]:
        """Do the job."""
        try:
            return 0, self._worker.ask(self._jobs.pop())
        except FAILURES as error:
            return 0, error

    def save(
        self,
        recipe: Recipe,
        asked: Sequence[tuple[EvalJob, Sequence[ItemResult]]],
        out: Path,
        card: str,
    ) -> ExportCheck:
        """As ``Worker.save``."""
        return self._worker.save(recipe, asked, out, card)

    def say(self, recipe: Recipe, asked: Sequence[int] | PromptEntry) -> list[Response]:
        """As ``Worker.say``."""
        return self._worker.say(recipe, asked)

    def look_through(self) -> None:
        """Read all donors."""
        self._worker.bench.builder.model_set.check_finite()

    def close(self) -> None:
        """Nothing is held but memory."""
