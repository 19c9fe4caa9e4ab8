"""A recipe's answers: from the database if they are there, else a worker is asked.

Jobs go to several workers at once. A block's answers are in the database before anything depends
on them, and a recipe's blocks go to the worker that has it built already, if that one is idle.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple

from merge_engine.recipe.recipe import Recipe
from objectives.base import ItemResult, ObjectiveError
from objectives.items import SPLITS, Split, blocks
from search.preparing.context import StudyContext
from search.running.workers import EvalJob, ExportCheck, WorkerDied, Workers
from search.storing.store import Store

DEATHS: Final = 2  # of workers, after which a recipe is asked no more


class Block(NamedTuple):
    """Some items of a split, as one recipe is asked them at once."""

    recipe: str
    split: Split
    number: int


class Evaluator:
    """Hands blocks to workers and stores their answers.

    Args:
        bench: Says which items are in a block.
        store: Where finished blocks go.
        workers: Who is asked.
        on_block: Told how many items there were in each block that had to be asked.
    """

    def __init__(
        self,
        bench: StudyContext,
        store: Store,
        workers: Workers,
        on_block: Callable[[int], None] = lambda items: None,  # noqa: ARG005
    ) -> None:
        self.store = store
        self.workers = workers
        self.on_block = on_block
        self.build_seconds = 0.0
        self.stopping = False
        self._size = bench.spec.objective.block
        self._blocks: dict[Split, tuple[tuple[int, ...], ...]] = {
            split: blocks(getattr(bench.splits, split), self._size) for split in SPLITS
        }
        self._at_work: dict[int, tuple[Block, EvalJob]] = {}
        self._built: dict[int, str] = {}  # who has which recipe in its live model
        self._deaths = Counter[str]()

    @property
    def idle(self) -> list[int]:
        """The workers that have no job."""
        return [place for place in range(self.workers.count) if place not in self._at_work]

    @property
    def working(self) -> bool:
        """Whether a block is being asked."""
        return bool(self._at_work)

    def ends(self, split: Split) -> list[int]:
        """How many items of a split have been asked after each of its blocks."""
        return list(accumulate(map(len, self._blocks[split])))

    def answers(self, recipe: Recipe, split: Split, items: int | None = None) -> list[ItemResult]:
        """One answer per item of the split, in scoring order; asked now, if they were not before.

        Args:
            recipe: Who is asked.
            split: What.
            items: How many of the first, rounded up to whole blocks; None: all.

        Raises:
            RecipeError: The recipe cannot be built.
            ObjectiveError: The model it makes gives no usable answer.
        """
        wanted, stored = self._first(split, items), self.store.answers(recipe.key, split)
        if any(number not in stored for number in wanted):
            self.ask([recipe], split, items)
            stored = self.store.answers(recipe.key, split)
        return [answer for number in wanted for answer in stored[number]]

    def ask(self, recipes: Iterable[Recipe], split: Split, items: int | None = None) -> None:
        """Have several recipes answer what they have not yet; see ``answers``.

        Raises:
            RecipeError, ObjectiveError: Of the first recipe that fails; others may be unanswered.
        """
        left = {
            Block(recipe.key, split, number): recipe
            for recipe in recipes
            for number in self.lacking(recipe, split, items)
        }
        if not left:  # others may be at work meanwhile
            return
        failed: Exception | None = None
        while (left and not failed) or self.working:
            while left and self.idle and not failed:
                block = self._next_of(left)
                self.begin(left.pop(block), split, block.number)
            _, error = self.finish()
            failed = failed or error
        if failed:
            raise failed

    def _next_of(self, left: Iterable[Block]) -> Block:
        """Whose recipe an idle worker has built, or else nobody has, or else the first."""
        idle = {self._built.get(place) for place in self.idle}
        others = {block.recipe for block, _ in self._at_work.values()}
        return min(left, key=lambda one: (one.recipe not in idle, one.recipe in others))

    def lacking(self, recipe: Recipe, split: Split, items: int | None = None) -> list[int]:
        """The blocks of the split's first items that a recipe has not answered."""
        stored = self.store.blocks(recipe.key, split)
        return [number for number in self._first(split, items) if number not in stored]

    def begin(self, recipe: Recipe, split: Split, number: int) -> Block:
        """Give a block to an idle worker."""
        place = min(self.idle, key=lambda place: self._built.get(place) != recipe.key)
        block = Block(recipe.key, split, number)
        self._submit(place, block, EvalJob(recipe, self._blocks[split][number]))
        return block

    def _submit(self, place: int, block: Block, job: EvalJob) -> None:
        self._at_work[place], self._built[place] = (block, job), job.recipe.key
        self.workers.submit(place, job)

    def finish(self) -> tuple[Block, Exception | None]:
        """Wait for a block to end, and store its answers.

        Returns:
            The block, and why it has no answers, if it has none.

        Raises:
            KeyboardInterrupt: ``stopping`` was set; all blocks at work were stored before.
        """
        while True:
            place, outcome = self.workers.next()
            block, job = self._at_work.pop(place)
            if isinstance(outcome, WorkerDied):
                self._deaths[block.recipe] += 1
                if self._deaths[block.recipe] < DEATHS and not self.stopping:
                    self._submit(place, block, job)
                    continue
                outcome = ObjectiveError(f"it ended its worker {DEATHS} times: {outcome}")
            if isinstance(outcome, Exception):
                del self._built[place]
            else:
                self.build_seconds += outcome.build_seconds
                self.store.save(*block, outcome.answers, outcome.ask_seconds)
                self.on_block(len(outcome.answers))
            if not self.stopping:
                return block, outcome if isinstance(outcome, Exception) else None
            if not self.working:
                raise KeyboardInterrupt

    def abandon(self) -> None:
        """Wait for the blocks at work to end, and forget them."""
        while self._at_work:
            place, _ = self.workers.next()
            del self._at_work[place]

    def save(self, recipe: Recipe, out: Path, card: str) -> ExportCheck:
        """Have a recipe built once more, compared with its stored answers, saved with a card."""
        asked = [
            (EvalJob(recipe, self._blocks[split][number]), answers)
            for split in SPLITS
            for number, answers in sorted(self.store.answers(recipe.key, split).items())
        ]
        return self.workers.save(recipe, asked, out.absolute(), card)

    def _first(self, split: Split, items: int | None) -> range:
        """The numbers of the blocks that the first items of a split are in."""
        count = len(self._blocks[split])
        return range(count if items is None else min(count, math.ceil(items / self._size)))
