"""Weights tuned by gradient: points along a path, in units finer than the search space's.

A recipe blends flat and tuned weights, ``(1 - s) flat + s tuned(p)``, with strength s and tuned(p)
at position p on the path: its points are at 0, 1, 2, ..., and it is linear between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from merge_engine.building.units import Filters, Units, without_expert
from search.racing.race import Floats
from search.study.spec import TunedUnit

if TYPE_CHECKING:
    from merge_engine.models.model_set import ModelSet

PATH_PREFIX: Final = "tuned, "  # begins the labels of trials that are points of a path
STRENGTH: Final = (0.0, 1.25)  # range of s


@dataclass(frozen=True)
class TunedUnits:
    """The U units that have tuned weights of their own, each part of a unit of the search space."""

    filters: tuple[Filters, ...]  # of each unit, see `Units`
    unit_of: tuple[int, ...]  # the unit of the space that each of them lies in, (U)


@dataclass(frozen=True, eq=False)
class TunedPath:
    """N points of a path: weights of k donors in U units."""

    units: TunedUnits
    weights: Floats  # at each point, (N, U, k)

    @property
    def last(self) -> float:
        """Position of the last point."""
        return max(0.0, len(self.weights) - 1.0)

    def at(self, positions: Sequence[float] | Floats) -> Floats:
        """Return the weights at n positions, (n, U, k)."""
        return _interpolate(self.weights, np.asarray(positions, dtype=np.float64))

    def means_at(self, positions: Floats, units: int) -> Floats:
        """Return the mean weights in each of the space's units at n positions, (n, units, k)."""
        of_unit = np.array(self.units.unit_of)
        means = np.zeros((len(self.weights), units, self.weights.shape[2]))
        for unit in set(self.units.unit_of):
            means[:, unit] = self.weights[:, of_unit == unit].mean(axis=1)
        return _interpolate(means, positions)


def _interpolate(values: Floats, positions: Floats) -> Floats:
    """Interpolate values (N, ...) linearly at n positions in [0, N - 1]: (n, ...)."""
    left = np.clip(positions.astype(np.int64), 0, len(values) - 1)
    right = np.minimum(left + 1, len(values) - 1)
    share = (positions - left).reshape(-1, *[1] * (values.ndim - 1))
    found: Floats = (1 - share) * values[left] + share * values[right]
    return found


def tuned_units(by: TunedUnit, models: ModelSet, space_units: Sequence[Filters]) -> TunedUnits:
    """Return the units whose weights are tuned.

    Args:
        by: A tensor, where the experts of a layer count as one; a layer; or a unit of the space.
        models: Of the study.
        space_units: Filters of the space's units.
    """
    if by == "tensor":
        parts = {*map(without_expert, models.names)}
        units = Units.of_filters(models.names, Units.of_tensors(parts).filters)
    elif by == "layer":
        units = Units.of_layers(models)
    else:
        units = Units.of_filters(models.names, space_units)
    of_space = Units.of_filters(models.names, space_units).index
    found = [0] * len(units)
    for name, unit in units.index.items():
        found[unit] = of_space[name]
    return TunedUnits(units.with_live_names(models).filters, tuple(found))
