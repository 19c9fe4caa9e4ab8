"""Uniform numbers that depend on a key and a position, and on nothing else.

A mask drawn from a stream changes when tensors are merged in another order, in other chunks or on
another device. SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195) as a
counter-based generator has no stream: number ``i`` of a key is a hash of ``key + i * gamma``.
Integer arithmetic is exact, so a CPU and a GPU draw the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def key_of(seed: int, tensor: str, donor: int) -> int:
    """The generator's 64-bit key for one tensor of one donor (its place among the donors)."""
    digest = hashlib.blake2b(f"{seed}/{donor}/{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Numbers in [0, 1) on a grid of 2**-24: shape ``shape``, float32."""
    count = int(torch.Size(shape).numel())
    state = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    state.mul_(_signed(_GAMMA)).add_(key)
    for shift, factor in _ROUNDS:
        state = _shifted_xor(state, shift).mul_(_signed(factor))
    state = _shifted_xor(state, 31)
    return (_shift(state, 40).float() * 2.0**-24).reshape(tuple(shape))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _shifted_xor(state: Tensor, bits: int) -> Tensor:
    return state ^ _shift(state, bits)
