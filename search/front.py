"""The front: recipes of which none beats another on every task; pure functions of what was said.

Values are noisy, so the front is that of what is believed of each task, first from the search and
then with fresh items; only items asked after that say how good its recipes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from search.gaussian import believed
from search.racing import Belief, Floats, Strata
from search.space import Point, Space


def believed_front(
    space: Space, points: Sequence[Point], estimates: Mapping[str, Floats], most: int
) -> tuple[list[int], dict[str, Belief]]:
    """The front as the search believes it.

    Args:
        space: That was searched.
        points: n.
        estimates: Of each task: the points' values and variances, (n, 2).
        most: Points on it at most, lying apart.

    Returns:
        The places of its k points, and what is believed of them in each task.
    """
    beliefs = {task: believed(space, points, *of_task.T) for task, of_task in estimates.items()}
    means = np.stack([belief.means for belief in beliefs.values()], axis=1)
    front = nondominated(means)
    front = [front[place] for place in spread_out(means[front], most)]
    return front, {task: belief[front] for task, belief in beliefs.items()}


def confirmed(beliefs: Mapping[str, Belief], strata: Strata, answers: Floats) -> list[int]:
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


def spread_out(values: Floats, most: int) -> list[int]:
    """Places of ``most`` rows (n, goals) that lie apart: the most crowded leave, one by one.

    Crowding distance: Deb et al. 2002, https://doi.org/10.1109/4235.996017.
    """
    places = list(range(len(values)))
    while len(places) > most:
        left = values[places]
        distance = np.zeros(len(left))
        for goal in left.T:
            order = np.argsort(goal, kind="stable")
            gaps = np.diff(goal[order]) / (np.ptp(goal) or 1.0)
            distance[order] += np.concatenate([[np.inf], gaps[1:] + gaps[:-1], [np.inf]])
        del places[int(np.argmin(distance))]
    return places
