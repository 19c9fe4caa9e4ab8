"""Means and 95 % intervals of per-item values: pure functions of numbers.

Notation: n items; task t has weight w_t, mean m_t and interval [l_t, u_t].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from objectives.base import ObjectiveError

_CHUNK = 1 << 20  # resampled values held at once: 8 MB of indices and as much of values


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def task_means(values: Sequence[float], tasks_of_items: Sequence[str]) -> dict[str, float]:
    """Return the mean value of each task, tasks in order of first appearance."""
    by_task = _by_task(values, tasks_of_items)
    return {task: float(of_task.mean()) for task, of_task in by_task.items()}


def weighted_mean(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the study's mean, ``sum_t w_t m_t / sum_t w_t``.

    Raises:
        ObjectiveError: Means and weights are not of the same tasks, or the weights do not sum
            to more than zero.
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
    """Return the percentile bootstrap of the weighted mean, items resampled within each task.

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
    """Return one model's weighted mean, with an interval that has width at 0 and 1 too.

    A task whose values are all 0 or 1 has Wilson's interval (1927,
    https://doi.org/10.1080/01621459.1927.10502953): a bootstrap of 90 correct answers to 90 items
    would claim certainty. Other tasks have the bootstrap's. The tasks' lower ends combine to
    ``l = m - sqrt(sum_t w_t^2 (m_t - l_t)^2)`` (weights summing to 1), the upper ends likewise:
    Zou and Donner 2008, https://doi.org/10.1002/sim.3095.

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
    """Return Wilson's interval of a proportion; None unless all values are 0 or 1."""
    if not np.isin(values, (0.0, 1.0)).all():
        return None
    from scipy.stats import binomtest  # slow to import, and needed at a run's end alone

    found = binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return Interval(float(values.mean()), float(found.low), float(found.high))


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    tasks_of_items: Sequence[str],
    weights: Mapping[str, float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return ``bootstrap`` of ``first - second``, two models' values on the same n items."""
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
    """Return the means of ``resamples`` draws with replacement, in chunks of bounded memory."""
    rows = max(1, _CHUNK // len(values))
    means = [
        values[
            generator.integers(len(values), size=(min(rows, resamples - start), len(values)))
        ].mean(axis=1)  # (rows, n) -> (rows,)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)
