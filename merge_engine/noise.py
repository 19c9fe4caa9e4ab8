"""Uniform numbers that depend on a key and a position, and on nothing else.

A mask drawn from a stream changes when tensors are merged in another order, in other chunks or on
another device. A counter-based generator has no stream: number ``i`` of a key is a hash of both.
The hash is two rounds of the ``lowbias32`` mixer (Chris Wellons 2018,
https://nullprogram.com/blog/2018/07/31/), each keyed by one half of the key. It is 32-bit integer
arithmetic throughout, which vectorises where 64-bit products do not, and exact, so a CPU and a GPU,
eager or compiled, draw the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # of lowbias32, as signed numbers
_BLOCK = 1 << 31  # positions that an int32 can count; every further block has a key of its own
_PIECE = 1 << 20  # numbers drawn at a time, so that what is between two steps stays in the cache


def key_of(seed: int, tensor: str, donor: int) -> int:
    """The generator's 64-bit key for one tensor of one donor (its place among the donors)."""
    digest = hashlib.blake2b(f"{seed}/{donor}/{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Numbers in [0, 1) on a grid of 2**-24: shape ``shape``, float32."""
    return uniform_at(key, 0, int(torch.Size(shape).numel()), device).reshape(tuple(shape))


def uniform_at(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The numbers at the flat positions ``[start, start + count)``, (count,).

    They are those that ``uniform`` has there, so a tensor may be worked through in chunks.
    """
    drawn = torch.empty(count, dtype=torch.float32, device=device)
    done = 0
    while done < count:
        block, first = divmod(start + done, _BLOCK)
        size = min(count - done, _PIECE, _BLOCK - first)
        positions = torch.arange(first, first + size, dtype=torch.int32, device=device)
        drawn[done : done + size] = hashed(positions, *halves(key, block))
        done += size
    return drawn


def halves(key: int, block: int = 0) -> tuple[int, int]:
    """Two int32 keys for the mixer, from a 64-bit key and the block of 2**31 positions.

    Neighbouring keys would be one sequence with its numbers swapped in pairs, were they not spread
    over all 64 bits first (SplitMix64's finaliser, https://doi.org/10.1145/2660193.2660195).
    """
    mask = (1 << 64) - 1
    mixed = (key + (block + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    mixed ^= mixed >> 31
    return _signed(mixed & 0xFFFFFFFF), _signed(mixed >> 32)


def hashed(positions: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """``uniform``'s arithmetic: the top 24 bits of ``mix(mix(i ^ low) ^ high)``.

    Args:
        positions: Within one block, int32.
        low: First half of the key, as ``halves`` gives it; as a tensor () of int32 it is no
            constant to a compiler.
        high: Second half.

    Returns:
        Numbers in [0, 1), float32, of the shape of ``positions``.
    """
    bits = _mixed(_mixed(positions ^ low) ^ high)
    return _shifted(bits, 8).float() * 2.0**-24


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 16)) * _FACTORS[0]
    bits = (bits ^ _shifted(bits, 15)) * _FACTORS[1]
    return bits ^ _shifted(bits, 16)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
