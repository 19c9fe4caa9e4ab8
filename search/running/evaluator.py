"""Evaluation of recipes on blocks of items: results come from the database, else from a worker.

Jobs go to several workers at once. A job's results are in the database before anything depends
on them, and a recipe's blocks go to the worker that has built it already, if that one is idle.

A race decides after every block, so in a race a job is one block. Elsewhere a job has up to
``JOB_ITEMS`` items of consecutive blocks: generating text for many items together costs little more
than for one block. Jobs end at the same items whatever is stored already, so that a resumed run has
the same rounding, and each is stored in one transaction. A job of several blocks has a journal of
its responses in the run folder, from which the same job goes on after a kill.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from merge_engine.recipe.recipe import Recipe
from objectives.base import ItemResult, ObjectiveError
from objectives.items import SPLITS, Split, blocks
from search.preparing.context import StudyContext
from search.preparing.forward_memory import JOB_ITEMS
from search.proposing.starts import baselines
from search.running.events import BlockEvaluated, Listener
from search.running.workers import (
    AnswerJob,
    AnswerReply,
    EvalJob,
    EvalReply,
    ExportCheck,
    Job,
    LossJob,
    LossReply,
    Reply,
    WorkerDied,
    Workers,
)
from search.storing.folder import JOURNALS
from search.storing.intact import damaged, digest_of
from search.storing.store import Store

TuningJob = LossJob | AnswerJob
TuningReply = TypeVar("TuningReply", LossReply, AnswerReply)

MAX_DEATHS: Final = 2  # of workers evaluating a recipe, after which it counts as failed


@dataclass(frozen=True)
class UnderOwnTemplate:
    """A donor, evaluated on the study's items under its own chat template."""

    donor: str  # its name in the study
    recipe: Recipe  # the donor alone
    digest: str  # hash of the template

    @property
    def key(self) -> str:
        """Key of its results in the database."""
        return f"{self.recipe.key}-{self.digest}"


Evaluated = Recipe | UnderOwnTemplate  # anything with results on items


def under_own_templates(context: StudyContext) -> dict[str, UnderOwnTemplate]:
    """Return the donors that have a chat template other than the study's, by name."""
    known = baselines(context.space)
    return {
        donor: UnderOwnTemplate(donor, known[donor], own.digest)
        for donor, own in context.own_templates.items()
    }


def recipe_and_template(one: Evaluated) -> tuple[Recipe, str | None]:
    """Return the recipe to build, and the donor whose own template to use; None: the study's."""
    return (one.recipe, one.donor) if isinstance(one, UnderOwnTemplate) else (one, None)


class Blocks(NamedTuple):
    """Items of a split that one recipe is evaluated on at once, by the numbers of their blocks."""

    recipe: str  # its key, or that of a donor under its own template
    split: Split
    numbers: tuple[int, ...]


