"""From a recipe's parameters to a kernel's: what has to be known of whole task vectors first.

A density becomes bounds on magnitudes, ``rescale`` a factor, and ``normalize`` of a plain sum is
taken into ``lambda``. A preparation maps parameters, by their argument names, to the kernel's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

from torch import Tensor

from merge_engine.numerics.noise import LEVELS, level
from merge_engine.numerics.statistics import EVERYTHING, NOTHING, Band, Magnitudes, Variances


class TaskVector(Protocol):
    """One donor's change to one tensor, as far as a preparation may ask of it."""

    @property
    def magnitudes(self) -> Magnitudes:
        """The order statistics of its elements."""

    def stretch(self, chance: int) -> float:
        """What gives its L1 norm back to the elements drawn with a chance; 1 without a norm.

        Args:
            chance: Of every element, in LEVELS.
        """


class TaskVectors(Protocol):
    """What the donors change in one tensor, one by one and together."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[TaskVector]:
        """Each of them."""

    @property
    def width(self) -> int:
        """Elements of a row, as ``row_width`` has it."""

    @property
    def variances(self) -> Variances:
        """Where they differ, and how much they change there."""

    def overlaps(self, epsilon: float) -> Tensor:
        """How many elements each changes by more than ``epsilon``: alone, and with others, (2, n).

        float64.
        """


# What a tensor without an upper bound has where it is merged beside one that has a bound.
UNBOUNDED: Final[Mapping[str, float]] = MappingProxyType({"high": math.inf, "high_share": 0})
Values = Mapping[str, Any]
Prepare = Callable[[Values, TaskVectors], dict[str, Any]]


def summed(values: Values) -> dict[str, Any]:
    """A plain sum's factors in one for each donor; weights that cancel out divide nothing."""
    rest = {name: value for name, value in values.items() if name not in _OF_A_SUM}
    total = sum(values["weight"])
    scale = values["lambda_"]
    if values["normalize"] and abs(total) >= 1e-8:
        scale = scale / total
    return rest | {"factor": tuple(factor * scale for factor in values["factor"])}


_OF_A_SUM = ("weight", "normalize", "lambda_")


def elected(values: Values) -> dict[str, Any]:
    """Of a sum with a sign election: the weights are for ``normalize`` alone."""
    dropped = ("normalize",) if values["normalize"] else ("normalize", "weight")
    return {name: value for name, value in values.items() if name not in dropped}


def ties(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """The ``max(1, int(density * numel))`` elements of largest magnitude; all from density 1 on."""
    settings = zip(deltas, values["density"], strict=True)
    return elected(_banded(values, [_largest(delta, density) for delta, density in settings]))


def _largest(delta: TaskVector, density: float) -> Band:
    if (band := _all_or_none(density)) is not None:
        return band
    size = delta.magnitudes.size
    kept = max(1, int(density * size))
    return delta.magnitudes.band(size - kept, kept)


def breadcrumbs_ties(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """``int(density * numel)`` elements below the ``gamma`` largest, as far as those leave room."""
    return elected(_trimmed(values, deltas))


def breadcrumbs(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """``breadcrumbs_ties`` for a plain sum."""
    return summed(_trimmed(values, deltas))


def _trimmed(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    settings = zip(deltas, values["density"], values["gamma"], strict=True)
    bands = [_middle(delta, density, gamma) for delta, density, gamma in settings]
    return _banded({name: value for name, value in values.items() if name != "gamma"}, bands)


def _middle(delta: TaskVector, density: float, gamma: float) -> Band:
    if (band := _all_or_none(density)) is not None:
        return band
    size = delta.magnitudes.size
    kept = int(density * size)
    return delta.magnitudes.band(max(0, size - kept - int(gamma * size)), kept)


def dare_ties(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """Chances, and the factors that restore the L1 norm under this recipe's masks."""
    return elected(_drawn(values, deltas))


def dare_linear(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """``dare_ties`` for a plain sum."""
    return summed(_drawn(values, deltas))


def _drawn(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    rest = {name: value for name, value in values.items() if name not in ("density", "rescale")}
    chances = tuple(level(density) for density in values["density"])
    factors = [
        weight * (delta.stretch(chance) if values["rescale"] and 0 < chance < LEVELS else 1.0)
        for delta, weight, chance in zip(deltas, values["weight"], chances, strict=True)
    ]
    return rest | {"chance": chances, "factor": tuple(factors)}


def della(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """The chance of each row's smallest element and how much better the largest one's is.

    Raises:
        ValueError: A chance would leave (0, 1).
    """
    return elected(_drawn_by_rank(values, deltas))


def della_linear(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """``della`` for a plain sum."""
    return summed(_drawn_by_rank(values, deltas))


def _drawn_by_rank(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    chances = [
        _chances(density, epsilon if deltas.width > 1 else 0.0)
        for density, epsilon in zip(values["density"], values["epsilon"], strict=True)
    ]
    settings = ("density", "epsilon", "rescale")
    return {name: value for name, value in values.items() if name not in settings} | {
        "chance": tuple(LEVELS * chance for chance, _ in chances),
        "spread": tuple(LEVELS * spread for _, spread in chances),
        "factor": values["weight"],
        "restored": values["rescale"],
    }


def _chances(density: float, epsilon: float) -> tuple[float, float]:
    """Lowest chance, and the highest less the lowest; no rank matters from 1 on and at 0."""
    if density >= 1 or density <= 0:
        return density, 0.0
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(
            f"density {density:g} +- epsilon {epsilon:g} leaves (0, 1); make epsilon smaller"
        )
    return density - epsilon, 2 * epsilon


def sce(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """The smallest variance that is selected, and the donors' factors."""
    band, change = deltas.variances.largest(values["select_topk"])
    total = float(change.sum())
    # mergekit's own switch. It is on for most fine-tunes' tensors: their changes are small.
    weight = (change / total).tolist() if total >= 1e-6 else [1 / len(deltas)] * len(deltas)
    found = {"weight": tuple(weight), "low": band.low, "low_share": level(band.low_share)}
    return found | {"draws": band.tied}


def ramplus_tl(values: Values, deltas: TaskVectors) -> dict[str, Any]:
    """The factors of what one donor alone changed."""
    alone, shared = deltas.overlaps(values["epsilon"])
    # With no element of its own a donor's factor multiplies nothing: any divisor will do.
    ratio = shared / alone.clamp_min(max(1.0, values["epsilon"]))
    factor = 1 + values["r"] * ratio.clamp(0, values["alpha"])
    return {"epsilon": values["epsilon"], "factor": tuple(factor.tolist())}


def _all_or_none(density: float) -> Band | None:
    if density >= 1:
        return EVERYTHING
    return NOTHING if density <= 0 else None


def _banded(values: Values, bands: Sequence[Band]) -> dict[str, Any]:
    rest = {name: value for name, value in values.items() if name not in ("density", "rescale")}
    found: dict[str, Any] = rest | {
        "low": tuple(band.low for band in bands),
        "low_share": tuple(level(band.low_share) for band in bands),
        "factor": tuple(
            weight * (band.stretch if values["rescale"] else 1.0)
            for weight, band in zip(values["weight"], bands, strict=True)
        ),
        "draws": any(band.tied for band in bands),
    }
    if any(band.high < math.inf for band in bands):
        found["high"] = tuple(band.high for band in bands)
        found["high_share"] = tuple(level(band.high_share) for band in bands)
    return found
