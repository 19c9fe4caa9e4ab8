"""A recipe's answers: from the database if they are there, else by building it and asking."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from merge_engine.recipe import Recipe
from objectives.base import Answer
from objectives.items import blocks
from search.bench import Bench
from search.spec import Split
from search.storage import Store


class Scorer:
    """The one worker of a run: owns the live model and answers (recipe, split).

    Args:
        bench: What to build and ask with.
        store: Where finished blocks go.
        on_block: Called after each block that had to be asked.
    """

    def __init__(
        self, bench: Bench, store: Store, on_block: Callable[[], None] = lambda: None
    ) -> None:
        self.bench = bench
        self.store = store
        self.on_block = on_block
        self.build_seconds = 0.0

    def answers(self, recipe: Recipe, split: Split, items: int | None = None) -> list[Answer]:
        """One answer per item of the split, in scoring order.

        Args:
            recipe: Who is asked.
            split: What.
            items: How many of the first, rounded up to whole blocks; None: all.

        Raises:
            RecipeError: The recipe cannot be built.
            ObjectiveError: The model it makes gives no usable answer.
        """
        stored = self.store.answers(recipe.key, split)
        answers: list[Answer] = []
        for number, block in enumerate(self.blocks(split)):
            if items is not None and len(answers) >= items:
                break
            answers += (
                stored[number] if number in stored else self._ask(recipe, split, number, block)
            )
        return answers

    def _ask(
        self, recipe: Recipe, split: Split, number: int, block: tuple[int, ...]
    ) -> list[Answer]:
        """Answer one block and store it."""
        self._build(recipe)
        start = time.perf_counter()
        answers = self.bench.objective.score(self.bench.builder.model, block)
        self.store.save(recipe.key, split, number, answers, time.perf_counter() - start)
        self.on_block()
        return answers

    def check(self, recipe: Recipe) -> int:
        """Build the recipe again and compare every value with the database's.

        Where judging failed, now or then, there is nothing to compare: a time limit was in play.

        Returns:
            How many items were compared.

        Raises:
            RuntimeError: An answer differs: what would be exported is not what was scored.
        """
        self.bench.builder.loaded = None
        compared = 0
        splits: tuple[Split, ...] = ("search", "select", "test")
        for split in splits:
            stored = self.store.answers(recipe.key, split)
            for number, block in enumerate(self.blocks(split)):
                if number not in stored:
                    continue
                self._build(recipe)
                again = self.bench.objective.score(self.bench.builder.model, block)
                if not _same(again, stored[number]):
                    raise RuntimeError(f"{split} block {number}: rebuilt recipe answers otherwise")
                compared += len(block)
        return compared

    def _build(self, recipe: Recipe) -> None:
        loaded = self.bench.builder.loaded
        if loaded is None or loaded.key != recipe.key:
            start = time.perf_counter()
            self.bench.builder.build(recipe)
            self.build_seconds += time.perf_counter() - start

    def blocks(self, split: Split) -> tuple[tuple[int, ...], ...]:
        """The split's item numbers, in the blocks that are asked at once."""
        return blocks(getattr(self.bench.splits, split), self.bench.spec.objective.block)


def _same(ones: Sequence[Answer], others: Sequence[Answer]) -> bool:
    return all(
        one.value == other.value or one.fault is not None or other.fault is not None
        for one, other in zip(ones, others, strict=True)
    )
