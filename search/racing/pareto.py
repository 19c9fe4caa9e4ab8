"""The front: recipes of which none beats another on every task; pure functions of what was said.

Values are noisy, so the front is that of what is believed of each task, first from the search and
then with fresh items; only items asked after that say how good its recipes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from search.proposing.gp import believed
from search.proposing.space import Point, Space
from search.racing.race import Floats, JointPosterior, Strata


def believed_front(
    space: Space, points: Sequence[Point], estimates: Mapping[str, Floats], most: int
) -> tuple[list[int], dict[str, JointPosterior]]:
    """The front as the search believes it.

    Args:
        space: That was searched.
        points: n.
        estimates: Of each task: the points' values and variances, (n, 2).
        most: Points on it at most.

    Returns:
        The places of its k points, and what is believed of them in each task.
    """
    beliefs = {task: believed(space, points, *of_task.T) for task, of_task in estimates.items()}
    means = np.stack([belief.means for belief in beliefs.values()], axis=1)
    front = nondominated(means)
    front = [front[place] for place in widest(means[front], most)]
    return front, {task: belief[front] for task, belief in beliefs.items()}


def leading(values: Floats, most: int) -> list[int]:
    """Places of ``most`` of the rows (n, goals) at most: every goal's best, its second, ..."""
    order = np.argsort(-values, axis=0, kind="stable").ravel().tolist()
    return sorted(islice(dict.fromkeys(order), most))


def confirmed(beliefs: Mapping[str, JointPosterior], strata: Strata, answers: Floats) -> list[int]:
    """Places of those of k that are still on the front after answers (k, m) to fresh items."""
    parts = strata.parts(answers)
    after = [
        belief.given(*strata.by_task[task].moments(parts[task])).means
        for task, belief in beliefs.items()
    ]
    return nondominated(np.stack(after, axis=1))


def nondominated(values: Floats) -> list[int]:
    """Places of the rows (n, goals) that no other beats in one column and in none falls behind."""
    level = (values[:, None] >= values[None]).all(axis=2)
    beats = level & (values[:, None] > values[None]).any(axis=2)
    return np.flatnonzero(~beats.any(axis=0)).tolist()


def widest(values: Floats, most: int) -> list[int]:
    """Places of ``most`` rows (n, goals), each in turn the one that adds most to what they beat.

    That is the hypervolume above the lowest values, by 4,096 points: Zitzler and Thiele 1998,
    https://doi.org/10.1007/BFb0056872; taken greedily it is within 1 - 1/e of the best.
    """
    from scipy.stats.qmc import Sobol  # slow to import

    low, high = values.min(axis=0), values.max(axis=0)
    points = low + (high - low) * Sobol(values.shape[1], rng=0).random(4096)
    beats = (points[None] <= values[:, None]).all(axis=2)  # (n, points)
    places: list[int] = []
    left = np.ones(len(points), dtype=bool)
    while len(places) < min(most, len(values)):
        gains = (beats & left).sum(axis=1)
        gains[places] = -1
        places.append(int(gains.argmax()))
        left &= ~beats[places[-1]]
    return sorted(places)
