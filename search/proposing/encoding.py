"""Feature vectors of recipes for the Gaussian process: recipes that merge identically share one.

A point's raw parameters would not do: a method may ignore one of them, or depend only on the ratio
of the weights. Many recipes are handled at once, as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution

from merge_engine.methods import METHODS, Base
from search.proposing.mixture import heaviest, keep_heaviest, zero_small_weights
from search.proposing.space import Point, Space
from search.proposing.tuned_path import STRENGTH
from search.racing.race import Floats

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]

TUNED: Final = ("strength", "position")  # parameters of a point with tuned weights


@dataclass(frozen=True)
class Candidates:
    """n candidate recipes as arrays."""

    method: Ints  # index of each one's method among the space's, (n,)
    weights: Floats  # of the k donors in each of the u units, (n, u, k)
    values: Floats  # of the p searched parameters, in units of their range, (n, p)
    tuned: Floats  # strength of tuned weights, and position on their path, (n, 2)

    def __len__(self) -> int:
        return len(self.method)

    def __getitem__(self, rows: Any) -> Candidates:
        return Candidates(
            self.method[rows], self.weights[rows], self.values[rows], self.tuned[rows]
        )

    def __add__(self, other: Candidates) -> Candidates:
        return Candidates(
            np.concatenate([self.method, other.method]),
            np.concatenate([self.weights, other.weights]),
            np.concatenate([self.values, other.values]),
            np.concatenate([self.tuned, other.tuned]),
        )


class RecipeEncoding:
    """The encoding of a space's recipes: a method index, and features of one length for all.

    Features are each unit's weights on a log scale (``log(1 + w)``: the larger a weight, the less a
    step matters) and every searched parameter in units of its range. A parameter that a method
    ignores is set to its default. If there are tuned weights, a unit's features are its mean
    blended weights, clipped at zero, and there are two more features: the strength, and its product
    with the position on the path.

    Args:
        space: Of the recipes.
        shared: Group of each of the space's units (``Space.shared_units``): units in one group have
            the same weights and are one unit here. Empty: each is its own.
    """

    def __init__(self, space: Space, shared: tuple[int, ...] = ()) -> None:
        self.space, self.shared = space, shared
        self.unit_of = shared or tuple(range(len(space.units)))  # our unit of each of the space's
        self.searched = [name for name, (low, high) in space.ranges.items() if low < high]  # (p)
        used = [space.params_of(method) for method in space.methods]
        self._used = [[name in names for name in self.searched] for names in used]
        ranges = [(space.default(name), *space.ranges[name]) for name in self.searched]
        self._defaults: Floats = np.array(
            [(default - low) / (high - low) for default, low, high in ranges]
        )

    def candidates(self, points: Sequence[Point]) -> Candidates:
        """Return points as candidates."""
        space = self.space
        ranges = [(name, *space.ranges[name]) for name in self.searched]
        values = [[(p[name] - low) / (high - low) for name, low, high in ranges] for p in points]
        return Candidates(
            np.array([space.methods.index(point["method"]) for point in points], dtype=np.int64),
            self._group_means(space.weights(points)),
            np.array(values).reshape(len(points), len(self.searched)),
            np.array([[p.get(name, 0.0) for name in TUNED] for p in points]).reshape(-1, 2),
        )

    def point(self, one: Candidates) -> dict[str, Any]:
        """Return the point of a single candidate."""
        space = self.space
        values = {
            name: space.ranges[name][0] * (1 - share) + space.ranges[name][1] * share
            for name, share in zip(self.searched, one.values[0].tolist(), strict=True)
        }
        weights = one.weights[0][list(self.unit_of)]
        values |= dict(zip(TUNED, one.tuned[0].tolist(), strict=True))
        point = space.point_by_unit(space.methods[one.method[0]], weights.tolist(), values)
        return {  # rounding may have led out of a range
            name: min(max(point[name], of.low), of.high)
            if isinstance(of, FloatDistribution)
            else point[name]
            for name, of in space.distributions.items()
        }

    def random(self, count: int, generator: np.random.Generator) -> Candidates:
        """Draw uniform candidates, some without some of the donors, some without tuned weights."""
        units, k = max(self.unit_of) + 1, len(self.space.donors)
        shares = generator.exponential(size=(count, units, k))
        kept = generator.random((count, 1, k)) < generator.choice([0.5, 1.0, 1.0], (count, 1, 1))
        kept[np.arange(count), 0, generator.integers(k, size=count)] = True
        shares *= kept
        total = self.space.used * generator.uniform(*self.space.scale, (count, units, 1))
        return Candidates(
            generator.integers(len(self.space.methods), size=count),
            self._keep_at_most(
                zero_small_weights(total * shares / shares.sum(axis=2, keepdims=True))
            ),
            generator.random((count, len(self.searched))),
            self._draw_tuned(count, generator),
        )

    def _draw_tuned(self, count: int, generator: np.random.Generator) -> Floats:
        if self.space.tuned is None:
            return np.zeros((count, 2))
        drawn = generator.random((count, 2)) * self._tuned_widths
        drawn[generator.random(count) < 0.3] = 0.0
        return drawn

    def perturb(self, some: Candidates, width: float, generator: np.random.Generator) -> Candidates:
        """Take a random step from each candidate, sometimes to fewer donors or another method.

        Strength and position of tuned weights take steps, too.

        ``width`` is the standard deviation of a weight's or a parameter's step.

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
        tuned = some.tuned
        if self.space.tuned is not None:
            steps = width * self._tuned_widths * generator.standard_normal(tuned.shape)
            tuned = np.clip(tuned + steps, 0.0, self._tuned_widths)
        return Candidates(
            np.where(swap, other, some.method),
            self._in_range(moved),
            np.clip(values, 0.0, 1.0),
            tuned,
        )

    def encode(self, some: Candidates) -> Floats:
        """Return the candidates' features, (n, d) with d = u k + p, or 2 more of tuned weights."""
        blended, extra = self._blend(some)
        weights, values = np.empty_like(some.weights), np.empty_like(some.values)
        for number, name in enumerate(self.space.methods):
            rows = some.method == number
            weights[rows] = effective_weights(name, blended[rows], self.space.at_most)
            values[rows] = np.where(self._used[number], some.values[rows], self._defaults)
        return np.hstack([np.log1p(weights).reshape(len(some), -1), values, extra])

    def _blend(self, some: Candidates) -> tuple[Floats, Floats]:
        """Return mean weights (n, u, k) of flat and tuned ones, and the tuned ones' features."""
        tuned = self.space.tuned
        if tuned is None:
            return some.weights, np.zeros((len(some), 0))
        strength, position = some.tuned[:, 0], some.tuned[:, 1]
        means = self._group_means(tuned.means_at(position, len(self.space.units)))
        share = strength[:, None, None]
        blended = np.maximum((1 - share) * some.weights + share * means, 0.0)
        along = strength * position / max(tuned.last, 1.0)
        return blended, np.stack([strength, along], axis=1)

    @property
    def _tuned_widths(self) -> Floats:
        """Ranges of strength and position, (2), both from 0 on."""
        assert self.space.tuned is not None
        return np.array([STRENGTH[1], self.space.tuned.last])

    def _group_means(self, weights: Floats) -> Floats:
        """Average weights (n, space's units, k) over the units that share them, (n, u, k)."""
        if not self.shared:
            return weights
        of_unit = np.array(self.shared)
        means = [weights[:, of_unit == unit].mean(axis=1) for unit in range(of_unit.max() + 1)]
        return np.stack(means, axis=1)

    def _in_range(self, weights: Floats) -> Floats:
        """Return the nearest weights that are at or above zero with means in the scale's range."""
        weights = self._keep_at_most(zero_small_weights(np.maximum(weights, 0.0)))
        scale = weights.sum(axis=2, keepdims=True) / self.space.used
        even = np.where(scale > 0, weights / np.where(scale > 0, scale, 1.0), self._evenly)
        clipped: Floats = self._keep_at_most(even * np.clip(scale, *self.space.scale))
        return clipped

    @property
    def _evenly(self) -> float:
        """Weight of each of the k donors whose scale is 1."""
        return self.space.used / len(self.space.donors)

    def _keep_at_most(self, weights: Floats) -> Floats:
        return keep_heaviest(weights, self.space.at_most)


def effective_weights(method: str, weights: Floats, at_most: int | None = None) -> Floats:
    """Return the weights that a method's result depends on, (n, u, k), given any (n, u, k).

    Methods that take fewer donors use the heaviest, as does a space with ``at_most``. Where only
    the ratio counts, weights are scaled to sum to 1; where a method has no weights, all are equal.
    """
    row, k = METHODS[method], weights.shape[2]
    if (most := min(row.donors[1] or k, at_most or k)) < k:
        chosen = heaviest(weights, most)[:, None, :]
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
