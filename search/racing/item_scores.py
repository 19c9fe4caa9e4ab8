"""Who wins, and is it true: pure functions of answers.

All noise is item sampling, so everyone is compared on the same items. The best search scores are
lucky ones; the few best are therefore asked fresh items, the winner is the best on both kinds
together, and only a third kind, asked once, says how good it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from objectives.base import Item, ItemResult
from objectives.scores import Interval, paired_bootstrap, task_means, weighted_mean
from search.racing.race import Floats, Strata

COST = "-tokens"  # as one more task without weight, minus the tokens of each written answer
SELECT_SHARE = 0.25  # item evaluations to choose the winner with, per one of the search


@dataclass(frozen=True)
class ItemScores:
    """Answers of one recipe to some items, with the items' tasks and the tasks' weights.

    ``written`` has the number of tokens of each answer that the recipe's model wrote, else None.
    """

    answers: tuple[float, ...]
    tasks: tuple[str, ...]
    weights: Mapping[str, float]
    written: tuple[int | None, ...] = ()

    @classmethod
    def of(
        cls, items: Sequence[Item], answers: Sequence[ItemResult], weights: Mapping[str, float]
    ) -> ItemScores:
        """The answers to items."""
        pairs = zip(items, answers, strict=True)
        return cls(
            tuple(answer.value for answer in answers),
            tuple(item.task for item in items),
            weights,
            tuple(answer.tokens if item.generated else None for item, answer in pairs),
        )

    def __add__(self, other: ItemScores) -> ItemScores:
        """Both sheets' items together."""
        return ItemScores(
            self.answers + other.answers,
            self.tasks + other.tasks,
            self.weights,
            self.written + other.written,
        )

    @property
    def by_task(self) -> dict[str, float]:
        """Each task's mean."""
        return task_means(self.answers, self.tasks)

    @property
    def mean(self) -> float:
        """The study's weighted mean over tasks."""
        return weighted_mean(self.by_task, self.weights)

    @property
    def tokens(self) -> float | None:
        """The mean number of tokens written for an answer; None where none is written."""
        counts = [count for count in self.written if count is not None]
        return sum(counts) / len(counts) if counts else None

    @property
    def with_cost(self) -> Floats:
        """The values of ``tasks_with_cost``: answers, and behind each written one its ``COST``."""
        pairs = zip(self.answers, self.written, strict=True)
        both = ((value,) if count is None else (value, -float(count)) for value, count in pairs)
        return np.array([value for one in both for value in one])

    def minus(self, other: ItemScores, seed: int) -> Interval:
        """This sheet less another on the same items: paired, with a 95 % bootstrap interval."""
        return paired_bootstrap(self.answers, other.answers, self.tasks, self.weights, seed=seed)


def tasks_with_cost(items: Sequence[Item]) -> list[str]:
    """The task of each item, and ``COST`` behind that of each written one."""
    return [t for item in items for t in ((item.task, COST) if item.generated else (item.task,))]


def shortfall(sheet: ItemScores, floors: Mapping[str, float], most: float | None = None) -> float:
    """By how much the tasks with items miss their floors, summed; 0 when all are met.

    Tokens beyond ``most`` an answer, in the mean, count as a share of it.
    """
    means = sheet.by_task
    short = [floor - means[task] for task, floor in floors.items() if task in means]
    if most is not None and sheet.tokens is not None:
        short.append(sheet.tokens / most - 1)
    return sum(max(0.0, by) for by in short)


def items_to_decide(winner: ItemScores, other: ItemScores) -> int | None:
    """How many items would show a difference as large as this one, four times in five.

    ``n = 7.85 v / d^2``, with the difference d and v its variance per item; 7.85 is
    ``(1.96 + 0.84)^2``: a two-sided test at 5 % with a power of 80 %.

    Returns:
        None if these items have shown it, or if the winner is not ahead.
    """
    differences = np.subtract(winner.answers, other.answers)
    found = Strata(winner.tasks, winner.weights).estimate(differences)
    if found.value <= 0 or found.value > 1.96 * found.variance**0.5:
        return None
    return math.ceil(7.85 * found.variance * len(differences) / found.value**2)


def verdict(differences: Sequence[Interval]) -> Literal["better", "not better"]:
    """Better, if the winner beats every model it was merged from, each interval above zero.

    Requiring all of them needs no correction for looking at several: the claim fails as soon as
    one comparison does.
    """
    return "better" if differences and all(d.low > 0 for d in differences) else "not better"
