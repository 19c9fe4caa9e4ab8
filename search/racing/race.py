"""Who is asked more items: pure functions of answers, for a run and for its replay alike.

Everyone is asked the same items in the same order, so any two have a beginning in common on which
they are compared item by item. All noise is which items were drawn; pairing takes out the part of
it that is the items' difficulty.

A candidate is asked on as long as it may still end ahead of the best so far. Being stopped is no
verdict: its estimate says how sure it is, and whoever is believed in at the end is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Floats = NDArray[np.float64]

HOPE: Final = 0.05  # a candidate is asked on while its chance to end ahead is at least this
FRONT_HOPE: Final = 0.2  # the same in one task of several: each of them is another chance
PANEL: Final = 5
COMMON: Final = 1000.0  # variance of what is common to all, in that of one: far more than any
UNCERTAIN: Final = 1e6  # variance of a value of which nothing is known, in any unit


@dataclass(frozen=True)
class Estimate:
    """Of a weighted task mean, with the variance that the draw of its items gives it."""

    value: float
    variance: float


class Strata:
    """The tasks of n items in the order they are asked, and what the first of them say.

    Args:
        tasks: n names.
        weights: Of the tasks.
    """

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        self.weights, self.size = weights, len(tasks)
        names = np.array(tasks)
        self._of_task = [(weight, names == task) for task, weight in weights.items()]

    def moments(self, values: Floats) -> tuple[Floats, Floats]:
        """Weighted task means of several models on the same items, and how these vary together.

        Variances are reckoned with one answer of 0 and one of 1 more in each task: a few equal
        answers are not certainty. A task that has no item yet is left out.

        Args:
            values: (k, m), of the first m items.

        Returns:
            Means (k), and their covariance (k, k) over draws of the items.
        """
        k, m = values.shape
        means, covariance, total = np.zeros(k), np.zeros((k, k)), 0.0
        for weight, everywhere in self._of_task:
            of_task = values[:, everywhere[:m]]
            if count := of_task.shape[1]:
                mean = of_task.mean(axis=1)
                away = of_task - mean[:, None]
                means += weight * mean
                covariance += weight**2 * (away @ away.T + 0.5 * np.eye(k)) / (count + 2) / count
                total += weight
        return means / total, covariance / total**2

    def estimate(self, values: Floats) -> Estimate:
        """The weighted task mean of values (m) of the first m items, or of differences."""
        means, covariance = self.moments(values[None])
        return Estimate(float(means[0]), float(covariance[0, 0]))

    @cached_property
    def by_task(self) -> Mapping[str, Strata]:
        """Of each task's items alone."""
        return {
            task: Strata((task,) * int(of_task.sum()), {task: 1.0})
            for task, (_, of_task) in zip(self.weights, self._of_task, strict=True)
        }

    def parts(self, values: Floats) -> Mapping[str, Floats]:
        """Each task's values among those (..., m) of the first m items."""
        of_tasks = zip(self.weights, self._of_task, strict=True)
        return {task: values[..., which[: values.shape[-1]]] for task, (_, which) in of_tasks}


def ahead(strata: Strata, differences: Floats) -> float:
    """The chance that a mean which is ``differences`` (m) so far ends above zero after all items.

    The predictive chance of stochastic curtailment under a flat prior: Lan, Simon and Halperin
    1982, https://doi.org/10.1080/07474948208836014. It is a martingale, so that of the candidates
    stopped below a chance, over all looks, about that share at most would have ended ahead.
    """
    now = strata.estimate(differences)
    left = now.variance * (1 - len(differences) / strata.size)
    return float(ndtr(now.value / left**0.5)) if left else float(now.value > 0)


class Complete(NamedTuple):
    """A candidate that has answered all items."""

    shortfall: float
    mean: float
    answers: Floats


