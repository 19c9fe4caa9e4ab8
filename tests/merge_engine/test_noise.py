import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.numerics.noise import (
    LEVELS,
    evenly_spread,
    key_of,
    level,
    masses_below,
    uniform_at,
    weyl,
)
from uniform import uniform

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def by_hand(key: int, position: int) -> float:
    """The definition with Python's own integers."""
    block, low_position = position >> 31, position & ((1 << 31) - 1)
    state = (key + (block + 1) * 0x9E3779B97F4A7C15) & MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
    state ^= state >> 31
    x = (low_position * 0x9E3779B9) & MASK32
    x ^= state & MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15) ^ (state >> 32)) * 0x846CA68B) & MASK32
    return (x >> 16) / 2**16


def test_numbers_depend_on_key_and_index_alone():
    key = key_of(0, "model.norm.weight", 1)
    assert torch.equal(uniform(key, (7, 11)).flatten(), uniform(key, (77,)))
    assert torch.equal(uniform(key, (50,)), uniform(key, (77,))[:50])


@given(start=st.integers(0, 90), count=st.integers(0, 90))
def test_chunks_are_parts_of_the_whole(start, count):
    assert torch.equal(uniform_at(5, start, count), uniform(5, (200,))[start : start + count])


def test_long_tensors_are_drawn_in_pieces_that_join():
    whole = uniform(9, (2_500_000,))
    assert torch.equal(uniform_at(9, 1_048_570, 20), whole[1_048_570:1_048_590])


def test_positions_beyond_an_int32_have_numbers_of_their_own():
    start = 2**31 - 500
    drawn = uniform_at(7, start, 1000)
    assert drawn.tolist() == [by_hand(7, start + i) for i in range(1000)]
    assert not torch.equal(drawn[500:], uniform(7, (500,)))
    assert torch.equal(uniform_at(7, 2**31, 500), drawn[500:])


def test_these_numbers_never_change():
    # An exported seed stays meaningful: the first numbers as literals, more from the definition.
    key = key_of(3, "x", 0)
    digest = hashlib.blake2b(b"3/0/x", digest_size=8).digest()
    assert key == int.from_bytes(digest, "little", signed=True)
    assert uniform(key, (1000,)).tolist() == [by_hand(key, position) for position in range(1000)]
    assert (uniform(0, (3,)) * 2**16).tolist() == [12137, 56430, 51067]


def test_keys_differ_by_seed_tensor_and_donor():
    keys = {key_of(s, t, d) for s in range(5) for t in ("a", "b", "ab") for d in range(5)}
    assert len(keys) == 75


@pytest.mark.parametrize("key", [0, 1, -1, key_of(0, "x", 0)])
def test_numbers_are_uniform(key):
    drawn = uniform(key, (1_000_000,)).double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 4 * (1 / 12 / 1e6) ** 0.5
    counts = torch.bincount((drawn * 128).long(), minlength=128)
    each = len(drawn) / 128
    assert ((counts - each) ** 2 / each).sum() < 127 + 5 * (2 * 127) ** 0.5  # chi-square, 5 sigma


@pytest.mark.parametrize(
    ("one", "other"),
    [(0, 1), (4, 5), (0, 1 << 32), (-1, 0), (key_of(0, "x", 0), key_of(0, "x", 1))],
)
def test_keys_are_independent_at_every_near_distance(one, other):
    # Correlations at lags -8..8 and the joint distribution on a 10 x 10 grid.
    first, second = uniform(one, (400_000,)).double(), uniform(other, (400_000,)).double()
    for lag in range(-8, 9):
        pair = torch.stack([first, second.roll(lag)])
        assert torch.corrcoef(pair)[0, 1].abs() < 5 / 400_000**0.5
    cells = torch.bincount((first * 10).long() * 10 + (second * 10).long(), minlength=100)
    assert ((cells - 4e3) ** 2 / 4e3).sum() < 99 + 5 * (2 * 99) ** 0.5


@pytest.mark.parametrize("key", [3, key_of(0, "x", 0)])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 128, 256, 768, 1024, 4096])
def test_neighbouring_indices_are_independent(lag, key):
    drawn = uniform(key, (400_000 + lag,)).double()
    first, second = drawn[:-lag], drawn[lag:]
    cells = torch.bincount((first * 10).long() * 10 + (second * 10).long(), minlength=100)
    assert ((cells - 4e3) ** 2 / 4e3).sum() < 99 + 5 * (2 * 99) ** 0.5


@pytest.mark.parametrize("bit", range(0, 64, 3))
def test_one_bit_of_the_key_flips_half_of_the_bits(bit):
    key = key_of(1, "y", 2)
    one, other = ((uniform(k, (20_000,)) * 2**16).int() for k in (key, key ^ (1 << bit)))
    for position in range(16):
        flipped = (((one ^ other) >> position) & 1).double().mean()
        assert abs(flipped - 0.5) < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("size", [1, 1_000, 2_500_000])
def test_what_a_mask_keeps_is_known_beforehand(size):
    magnitudes = torch.rand(size, generator=torch.Generator().manual_seed(0)) ** 3
    masses = masses_below(magnitudes, key=5)
    assert masses.shape == (LEVELS + 1,)
    drawn = uniform(5, (size,))
    for chance in (0.0, 0.1, 0.31, 0.5, 0.9, 1.0):
        kept = magnitudes[drawn < level(chance) / LEVELS].double().sum()
        assert float(masses[level(chance)]) == pytest.approx(float(kept), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("magnitudes", [torch.zeros(50), torch.empty(0)])
def test_nothing_is_kept_of_nothing(magnitudes):
    assert not masses_below(magnitudes, key=1).any()


@pytest.mark.parametrize("share", [0.01, 0.31, 0.5, 0.9])
def test_even_numbers_keep_any_share_to_a_few_elements(share):
    for start in (0, 12_345, 2**31 - 50_000):
        positions = torch.arange(start, start + 50_000, dtype=torch.int64).to(torch.int32)
        kept = int((evenly_spread(weyl(positions)) < level(share)).sum())
        assert abs(kept - share * 50_000) <= 8
