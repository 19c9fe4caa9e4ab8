"""Counter-based random numbers: functions of a key and a position, and of nothing else.

A mask drawn from a stream changes when tensors are merged in another order, in other chunks or on
another device. A counter-based generator has no stream: number ``i`` of a key is a hash of both.
The hash is the ``lowbias32`` mixer (Chris Wellons 2018,
https://nullprogram.com/blog/2018/07/31/) of the position times the golden ratio, with one half of
the key before the mixer's first multiplication and the other before its second. It is 32-bit
integer arithmetic throughout, which vectorises where 64-bit products do not, and exact, so a CPU
and a GPU, eager or compiled, draw the same bits.

A number has 16 bits. That is as fine as the tables of magnitudes, far finer than a random mask's
deviation from its density, and coarse enough to tabulate what the mask of any density keeps
(``masses_below``).
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 1 << 16  # numbers are multiples of 1 / LEVELS
BLOCK = 1 << 31  # positions that an int32 can count; every further block has a key of its own
_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # of lowbias32, as signed numbers
_GOLDEN = 0x9E3779B9 - (1 << 32)  # of 2**32
_PIECE = 1 << 18  # numbers drawn at a time, so that intermediate results stay in the cache


class Noise(NamedTuple):
    """Positions and keys that define a kernel's noise over rows of numbers."""

    first: Tensor  # position of each row's first number, modulo BLOCK, by ``weyl``; (rows, 1) int32
    keys: tuple[tuple[Tensor, Tensor], ...]  # of each donor, two halves, each (rows, 1) int32
    even: bool = False  # one evenly spread sequence for all donors, not random numbers

    def rows(self, part: slice) -> Noise:
        """Return the noise of some of the rows."""
        keys = tuple((low[part], high[part]) for low, high in self.keys)
        return Noise(self.first[part], keys, self.even)


def drawn(noise: Noise, offsets: Tensor) -> list[Tensor]:
    """Return each donor's numbers, (rows, width) int32 in [0, LEVELS).

    ``offsets`` are the positions within a row after ``weyl``, (width,) int32.
    """
    positions = noise.first + offsets  # ``weyl`` is linear
    if noise.even:  # the key moves the whole of it, so that tensors do not all start alike
        return [evenly_spread(positions + noise.keys[0][0])] * len(noise.keys)
    return [hashed(positions, low, high) for low, high in noise.keys]


def weyl(positions: Tensor) -> Tensor:
    """Multiply int32 positions by the golden ratio, modulo 2**32.

    Multiples of the golden ratio modulo 1 are evenly spread: the share in any interval is close to
    its length (Weyl 1916).
    """
    return positions * _GOLDEN


def key_of(seed: int, tensor: str, donor: int) -> int:
    """Return the 64-bit key of one tensor of one donor (its index among the recipe's donors)."""
    digest = hashlib.blake2b(f"{seed}/{donor}/{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform_at(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw a key's numbers at positions ``[start, start + count)``: (count,) float32 in [0, 1)."""
    numbers = torch.empty(count, dtype=torch.float32, device=device)
    done = 0
    while done < count:
        block, first = divmod(start + done, BLOCK)
        size = min(count - done, _PIECE, BLOCK - first)
        positions = torch.arange(first, first + size, dtype=torch.int32, device=device)
        numbers[done : done + size] = hashed(weyl(positions), *halves(key, block)) / LEVELS
        done += size
    return numbers


def halves(key: int, block: int = 0) -> tuple[int, int]:
    """Return two int32 keys for the mixer, from a 64-bit key and a block of 2**31 positions.

    Keys are first spread over all 64 bits (SplitMix64's finaliser,
    https://doi.org/10.1145/2660193.2660195): otherwise neighbouring keys would give the same
    sequence with numbers swapped in pairs.
    """
    mask = (1 << 64) - 1
    mixed = (key + (block + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    mixed ^= mixed >> 31
    return _signed(mixed & 0xFFFFFFFF), _signed(mixed >> 32)


def hashed(positions: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Return the top 16 bits of ``lowbias32(position ^ low)``, with ``high`` mixed in halfway.

    The mixer's last step changes the lower bits alone and is left out. The numbers, in [0, LEVELS),
    stay integers: comparing them is far cheaper than converting them.

    Args:
        positions: Within one block, through ``weyl``, int32, any shape.
        low: First half of the key (``halves``), int32; as a tensor no constant to a compiler.
        high: Second half.
    """
    bits = positions ^ low
    bits = (bits ^ _shifted(bits, 16)) * _FACTORS[0]
    bits = (bits ^ _shifted(bits, 15) ^ high) * _FACTORS[1]
    return _shifted(bits, 16)


def evenly_spread(positions: Tensor) -> Tensor:
    """Return evenly spread numbers in [0, LEVELS), at a fraction of the cost of ``hashed``.

    They choose a share of equal elements. Positions are as in ``hashed``.
    """
    return _shifted(positions, 16)


def level(probability: float) -> int:
    """Return a probability in units of 1 / LEVELS: elements with noise below it are kept."""
    return round(probability * LEVELS)


def masses_below(magnitudes: Tensor, key: int) -> Tensor:
    """Sum, for each level k, the magnitudes whose random number is below ``k / LEVELS``.

    This tabulates what a random mask of any density keeps of a donor: (LEVELS + 1,) float64, on the
    CPU, of magnitudes of any shape. Sums are of integers, so every machine gets the same.
    """
    flat = magnitudes.reshape(-1)
    largest = float(flat.max()) if flat.numel() else 0.0
    total = torch.zeros(LEVELS, dtype=torch.int64, device=flat.device)
    if largest == 0:
        return torch.zeros(LEVELS + 1, dtype=torch.float64)
    unit = 2.0 ** (math.floor(math.log2(largest)) + 1 - (62 - flat.numel().bit_length()))
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].double()
        levels = uniform_at(key, start, len(piece), flat.device) * LEVELS
        total.scatter_add_(0, levels.long(), (piece / unit).round().long())
    sums = total.cpu().cumsum(0).double() * unit
    return torch.cat([torch.zeros(1, dtype=torch.float64), sums])


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift right logically; torch's own shift keeps the sign."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
