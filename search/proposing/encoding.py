"""Where recipes are: coordinates of what a recipe is, in which equal recipes coincide.

A point's parameters are not that: a method may not have one of them, or may depend on the ratio of
the weights alone. Many recipes are handled at once, as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution

from merge_engine.methods import METHODS, Base
from search.proposing.mixture import zero_small_weights
from search.proposing.space import Point, Space
from search.racing.race import Floats

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Candidates:
    """n candidates.

    Args:
        method: Place of each one's method among the space's, (n).
        weights: Of the k donors in each of the u units, (n, u, k).
        values: Of the p searched parameters, in units of their range, (n, p).
    """

    method: Ints
    weights: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.method)

    def __getitem__(self, rows: Any) -> Candidates:
        return Candidates(self.method[rows], self.weights[rows], self.values[rows])

    def __add__(self, other: Candidates) -> Candidates:
        return Candidates(
            np.concatenate([self.method, other.method]),
            np.concatenate([self.weights, other.weights]),
            np.concatenate([self.values, other.values]),
        )


@dataclass(frozen=True)
class RecipeEncoding:
    """The coordinates of a space's recipes: a method, and a vector of the same length for all.

    The vector is each unit's weights, on a log scale (``log(1 + w)``: the more of a task vector is
    added the less a step changes), and every searched parameter in units of its range. A parameter
    that a method has not stays at its default.

    Args:
        space: Whose recipes.
        groups: The group of each of the space's units, those in one have the same weights and are
            one unit here; none: each is its own.
    """

    space: Space
    groups: tuple[int, ...] = ()

    @cached_property
    def unit_of(self) -> tuple[int, ...]:
        """Our unit of each unit of the space's."""
        return self.groups or tuple(range(len(self.space.units)))

    @cached_property
    def searched(self) -> list[str]:
        """Names of the p parameters."""
        return [name for name, (low, high) in self.space.ranges.items() if low < high]

    def population(self, points: Sequence[Point]) -> Candidates:
        """The candidates that points stand for."""
        space = self.space
        values = [
            [
                (p[name] - low) / (high - low)
                for name, (low, high) in space.ranges.items()
                if low < high
            ]
            for p in points
        ]
        return Candidates(
            np.array([space.methods.index(point["method"]) for point in points], dtype=np.int64),
            self._grouped(space.weights(points)),
            np.array(values).reshape(len(points), len(self.searched)),
        )

    def point(self, one: Candidates) -> dict[str, Any]:
        """The point of a single candidate."""
        space = self.space
        values = {
            name: space.ranges[name][0] * (1 - share) + space.ranges[name][1] * share
            for name, share in zip(self.searched, one.values[0].tolist(), strict=True)
        }
        weights = one.weights[0][list(self.unit_of)]
        point = space.point_by_unit(space.methods[one.method[0]], weights.tolist(), values)
        return {  # rounding may have led out of a range
            name: min(max(point[name], of.low), of.high)
            if isinstance(of, FloatDistribution)
            else point[name]
            for name, of in space.distributions.items()
        }

    def random(self, count: int, generator: np.random.Generator) -> Candidates:
        """Uniform candidates, some of them without some of the donors."""
        units, k = max(self.unit_of) + 1, len(self.space.donors)
        shares = generator.exponential(size=(count, units, k))
        kept = generator.random((count, 1, k)) < generator.choice([0.5, 1.0, 1.0], (count, 1, 1))
        kept[np.arange(count), 0, generator.integers(k, size=count)] = True
        shares *= kept
        scale = generator.uniform(*self.space.scale, (count, units, 1))
        return Candidates(
            generator.integers(len(self.space.methods), size=count),
            zero_small_weights(k * scale * shares / shares.sum(axis=2, keepdims=True)),
            generator.random((count, len(self.searched))),
        )

    def near(self, some: Candidates, width: float, generator: np.random.Generator) -> Candidates:
        """A step from each: mostly of the weights, now and then to fewer donors or another method.

        Args:
            some: n candidates.
            width: Standard deviation of a weight's or a parameter's step.
            generator: Of the steps.

        Returns:
            n candidates.
        """
        rows = np.arange(len(some))
        weights = some.weights + width * generator.standard_normal(some.weights.shape)
        moved = np.where(generator.random((len(some), 1, 1)) < 0.8, weights, some.weights)
        dropped = rows[generator.random(len(some)) < 0.1]
        moved[dropped, :, generator.integers(moved.shape[2], size=len(dropped))] = 0.0
        values = some.values + width * generator.standard_normal(some.values.shape)
        swap = generator.random(len(some)) < 0.1
        other = generator.integers(len(self.space.methods), size=len(some))
        return Candidates(
            np.where(swap, other, some.method), self._allowed(moved), np.clip(values, 0.0, 1.0)
        )

    def of(self, some: Candidates) -> Floats:
        """Their coordinates, (n, u k + p)."""
        weights, values = np.empty_like(some.weights), np.empty_like(some.values)
        for number, name in enumerate(self.space.methods):
            rows = some.method == number
            weights[rows] = effective(name, some.weights[rows])
            values[rows] = np.where(self._active[number], some.values[rows], self._defaults)
        return np.hstack([np.log1p(weights).reshape(len(some), -1), values])

    def _grouped(self, weights: Floats) -> Floats:
        """Each of our units' mean of weights in the space's, (n, u, k)."""
        if not self.groups:
            return weights
        of_unit = np.array(self.groups)
        means = [weights[:, of_unit == unit].mean(axis=1) for unit in range(of_unit.max() + 1)]
        return np.stack(means, axis=1)

    def _allowed(self, weights: Floats) -> Floats:
        """Weights near these, at or above zero, whose mean is in the space's scale."""
        weights = zero_small_weights(np.maximum(weights, 0.0))
        scale = weights.mean(axis=2, keepdims=True)
        even = np.where(scale > 0, weights / np.where(scale > 0, scale, 1.0), 1.0)
        allowed: Floats = even * np.clip(scale, *self.space.scale)
        return allowed

    @cached_property
    def _active(self) -> list[list[bool]]:
        followed = [self.space.params_of(method) for method in self.space.methods]
        return [[name in names for name in self.searched] for names in followed]

    @cached_property
    def _defaults(self) -> Floats:
        ranges = [(self.space.default(name), *self.space.ranges[name]) for name in self.searched]
        return np.array([(default - low) / (high - low) for default, low, high in ranges])


def effective(method: str, weights: Floats) -> Floats:
    """The weights (n, u, k) that a method's result depends on, given anyone's (n, u, k).

    Methods that take fewer donors see those that weigh most. Some depend on the ratio alone, and
    have weights that sum to 1; some have none, and all are alike.
    """
    row, k = METHODS[method], weights.shape[2]
    if (most := row.donors[1]) is not None and most < k:
        totals = weights.sum(axis=1)
        ranks = np.argsort(np.argsort(-totals, axis=1, kind="stable"), axis=1)
        chosen = (ranks < most)[:, None, :]
    else:
        chosen = np.ones((1, 1, k), dtype=bool)
    if "weight" in row.params and "lambda" in row.params:
        return np.where(chosen, weights, 0.0)
    if "weight" not in row.params and row.base is not Base.ENDPOINT:
        weights = np.ones_like(weights)
    kept = np.where(chosen, weights, 0.0)
    totals = kept.sum(axis=2, keepdims=True)
    even = chosen / chosen.sum(axis=2, keepdims=True)
    return np.where(totals > 0, kept / np.where(totals > 0, totals, 1.0), even)
