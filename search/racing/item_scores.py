"""Per-item scores of one recipe, their means, and the constraint violation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from objectives.base import Item, ItemResult
from objectives.scores import Interval, paired_bootstrap, task_means, weighted_mean
from search.racing.race import Floats


@dataclass(frozen=True)
class ItemScores:
    """Scores of one recipe on some items."""

    values: tuple[float, ...]  # one per item
    tasks: tuple[str, ...]  # task of each item
    weights: Mapping[str, float]  # of the tasks in the mean
    # Tokens generated for each item; None for an item that is not answered by generated text.
    tokens: tuple[int | None, ...] = ()

    @classmethod
    def of(
        cls, items: Sequence[Item], results: Sequence[ItemResult], weights: Mapping[str, float]
    ) -> ItemScores:
        """Collect the results of items, one for each."""
        pairs = zip(items, results, strict=True)
        return cls(
            tuple(result.value for result in results),
            tuple(item.task for item in items),
            weights,
            tuple(result.tokens if item.generated else None for item, result in pairs),
        )

    def __add__(self, other: ItemScores) -> ItemScores:
        return ItemScores(
            self.values + other.values,
            self.tasks + other.tasks,
            self.weights,
            self.tokens + other.tokens,
        )

    @property
    def array(self) -> Floats:
        """The values as an array (m)."""
        return np.array(self.values, dtype=np.float64)

    @property
    def by_task(self) -> dict[str, float]:
        """Mean of each task."""
        return task_means(self.values, self.tasks)

    @property
    def mean(self) -> float:
        """Weighted mean over the tasks."""
        return weighted_mean(self.by_task, self.weights)

    @property
    def mean_tokens(self) -> float | None:
        """Mean number of tokens generated for an item; None where no text is generated."""
        counts = [count for count in self.tokens if count is not None]
        return sum(counts) / len(counts) if counts else None

    def minus(self, other: ItemScores, seed: int) -> Interval:
        """Estimate the paired difference on the same items, with a 95 % bootstrap interval."""
        return paired_bootstrap(self.values, other.values, self.tasks, self.weights, seed=seed)


def constraint_violation(
    scores: ItemScores, floors: Mapping[str, float], max_tokens: float | None = None
) -> float:
    """Sum the shortfalls of task means below their floors; 0 if all limits are met.

    Mean tokens above ``max_tokens`` add the relative excess. Tasks without items are left out.
    """
    means = scores.by_task
    short = [floor - means[task] for task, floor in floors.items() if task in means]
    if max_tokens is not None and scores.mean_tokens is not None:
        short.append(scores.mean_tokens / max_tokens - 1)
    return sum(max(0.0, by) for by in short)
