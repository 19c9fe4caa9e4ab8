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

from objectives.scores import Interval, paired_bootstrap, task_means, weighted_mean
from search.racing import Strata

SELECT_SHARE = 0.25  # item evaluations to choose the winner with, per one of the search


@dataclass(frozen=True)
class Sheet:
    """Answers of one recipe to some items, with the items' tasks and the tasks' weights."""

    answers: tuple[float, ...]
    tasks: tuple[str, ...]
    weights: Mapping[str, float]

    def __add__(self, other: Sheet) -> Sheet:
        """Both sheets' items together."""
        return Sheet(self.answers + other.answers, self.tasks + other.tasks, self.weights)

    @property
    def by_task(self) -> dict[str, float]:
        """Each task's mean."""
        return task_means(self.answers, self.tasks)

    @property
    def mean(self) -> float:
        """The study's weighted mean over tasks."""
        return weighted_mean(self.by_task, self.weights)

    def minus(self, other: Sheet, seed: int) -> Interval:
        """This sheet less another on the same items: paired, with a 95 % bootstrap interval."""
        return paired_bootstrap(self.answers, other.answers, self.tasks, self.weights, seed=seed)


def shortfall(sheet: Sheet, floors: Mapping[str, float]) -> float:
    """By how much the tasks with items miss their floors, summed; 0 when all are met."""
    means = sheet.by_task
    return sum(max(0.0, floor - means[task]) for task, floor in floors.items() if task in means)


def items_to_decide(winner: Sheet, other: Sheet) -> int | None:
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