def jobs_of(blocks: Iterable[int], size: int) -> list[tuple[int, ...]]:
    """Group the numbers of blocks of ``size`` items into jobs."""
    together = max(1, JOB_ITEMS // size)
    return [tuple(job) for _, job in groupby(blocks, key=lambda number: number // together)]


class Evaluator:
    """Hands blocks of items to workers and stores their results."""

    def __init__(
        self,
        folder: Path,
        context: StudyContext,
        store: Store,
        workers: Workers,
        listener: Listener,
    ) -> None:
        self.store, self.workers, self.listener = store, workers, listener
        self._journals = folder.absolute() / JOURNALS
        self.build_seconds, self.stopping = 0.0, False
        self._size = context.spec.objective.block
        self._blocks: dict[Split, tuple[tuple[int, ...], ...]] = {
            split: blocks(getattr(context.splits, split), self._size) for split in SPLITS
        }
        self._jobs = dict[int, Job]()  # under way, by worker
        self._evaluating = dict[int, Blocks]()  # those of jobs that evaluate blocks, by worker
        self._built = dict[int, str]()  # key of the recipe in each worker's live model
        self._deaths = Counter[str]()

    @property
    def idle(self) -> list[int]:
        """Indices of the workers that have no job."""
        return [worker for worker in range(self.workers.count) if worker not in self._jobs]

    @property
    def working(self) -> bool:
        """Whether jobs are under way."""
        return bool(self._jobs)

    def block_ends(self, split: Split) -> list[int]:
        """List how many items of a split have been evaluated after each of its blocks."""
        return list(accumulate(map(len, self._blocks[split])))

    def stored(self, recipe: Evaluated, split: Split, items: int | None = None) -> list[ItemResult]:
        """Read a recipe's results on the first items of a split, in scoring order.

        ``items`` are how many of the first, rounded up to whole blocks; None: all.

        Raises:
            StudyError: Some of them are not there.
        """
        known, wanted = self.store.results(recipe.key, split), self._first(split, items)
        if missing := [number for number in wanted if number not in known]:
            what = f"{split} block {missing[0]} of recipe {recipe.key} is not there"
            raise damaged(self.store.storage.name, what)
        return [result for number in wanted for result in known[number]]

    def attempt(
        self, recipes: Iterable[Evaluated], split: Split, items: int | None = None
    ) -> dict[str, Exception]:
        """Evaluate recipes on the first items of a split, as far as results are not stored.

        The remaining blocks of a failed recipe are skipped.

        Returns:
            The errors of failed recipes, by key.
        """
        left = {
            Blocks(recipe.key, split, numbers): recipe
            for recipe in recipes
            for numbers in jobs_of(self.missing_blocks(recipe, split, items), self._size)
        }
        failed: dict[str, Exception] = {}
        if not left:  # other blocks may be under way meanwhile
            return failed
        while left or self.working:
            while left and self.idle:
                wanted = self._next_of(left)
                self.submit(left.pop(wanted), split, *wanted.numbers)
            done, error = self.collect()
            if error:
                failed.setdefault(done.recipe, error)
                left = {one: left[one] for one in left if one.recipe not in failed}
        return failed

    def _next_of(self, left: Iterable[Blocks]) -> Blocks:
        """Choose blocks of a recipe that an idle worker has, else of one that none has."""
        idle = {self._built.get(worker) for worker in self.idle}
        others = {blocks.recipe for blocks in self._evaluating.values()}
        return min(left, key=lambda one: (one.recipe not in idle, one.recipe in others))

    def missing_blocks(
        self, recipe: Evaluated, split: Split, items: int | None = None
    ) -> list[int]:
        """List the blocks of the split's first items that a recipe is not evaluated on."""
        stored = self.store.blocks(recipe.key, split)
        return [number for number in self._first(split, items) if number not in stored]

    def submit(self, recipe: Evaluated, split: Split, *numbers: int) -> Blocks:
        """Give blocks to an idle worker, to be evaluated at once."""
        worker = min(self.idle, key=lambda worker: self._built.get(worker) != recipe.key)
        blocks = self._evaluating[worker] = Blocks(recipe.key, split, numbers)
        built, donor = recipe_and_template(recipe)
        self._submit(worker, EvalJob(built, self._items(blocks), donor, self._journal(blocks)))
        return blocks

    def _items(self, blocks: Blocks) -> tuple[int, ...]:
        return tuple(n for number in blocks.numbers for n in self._blocks[blocks.split][number])

    def _journal(self, blocks: Blocks) -> Path | None:
        """Return the file of the responses to several blocks; None for one."""
        several = len(blocks.numbers) > 1
        return self._journals / digest_of(blocks.recipe, self._items(blocks)) if several else None

    def _submit(self, worker: int, job: Job) -> None:
        self._jobs[worker], self._built[worker] = job, job.recipe.key
        self.workers.submit(worker, job)

    def _next(self) -> tuple[int, Reply | Exception]:
        """Wait for a job to end; if its worker died, the one that took its place does it again.

        Returns:
            The worker, and its reply or the error of the job's recipe.
        """
        while True:
            worker, outcome = self.workers.next()
            job = self._jobs.pop(worker)
            if isinstance(outcome, WorkerDied):
                self._deaths[job.recipe.key] += 1
                if self._deaths[job.recipe.key] < MAX_DEATHS and not self.stopping:
                    self._submit(worker, job)
                    continue
                outcome = ObjectiveError(f"it ended its worker {MAX_DEATHS} times: {outcome}")
            if isinstance(outcome, Exception):
                del self._built[worker]
            return worker, outcome

    def collect(self) -> tuple[Blocks, Exception | None]:
        """Wait for blocks to be evaluated, and store their results.

        Returns:
            The blocks, and the error if they could not be evaluated.

        Raises:
            KeyboardInterrupt: ``stopping`` was set; all jobs under way were stored before.
        """
        while True:
            worker, outcome = self._next()
            blocks = self._evaluating.pop(worker)
            if not isinstance(outcome, Exception):
                assert isinstance(outcome, EvalReply)
                self.build_seconds += outcome.build_seconds
                self._save(blocks, outcome)
                self.listener(BlockEvaluated(len(outcome.results)))
            if not self.stopping:
                if journal := self._journal(blocks):
                    journal.unlink(missing_ok=True)
                return blocks, outcome if isinstance(outcome, Exception) else None
            if not self.working:
                raise KeyboardInterrupt

    def _save(self, blocks: Blocks, reply: EvalReply) -> None:
        """Store a job's results, block by block in one transaction."""
        results, sizes = iter(reply.results), [*map(len, self._blocks[blocks.split])]
        by_block = {number: list(islice(results, sizes[number])) for number in blocks.numbers}
        self.store.save(blocks.recipe, blocks.split, by_block, reply.score_seconds)

    def do_all(self, jobs: Sequence[TuningJob], kind: type[TuningReply]) -> list[TuningReply]:
        """Have all workers do jobs of one kind while no block is evaluated; return the replies.

        Raises:
            MergeError, ObjectiveError: Of a job that failed.
            KeyboardInterrupt: ``stopping`` was set.
        """
        waiting, numbers = deque(enumerate(jobs)), dict[int, int]()  # numbers of jobs, by worker
        replies = dict[int, TuningReply]()
        failed: Exception | None = None
        while waiting or self.working:
            while waiting and self.idle:
                worker = self.idle[0]
                numbers[worker], job = waiting.popleft()
                self._submit(worker, job)
            worker, outcome = self._next()
            if isinstance(outcome, Exception):
                failed = failed or outcome
            else:
                assert isinstance(outcome, kind)
                replies[numbers[worker]] = outcome
            if failed or self.stopping:
                waiting.clear()
        if self.stopping:
            raise KeyboardInterrupt
        if failed:
            raise failed
        return [replies[number] for number in range(len(jobs))]

    def abandon(self) -> None:
        """Wait for the jobs under way to end, and drop their results."""
        while self.working:
            self._jobs.pop(self.workers.next()[0])
        self._evaluating.clear()

    def export(self, recipe: Recipe, out: Path, card: str) -> ExportCheck:
        """Have a recipe rebuilt, compared with its stored results, and saved with a card.

        It is evaluated in the same jobs as before: single blocks, but larger ones of test items.
        """
        evaluated = []
        for split in SPLITS:
            stored = self.store.results(recipe.key, split)  # by block number, in order
            jobs = jobs_of(stored, self._size) if split == "test" else [(one,) for one in stored]
            for job in jobs:
                results = [result for number in job for result in stored[number]]
                wanted = Blocks(recipe.key, split, job)
                evaluated.append((EvalJob(recipe, self._items(wanted)), results))
        check: ExportCheck = self.workers.call("export", recipe, evaluated, out.absolute(), card)
        return check

    def _first(self, split: Split, items: int | None) -> range:
        """Return the numbers of the blocks that contain the first items of a split."""
        count = len(self._blocks[split])
        return range(count if items is None else min(count, math.ceil(items / self._size)))
