"""The elementwise methods that choose by comparing: donors with each other, or one with the base.

Every kernel computes in float32, returns float32 and leaves its inputs as they are. Shapes: a
tensor of any shape ``s``, n donors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.methods.task_vectors import Number, Numbers, elected_sign, task_vectors
from merge_engine.numerics.statistics import variance


def sce(
    base: Tensor,
    donors: Sequence[Tensor],
    *,
    weight: Numbers,
    low: Number,
    low_share: Number,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Select where the donors differ most, weigh them by their change, erase minority signs.

    With d_i the task vectors where the variance over the donors is largest, zero elsewhere:
    ``w_i = mean(d_i^2) / sum_j mean(d_j^2)``, uniform if that sum is below 1e-6, and
    ``base + sum_i w_i d_i a_i / max(sum_i w_i a_i, 1e-6)`` with a_i = 1 where d_i has the sign of
    ``sum_j d_j``, plus on a tie.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        weight: The n factors w_i.
        low: The smallest variance that is selected.
        low_share: Chance to select an element exactly at ``low``.
        noise: n times the same uniform numbers in [0, 1), (*s), which choose among those; None:
            all are selected.

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
    """Average each element over the donors that changed it, by more than ``epsilon``.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        epsilon: Largest change that counts as none.

    Source: Yuan et al. 2026, https://arxiv.org/abs/2601.13572
    """
    deltas = [_active(delta, epsilon) for delta in task_vectors(base, donors)]
    return base.float() + sum(deltas, torch.zeros_like(deltas[0])) / _changed(deltas).clamp_min(1)


def ramplus_tl(
    base: Tensor, donors: Sequence[Tensor], *, factor: Numbers, epsilon: Number
) -> Tensor:
    """``ram`` with stronger elements that one donor alone changed.

    Donor i's are multiplied by ``1 + r clip(shared_i / unique_i, 0, alpha)``, counting its changed
    elements in this tensor that others changed, too, and those that none did.

    Args:
        base: The base model's tensor, (*s).
        donors: n tensors, (*s).
        factor: Of each donor's own elements.
        epsilon: Largest change that counts as none.

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
    """How many donors changed each element, (*s), float32."""
    return sum(((delta != 0).float() for delta in deltas), torch.zeros_like(deltas[0]))


def nearswap(base: Tensor, donors: Sequence[Tensor], *, t: float) -> Tensor:
    """Go from the base towards the donor, by t at the most: the donor itself where it is near.

    ``base + w (donor - base)`` with ``w = clip(t / max(|donor - base|, 1e-6), 0, 1)``.

    Args:
        base: The base model's tensor, (*s).
        donors: One tensor, (*s).
        t: Longest way of an element, in the units of the weights.

    Source: alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """
    (donor,) = donors
    start, end = base.float(), donor.float()
    share = (t / (end - start).abs().clamp_min(1e-6)).clamp(0, 1)
    return torch.lerp(start, end, share)


def arcee_fusion(base: Tensor, donors: Sequence[Tensor], *, taken: Sequence[Tensor]) -> Tensor:
    """Take the donor's elements that matter most, leave the others at the base.

    Which those are, ``statistics.salient`` says. Its quartiles are those of all elements: mergekit
    estimates them from a random million in larger tensors, which makes its result depend on a seed
    and agrees with this one up to sampling error.

    Args:
        base: The base model's tensor, (*s).
        donors: One tensor, (*s).
        taken: One mask, (*s) bool.

    Source: Arcee AI's mergekit, https://www.arcee.ai
    """
    (donor,), (mask,) = donors, taken
    return torch.where(mask, donor.float(), base.float())