@dataclass
class Race:
    """The candidates of a search, one after another, against the best so far.

    Its state is a function of the answers it was given, in their order.

    Args:
        strata: Of all items.
        hope: As HOPE.
        panel: How many of the best complete candidates tell how difficult the items are.
        front: Whether who may end ahead of each of the best in some task has hope.
    """

    strata: Strata
    hope: float = HOPE
    panel: int = PANEL
    front: bool = False
    complete: list[Complete] = field(default_factory=list)  # best first; of one goal the panel

    def hopeful(self, answers: Floats) -> bool:
        """Whether a candidate with these answers (m) to the first items is to be asked more."""
        m = len(answers)
        if m in (0, self.strata.size) or not self.complete:
            return m < self.strata.size
        if not self.front:
            return ahead(self.strata, answers - self.complete[0].answers[:m]) >= self.hope
        return all(
            self._hopeful_in_a_task(answers - rival.answers[:m])
            for rival in self.complete
            if rival.shortfall == self.complete[0].shortfall
        )

    def _hopeful_in_a_task(self, differences: Floats) -> bool:
        return any(
            not len(part) or ahead(self.strata.by_task[task], part) >= FRONT_HOPE
            for task, part in self.strata.parts(differences).items()
        )

    def lead(self, answers: Floats) -> Estimate | None:
        """Of a candidate over the best so far, on the items (m) it has answered."""
        if not len(answers) or not self.complete:
            return None
        return self.strata.estimate(answers - self.complete[0].answers[: len(answers)])

    def finish(self, answers: Floats, shortfall: float = 0.0) -> Estimate:
        """Take the answers (m) of a candidate that is asked no more, and say what it is worth.

        The estimate is what the panel scores on all items, plus the difference to it on the items
        seen. Its variance is that of the difference: all else is common to all candidates.

        Args:
            answers: To the first items; the first candidate's to all.
            shortfall: By how much it misses its floors: who misses less is better.
        """
        if len(answers) == self.strata.size:
            mean = self.strata.estimate(answers).value
            self.complete.append(Complete(shortfall, mean, answers))
            self.complete.sort(key=lambda one: (one.shortfall, -one.mean))
            if not self.front:
                del self.complete[self.panel :]  # nobody is compared with them any more
        return _beside(self._of_panel, answers, self.strata)

    def by_task(self, answers: Floats) -> dict[str, Estimate]:
        """The same for each task alone; one without an item so far is taken to be the panel's."""
        panel = self.strata.parts(self._of_panel)
        return {
            task: _beside(panel[task], part, self.strata.by_task[task])
            for task, part in self.strata.parts(answers).items()
        }

    @property
    def _of_panel(self) -> Floats:
        """The panel's mean answers to all items."""
        mean: Floats = np.mean([one.answers for one in self.complete[: self.panel]], axis=0)
        return mean


def _beside(panel: Floats, answers: Floats, strata: Strata) -> Estimate:
    """What the panel scores on all items (n), plus the difference to it on the first (m)."""
    whole = strata.estimate(panel).value
    if not len(answers):
        return Estimate(whole, UNCERTAIN)
    difference = strata.estimate(answers - panel[: len(answers)])
    return Estimate(whole + difference.value, difference.variance)


@dataclass(frozen=True)
class JointPosterior:
    """Of k candidates' values: a normal distribution.

    Args:
        means: (k).
        covariance: (k, k).
    """

    means: Floats
    covariance: Floats

    @classmethod
    def vague(cls, count: int) -> JointPosterior:
        """Of values of which nothing is known."""
        return cls(np.zeros(count), UNCERTAIN * np.eye(count))

    def __getitem__(self, some: Sequence[int]) -> JointPosterior:
        return JointPosterior(self.means[some], self.covariance[np.ix_(some, some)])

    def given(self, means: Floats, covariance: Floats) -> JointPosterior:
        """After new items gave these means (k) with this covariance (k, k).

        Only differences count: how difficult the new items are is common to all.
        """
        noise = covariance + COMMON * np.trace(self.covariance + covariance) / len(means)
        gain = np.linalg.solve(self.covariance + noise, self.covariance).T
        return JointPosterior(
            self.means + gain @ (means - self.means), self.covariance - gain @ self.covariance
        )

    def ranked(self, shortfalls: Sequence[float]) -> list[int]:
        """All k from best to worst: who misses the floors less first, then by mean."""
        places = range(len(self.means))
        return sorted(places, key=lambda one: (shortfalls[one], -self.means[one]))

    def above(self, one: int) -> Floats:
        """The chance of each (k) to be better than one of them, whose own is a half."""
        c = self.covariance
        variance = np.maximum(np.diag(c) + c[one, one] - 2 * c[one], 1e-12)
        chances: Floats = ndtr((self.means - self.means[one]) / np.sqrt(variance))
        return chances


def elect(
    belief: JointPosterior,
    strata: Strata,
    ask: Callable[[Sequence[int], int], Floats],
    ends: Sequence[int],
    *,
    budget: float = math.inf,
    shortfall: Callable[[int, int], float] = lambda one, end: 0.0,  # noqa: ARG005
) -> int:
    """Race a field of k candidates against one another: who falls behind is asked no more.

    Args:
        belief: Before they are asked these items.
        strata: Of the items.
        ask: Gives some candidates' answers (k, m) to the first m items.
        ends: Of the blocks that are asked in turn.
        budget: Item evaluations at most.
        shortfall: By how much a candidate misses its floors after so many items.

    Returns:
        The winner.
    """
    everyone = list(range(len(belief.means)))
    left = [everyone[i] for i in belief.ranked([shortfall(one, 0) for one in everyone])]
    start = 0
    for end in ends:
        budget -= len(left) * (end - start)
        if len(left) == 1 or budget < 0:
            break
        now = belief[left].given(*strata.moments(ask(left, end)))
        ranked = now.ranked([shortfall(one, end) for one in left])
        chances = now.above(ranked[0])
        left, start = [left[i] for i in ranked if chances[i] >= HOPE], end
    return left[0]
