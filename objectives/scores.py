"""Per-item values to means and intervals: small pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from objectives.base import ObjectiveError

_CHUNK = 1 << 20  # resampled values held at once: 8 MB of indices and as much of values


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval, all in the unit of the values."""

    mean: float
    low: float
    high: float


def task_means(values: Sequence[float], tasks_of_items: Sequence[str]) -> dict[str, float]:
    """Mean value of each task, tasks in order of first appearance.

    Args:
        values: n item values.
        tasks_of_items: n task names.
    """
    return {
        task: float(of_task.mean()) for task, of_task in _by_task(values, tasks_of_items).items()
    }


def weighted_mean(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The study's mean: ``sum_t w_t m_t / sum_t w_t``.

    Raises:
        ObjectiveError: The tasks of the means are not the tasks of the weights, or the weights
            do not sum to more than zero.
    """
    shares = _shares(weights, means)
    return sum(shares[task] * mean for task, mean in means.items())


def bootstrap(
    values: Sequence[float],
    tasks_of_items: Sequence[str],
    weights: Mapping[str, float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the weighted task mean, items resampled within each task.

    Args:
        values: n item values.
        tasks_of_items: n task names.
        weights: Weight of each task, of any scale.
        resamples: Bootstrap replicates.
        seed: The same seed gives the same interval.

    Returns:
        The weighted mean and its 95 % interval.

    Raises:
        ObjectiveError: As ``weighted_mean``, or lengths differ, or there are no values.
    """
    by_task = _by_task(values, tasks_of_items)
    shares = _shares(weights, by_task)
    generator = np.random.default_rng(seed)
    replicates = np.zeros(resamples)
    for task, of_task in by_task.items():
        replicates += shares[task] * _resampled_means(of_task, resamples, generator)
    low, high = np.quantile(replicates, [0.025, 0.975])
    mean = sum(shares[task] * float(of_task.mean()) for task, of_task in by_task.items())
    return Interval(mean, float(low), float(high))


def score_interval(
    values: Sequence[float],
    tasks_of_items: Sequence[str],
    weights: Mapping[str, float],
    *,
    seed: int = 0,
) -> Interval:
    """The weighted task mean of one model, with a 95 % interval that has width at the edge.

    Where all values of a task are 0 or 1 it is Wilson's (1927,
    https://doi.org/10.1080/01621459.1927.10502953): a bootstrap of 90 right answers to 90 items
    would claim certainty. Other tasks have the bootstrap's. The ends l_t of the tasks are put
    together as ``l = m - sqrt(sum_t w_t^2 (m_t - l_t)^2)``, the upper ones likewise: Zou and
    Donner 2008, https://doi.org/10.1002/sim.3095.

    Raises:
        ObjectiveError: As ``bootstrap``.
    """
    by_task = _by_task(values, tasks_of_items)
    shares = _shares(weights, by_task)
    mean = below = above = 0.0
    for task, of_task in by_task.items():
        found = _wilson(of_task) or bootstrap(
            of_task.tolist(), [task] * len(of_task), {task: 1.0}, seed=seed
        )
        mean += shares[task] * found.mean
        below += (shares[task] * (found.mean - found.low)) ** 2
        above += (shares[task] * (found.high - found.mean)) ** 2
    return Interval(mean, mean - below**0.5, mean + above**0.5)


def _wilson(values: NDArray[np.float64]) -> Interval | None:
    """Wilson's interval of a share, if the values are of one."""
    if not np.isin(values, (0.0, 1.0)).all():
        return None
    n, share, z = len(values), float(values.mean()), 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    side = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = min(share, middle - side), max(share, middle + side)  # the edge is met exactly
    return Interval(share, max(0.0, low), min(1.0, high))


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    tasks_of_items: Sequence[str],
    weights: Mapping[str, float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """``bootstrap`` of ``first - second``, two models' values on the same n items.

    Raises:
        ObjectiveError: As ``bootstrap``.
    """
    if len(first) != len(second):
        raise ObjectiveError(
            f"paired values: got {len(first)} and {len(second)}; score both on the same items"
        )
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap(difference.tolist(), tasks_of_items, weights, resamples=resamples, seed=seed)


def _by_task(
    values: Sequence[float], tasks_of_items: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    if not len(values) == len(tasks_of_items) > 0:
        raise ObjectiveError(
            f"got {len(values)} values for {len(tasks_of_items)} items; give one value per item, "
            "and at least one"
        )
    array = np.asarray(values, dtype=np.float64)
    names = np.asarray(tasks_of_items)
    return {task: array[names == task] for task in dict.fromkeys(tasks_of_items)}


def _shares(weights: Mapping[str, float], tasks: Mapping[str, object]) -> dict[str, float]:
    """The weights scaled to sum to one."""
    if weights.keys() != tasks.keys():
        raise ObjectiveError(
            f"weights are for {sorted(weights)} but values for {sorted(tasks)}; "
            "give every task one weight and at least one value"
        )
    total = sum(weights.values())
    if total <= 0:
        raise ObjectiveError(f"weights {dict(weights)} sum to {total}; make one larger")
    return {task: weight / total for task, weight in weights.items()}


def _resampled_means(
    values: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Means of ``resamples`` draws with replacement, in chunks of bounded memory."""
    rows = max(1, _CHUNK // len(values))
    means = [
        values[
            generator.integers(len(values), size=(min(rows, resamples - start), len(values)))
        ].mean(axis=1)  # (rows, n) -> (rows,)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)
