"""The Pareto front of several tasks: recipes of which none beats another on every task.

Scores are noisy, so the front is that of posterior means of each task, first from the search and
then with fresh items; only items evaluated after that say how good its recipes are.

Notation: n candidates, of which k are on the front; one column of values per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import numpy as np

from search.racing.elimination import JointPosterior
from search.racing.race import Floats, Strata


def posterior_front(posteriors: Mapping[str, JointPosterior], most: int) -> list[int]:
    """Find the front of posterior means.

    At most ``most`` of them: those that span the largest hypervolume.

    Returns:
        Indices of the candidates on the front.
    """
    means = np.stack([posterior.means for posterior in posteriors.values()], axis=1)
    front = nondominated(means)
    return [front[index] for index in largest_hypervolume(means[front], most)]


def leading(values: Floats, most: int) -> list[int]:
    """List ``most`` of the rows (n, tasks) at most: every task's best, its second, ..."""
    order = np.argsort(-values, axis=0, kind="stable").ravel().tolist()
    return sorted(islice(dict.fromkeys(order), most))


def confirmed(
    posteriors: Mapping[str, JointPosterior], strata: Strata, values: Floats
) -> list[int]:
    """List those of k candidates that are still on the front after values (k, m) on fresh items."""
    parts = strata.parts(values)
    after = [
        posterior.update(*strata.by_task[task].moments(parts[task])).means
        for task, posterior in posteriors.items()
    ]
    return nondominated(np.stack(after, axis=1))


def nondominated(values: Floats) -> list[int]:
    """List the rows (n, tasks) that no other equals everywhere and exceeds somewhere."""
    level = (values[:, None] >= values[None]).all(axis=2)
    beats = level & (values[:, None] > values[None]).any(axis=2)
    return np.flatnonzero(~beats.any(axis=0)).tolist()


def largest_hypervolume(values: Floats, most: int) -> list[int]:
    """Choose ``most`` of the rows (n, tasks) whose hypervolume is largest, greedily.

    The hypervolume is the share of quasi-random points in the rows' bounding box that a chosen row
    dominates: Zitzler and Thiele 1998, https://doi.org/10.1007/BFb0056872; taken greedily it is
    within 1 - 1/e of the best.
    """
    from scipy.stats.qmc import Sobol  # slow to import

    low, high = values.min(axis=0), values.max(axis=0)
    points = low + (high - low) * Sobol(values.shape[1], rng=0).random(4096)
    dominated = (points[None] <= values[:, None]).all(axis=2)  # (n, points)
    chosen: list[int] = []
    left = np.ones(len(points), dtype=bool)
    while len(chosen) < min(most, len(values)):
        gains = (dominated & left).sum(axis=1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        left &= ~dominated[chosen[-1]]
    return sorted(chosen)
