"""Compute a kernel's values from a method's parameters and statistics of whole task vectors.

A density becomes bounds on magnitudes or a probability of keeping an element, and ``rescale`` a
factor. ``plain_sum`` or ``elected_sum`` then adds the values of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from merge_engine.methods.contract import KernelValues, Parameters, TaskVectors
from merge_engine.methods.linear import CANCELLED
from merge_engine.numerics.noise import LEVELS, level
from merge_engine.numerics.order_statistics import EVERYTHING, NOTHING, Band

# Upper bound of a tensor that has none, where it is merged in one pass with tensors that have one.
UNBOUNDED: Final[Mapping[str, float]] = MappingProxyType({"high": math.inf, "high_share": 0})


def ties(parameters: Parameters, deltas: TaskVectors) -> KernelValues:
    """Return bounds that keep the ``max(1, int(density * numel))`` largest magnitudes."""
    densities = enumerate(parameters.per_donor["density"])
    return _banded(parameters, [_band(deltas, donor, each, least=1) for donor, each in densities])


def breadcrumbs(parameters: Parameters, deltas: TaskVectors) -> KernelValues:
    """Return bounds that drop the ``int(gamma * numel)`` largest magnitudes.

    The next ``int(density * numel)`` are kept; fewer are dropped where too few would be left.
    """
    shares = zip(parameters.per_donor["density"], parameters.per_donor["gamma"], strict=True)
    return _banded(parameters, [_band(deltas, donor, *each) for donor, each in enumerate(shares)])


def _band(
    deltas: TaskVectors, donor: int, density: float, gamma: float = 0.0, *, least: int = 0
) -> Band:
    """Return the bounds that keep a share of magnitudes, or ``least``, below the largest share."""
    if density >= 1:
        return EVERYTHING
    if density <= 0:
        return NOTHING
    magnitudes = deltas.magnitudes(donor)
    kept = max(least, int(density * magnitudes.size))
    dropped = int(gamma * magnitudes.size)
    return magnitudes.band(max(0, magnitudes.size - kept - dropped), kept)


def _banded(parameters: Parameters, bands: Sequence[Band]) -> KernelValues:
    """Return each donor's bounds on magnitudes, and its factor."""
    rescale = parameters.shared["rescale"]
    per_donor: dict[str, tuple[float, ...]] = {
        "low": tuple(band.low for band in bands),
        "low_share": tuple(level(band.low_share) for band in bands),
        "factor": tuple(
            weight * (band.rescale if rescale else 1.0)
            for weight, band in zip(parameters.per_donor["weight"], bands, strict=True)
        ),
    }
    if any(band.high < math.inf for band in bands):
        per_donor["high"] = tuple(band.high for band in bands)
        per_donor["high_share"] = tuple(level(band.high_share) for band in bands)
    return KernelValues({}, per_donor, has_ties=any(band.tied for band in bands))


def dare(parameters: Parameters, deltas: TaskVectors) -> KernelValues:
    """Return each donor's keep probability, and the factor that restores its L1 norm."""
    probabilities = tuple(level(density) for density in parameters.per_donor["density"])
    factors = list(parameters.per_donor["weight"])
    for donor, probability in enumerate(probabilities):
        if parameters.shared["rescale"] and 0 < probability < LEVELS:
            factors[donor] *= deltas.rescale_factor(donor, probability)
    return KernelValues({}, {"keep_probability": probabilities, "factor": tuple(factors)})


def della(parameters: Parameters, deltas: TaskVectors) -> KernelValues:
    """Return each donor's lowest keep probability, and the range up to the highest.

    The range is multiplied by 256 / 255, because rank shares are bytes.

    Raises:
        ValueError: A probability is outside (0, 1).
    """
    per_donor = parameters.per_donor
    bounds = [
        _keep_probabilities(density, epsilon if deltas.width > 1 else 0.0)
        for density, epsilon in zip(per_donor["density"], per_donor["epsilon"], strict=True)
    ]
    values = {
        "min_keep_probability": tuple(level(lowest) for lowest, _ in bounds),
        "keep_probability_range": tuple(level(reach * 256 / 255) for _, reach in bounds),
        "factor": per_donor["weight"],
    }
    return KernelValues({}, values, rescales=bool(parameters.shared["rescale"]))


def _keep_probabilities(density: float, epsilon: float) -> tuple[float, float]:
    """Return the lowest keep probability, and the range up to the highest."""
    if density >= 1 or density <= 0:
        return density, 0.0
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(
            f"density {density:g} +- epsilon {epsilon:g} leaves (0, 1); make epsilon smaller"
        )
    return density - epsilon, 2 * epsilon


def plain_sum(parameters: Parameters, values: KernelValues) -> KernelValues:
    """Multiply the factors by ``lambda``, over the weights' sum if ``normalize``.

    The sum is not divided by if the weights cancel out.
    """
    scale = parameters.shared["lambda_"]
    total = sum(parameters.per_donor["weight"])
    if parameters.shared["normalize"] and abs(total) >= CANCELLED:
        scale = scale / total
    factors = tuple(factor * scale for factor in values.per_donor["factor"])
    return replace(values, per_donor={**values.per_donor, "factor": factors})


def elected_sum(parameters: Parameters, values: KernelValues) -> KernelValues:
    """Add ``lambda``, and the weights if ``normalize``."""
    weight = {"weight": parameters.per_donor["weight"]} if parameters.shared["normalize"] else {}
    scalars = {"lambda_": parameters.shared["lambda_"]}
    return replace(values, scalars=scalars, per_donor={**values.per_donor, **weight})


def sce(parameters: Parameters, deltas: TaskVectors) -> KernelValues:
    """Return the smallest variance that is selected, and the donors' weights."""
    band, change = deltas.variances.largest(parameters.shared["select_topk"])
    total = float(change.sum())
    # mergekit's own switch; on for most fine-tuned tensors, whose changes are small.
    weight = (change / total).tolist() if total >= 1e-6 else [1 / len(change)] * len(change)
    scalars = {"low": band.low, "low_share": level(band.low_share)}
    return KernelValues(scalars, {"weight": tuple(weight)}, has_ties=band.tied)


def ramplus_tl(parameters: Parameters, deltas: TaskVectors) -> KernelValues:
    """Return each donor's factor for the elements that it alone changed."""
    epsilon, r, alpha = (parameters.shared[name] for name in ("epsilon", "r", "alpha"))
    alone, shared = deltas.overlaps(epsilon)
    # A donor without elements of its own: its factor multiplies nothing, so any divisor will do.
    ratio = shared / alone.clamp_min(max(1.0, epsilon))
    factor = 1 + r * ratio.clamp(0, alpha)
    return KernelValues({"epsilon": epsilon}, {"factor": tuple(factor.tolist())})
