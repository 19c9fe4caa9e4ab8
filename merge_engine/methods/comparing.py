"""Kernels that choose elements by comparing donors with each other, or a donor with the base.

Kernels compute in float32, return float32 and do not change their inputs. Notation: base (*s) and
n donors (*s), of any shape ``s``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.methods.contract import Number, PerDonor
from merge_engine.methods.task_vectors import elected_sign, task_vectors
from merge_engine.numerics.statistics import variance


def sce(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: PerDonor,
    low: Number,
    low_share: Number,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Select the elements where the donors differ most, weight by change, erase minority signs.

    With d_i the task vectors where the variance over the donors is largest, zero elsewhere:
    ``w_i = mean(d_i^2) / sum_j mean(d_j^2)``, uniform if that sum is below 1e-6, and
    ``base + sum_i w_i d_i a_i / max(sum_i w_i a_i, 1e-6)`` with a_i = 1 where d_i has the sign of
    ``sum_j d_j``, plus on a tie.

    Args:
        base: The base model's tensor.
        donors: The donors' tensors.
        weight: The n weights w_i.
        low: The smallest selected variance.
        low_share: Chance to select an element exactly at ``low``, in LEVELS.
        noise: n times the same uniform numbers in [0, LEVELS), (*s), which choose among elements
            at ``low``; None: all of them are selected.

    Source: Wan et al. 2024, https://arxiv.org/abs/2408.07990
    """
    deltas = task_vectors(base, donors)
    varied = variance(deltas)
    selected = varied >= low
    if noise is not None:
        selected = (varied > low) | ((varied == low) & (noise[0] < low_share))
    deltas = [torch.where(selected, delta, 0.0) for delta in deltas]
    zero = torch.zeros_like(deltas[0])
    elected = elected_sign(sum(deltas, zero))
    mixed, divisor = zero, zero
    for delta, factor in zip(deltas, weight, strict=True):
        erased = torch.where(delta.sign() == elected, factor, 0.0)
        mixed, divisor = mixed + delta * erased, divisor + erased
    return base.float() + mixed / divisor.clamp_min(1e-6)


def ram(base: Tensor, donors: Sequence[Tensor], *, epsilon: Number) -> Tensor:
    """Average each element over the donors that changed it by more than ``epsilon``.

    Source: Yuan et al. 2026, https://arxiv.org/abs/2601.13572
    """
    deltas = [_active(delta, epsilon) for delta in task_vectors(base, donors)]
    return base.float() + sum(deltas, torch.zeros_like(deltas[0])) / _changed(deltas).clamp_min(1)


def ramplus_tl(
    base: Tensor, donors: Sequence[Tensor], *, factor: PerDonor, epsilon: Number
) -> Tensor:
    """Apply ``ram`` with larger changes of the elements that one donor alone changed.

    Those of donor i are multiplied by ``factor_i = 1 + r clip(shared_i / unique_i, 0, alpha)``,
    where ``unique_i`` counts the elements of this tensor that it alone changed by more than
    ``epsilon``, and ``shared_i`` those that other donors changed, too.

    Source: Yuan et al. 2026, https://arxiv.org/abs/2601.13572; per tensor as in mergekit
    """
    deltas = [_active(delta, epsilon) for delta in task_vectors(base, donors)]
    changed = _changed(deltas)  # (*s)
    share = 1 / changed.clamp_min(1)
    merged = torch.zeros_like(deltas[0])
    for delta, own in zip(deltas, factor, strict=True):
        merged = merged + delta * torch.where(changed == 1, own, share)
    return base.float() + merged


def _active(delta: Tensor, epsilon: Number) -> Tensor:
    return delta * (delta.abs() > epsilon)


def _changed(deltas: Sequence[Tensor]) -> Tensor:
    """Count the donors that changed each element, (*s) float32."""
    return sum(((delta != 0).float() for delta in deltas), torch.zeros_like(deltas[0]))


def nearswap(base: Tensor, donors: Sequence[Tensor], *, t: float) -> Tensor:
    """Move each element from the base towards the donor, by ``t`` at the most.

    ``base + w (donor - base)`` with ``w = clip(t / max(|donor - base|, 1e-6), 0, 1)``; t is in the
    units of the weights, and there is one donor.

    Source: alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """
    (donor,) = donors
    start, end = base.float(), donor.float()
    share = (t / (end - start).abs().clamp_min(1e-6)).clamp(0, 1)
    return torch.lerp(start, end, share)


def arcee_fusion(
    base: Tensor, donors: Sequence[Tensor], *, salience_mask: Sequence[Tensor]
) -> Tensor:
    """Take the donor's most salient elements by its mask (*s) bool, and the base's elsewhere.

    ``statistics.salient`` defines salience. Its quartiles are over all elements; mergekit estimates
    them from a random million in larger tensors, so its result depends on a seed and agrees with
    this one up to sampling error.

    Source: Arcee AI's mergekit, https://www.arcee.ai
    """
    (donor,), (mask,) = donors, salience_mask
    return torch.where(mask, donor.float(), base.float())
