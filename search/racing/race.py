"""Racing: after each block of items, decide whether a candidate is evaluated further.

Pure functions of per-item scores. All candidates are evaluated on the same items in one order, so
any two can be compared item by item. The only noise is which items were drawn, and pairing
removes the part of it that is due to their difficulty. Stopping a candidate is no verdict on it:
its estimate carries its variance, and the finalists are evaluated on fresh items.

Notation: n items in all, the first m of them evaluated, k candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STOP_BELOW: Final = 0.05  # probability of ending ahead of the incumbent
STOP_BELOW_PER_TASK: Final = 0.2  # the same in one task of several: each is another chance
PANEL: Final = 5  # best candidates, whose mean scores measure the items' difficulty
UNKNOWN_VARIANCE: Final = 1e6  # of an unknown value, in any unit


class Estimate(NamedTuple):
    """A weighted task mean, and its variance over draws of the items."""

    value: float
    variance: float


class Strata:
    """The tasks of n items, in evaluation order, as strata of a sample."""

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        self.weights, self.size = weights, len(tasks)
        names = np.array(tasks)
        self._of_task = [(weight, names == task) for task, weight in weights.items()]

    def moments(self, values: Floats) -> tuple[Floats, Floats]:
        """Compute weighted task means of several models on the same items, and their covariance.

        Variances are computed with one score of 0 and one of 1 added in each task, because a few
        equal scores are not certainty. Tasks without an item so far are left out.

        Args:
            values: (k, m), on the first m items.

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
        """Estimate the weighted task mean from values (m) on the first m items."""
        means, covariance = self.moments(values[None])
        return Estimate(float(means[0]), float(covariance[0, 0]))

    @cached_property
    def by_task(self) -> Mapping[str, Strata]:
        """Strata of each task's items alone."""
        return {
            task: Strata((task,) * int(of_task.sum()), {task: 1.0})
            for task, (_, of_task) in zip(self.weights, self._of_task, strict=True)
        }

    def parts(self, values: Floats) -> Mapping[str, Floats]:
        """Split values (..., m) on the first m items into those of each task."""
        of_tasks = zip(self.weights, self._of_task, strict=True)
        return {task: values[..., which[: values.shape[-1]]] for task, (_, which) in of_tasks}


def prob_ahead(strata: Strata, differences: Floats) -> float:
    """Compute the probability that a mean difference ends above zero after all n items.

    The predictive probability of stochastic curtailment under a flat prior: Lan, Simon and Halperin
    1982, https://doi.org/10.1080/07474948208836014. It is a martingale, so among the candidates
    stopped below a probability, at any look, about that share at most would have ended ahead.

    ``differences`` (m) are those on the first m items.
    """
    from scipy.special import ndtr  # slow to import

    now = strata.estimate(differences)
    left = now.variance * (1 - len(differences) / strata.size)
    return float(ndtr(now.value / left**0.5)) if left else float(now.value > 0)


class FullyEvaluated(NamedTuple):
    """A candidate that was evaluated on all items."""

    violation: float
    mean: float
    values: Floats


class Race:
    """Race of a search's candidates, each against the incumbent.

    The state depends only on the recorded scores and their order. With ``front``, a candidate
    continues while it may still beat each of the best recipes on some task.
    """

    def __init__(self, strata: Strata, *, front: bool = False) -> None:
        self.strata, self.front = strata, front
        self.evaluated: list[FullyEvaluated] = []  # best first; with one objective the panel alone

    def should_continue(self, values: Floats) -> bool:
        """Decide whether to evaluate a candidate further, given its values (m) so far.

        True while P(its mean on all items > the incumbent's | the first m items) >= STOP_BELOW.
        """
        m = len(values)
        if m in (0, self.strata.size) or not self.evaluated:
            return m < self.strata.size
        if not self.front:
            return prob_ahead(self.strata, values - self.evaluated[0].values[:m]) >= STOP_BELOW
        return all(
            self._may_win_a_task(values - rival.values[:m])
            for rival in self.evaluated
            if rival.violation == self.evaluated[0].violation
        )

    def _may_win_a_task(self, differences: Floats) -> bool:
        return any(
            not len(part) or prob_ahead(self.strata.by_task[task], part) >= STOP_BELOW_PER_TASK
            for task, part in self.strata.parts(differences).items()
        )

    def lead(self, values: Floats) -> Estimate | None:
        """Estimate a candidate's lead over the incumbent on the items (m) both have."""
        if not len(values) or not self.evaluated:
            return None
        return self.strata.estimate(values - self.evaluated[0].values[: len(values)])

    def record(self, values: Floats, violation: float = 0.0) -> Estimate:
        """Add a stopped or fully evaluated candidate, and estimate its score on all items.

        The estimate is the reference panel's mean on all items, plus the paired difference to it on
        the items seen. Its variance is that of the difference: all else is common to all.

        ``values`` (m) are on the first m items; the first candidate's are on all.
        """
        if len(values) == self.strata.size:
            mean = self.strata.estimate(values).value
            self.evaluated.append(FullyEvaluated(violation, mean, values))
            self.evaluated.sort(key=lambda one: (one.violation, -one.mean))
            if not self.front:
                del self.evaluated[PANEL:]  # not needed for comparisons any more
        return _relative_to_panel(self._panel_values, values, self.strata)

    def by_task(self, values: Floats) -> dict[str, Estimate]:
        """Estimate each task's score like ``record``; tasks without items get the panel's score."""
        panel = self.strata.parts(self._panel_values)
        return {
            task: _relative_to_panel(panel[task], part, self.strata.by_task[task])
            for task, part in self.strata.parts(values).items()
        }

    @property
    def _panel_values(self) -> Floats:
        mean: Floats = np.mean([one.values for one in self.evaluated[:PANEL]], axis=0)
        return mean


def _relative_to_panel(panel: Floats, values: Floats, strata: Strata) -> Estimate:
    """Add the paired difference on the first m items to the panel's mean on all n."""
    whole = strata.estimate(panel).value
    if not len(values):
        return Estimate(whole, UNKNOWN_VARIANCE)
    difference = strata.estimate(values - panel[: len(values)])
    return Estimate(whole + difference.value, difference.variance)
