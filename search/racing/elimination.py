"""Successive elimination: several candidates raced against one another, block by block.

Notation: k candidates, their values' joint posterior N(means (k), covariance (k, k)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import ndtr

from search.racing.race import STOP_BELOW, UNKNOWN_VARIANCE, Floats, Strata

COMMON: Final = 1000.0  # variance of the items' common difficulty, relative to a candidate's


@dataclass(frozen=True)
class JointPosterior:
    """A normal distribution of k candidates' values."""

    means: Floats  # (k)
    covariance: Floats  # (k, k)

    @classmethod
    def vague(cls, count: int) -> JointPosterior:
        """Return an uninformative posterior."""
        return cls(np.zeros(count), UNKNOWN_VARIANCE * np.eye(count))

    def __getitem__(self, some: Sequence[int]) -> JointPosterior:
        return JointPosterior(self.means[some], self.covariance[np.ix_(some, some)])

    def update(self, means: Floats, covariance: Floats) -> JointPosterior:
        """Condition on fresh items that gave these means (k) with this covariance (k, k).

        Only differences count: the difficulty of the fresh items is common to all candidates.
        """
        noise = covariance + COMMON * np.trace(self.covariance + covariance) / len(means)
        gain = np.linalg.solve(self.covariance + noise, self.covariance).T
        return JointPosterior(
            self.means + gain @ (means - self.means), self.covariance - gain @ self.covariance
        )

    def ranked(self, violations: Sequence[float]) -> list[int]:
        """List all k, feasible first: by constraint violation, then by posterior mean."""
        indices = range(len(self.means))
        return sorted(indices, key=lambda one: (violations[one], -self.means[one]))

    def prob_better_than(self, one: int) -> Floats:
        """Compute each candidate's probability (k) of being better than one of them."""
        c = self.covariance
        variance = np.maximum(np.diag(c) + c[one, one] - 2 * c[one], 1e-12)
        chances: Floats = ndtr((self.means - self.means[one]) / np.sqrt(variance))
        return chances


def successive_elimination(
    posterior: JointPosterior,
    strata: Strata,
    evaluate: Callable[[Sequence[int], int], Floats],
    ends: Sequence[int],
    *,
    budget: float = math.inf,
    violation: Callable[[int, int], float] = lambda one, end: 0.0,  # noqa: ARG005
) -> int:
    """Evaluate k candidates block by block, dropping those that fall behind the leader.

    A candidate is dropped when its posterior probability of beating the leader is below STOP_BELOW.

    ``evaluate`` gives some candidates' values (k, m) on the first m items; ``ends`` is how many
    items have been evaluated after each block; ``violation`` is a candidate's after so many items.

    Returns:
        Index of the survivor that leads.
    """
    everyone = list(range(len(posterior.means)))
    left = [everyone[i] for i in posterior.ranked([violation(one, 0) for one in everyone])]
    start = 0
    for end in ends:
        budget -= len(left) * (end - start)
        if len(left) == 1 or budget < 0:
            break
        now = posterior[left].update(*strata.moments(evaluate(left, end)))
        ranked = now.ranked([violation(one, end) for one in left])
        chances = now.prob_better_than(ranked[0])
        left, start = [left[i] for i in ranked if chances[i] >= STOP_BELOW], end
    return left[0]
