"""Bands of magnitudes: what is kept, how much of it at a bound, and what gives the norm back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from in_memory import in_memory
from merge_engine.building.merging import merge_tensor
from merge_engine.numerics.order_statistics import (
    NOTHING,
    TABLE,
    Band,
    Magnitudes,
    Variances,
    segment_sums,
    segment_sums_on_device,
)
from merge_engine.numerics.statistics import variance
from merge_engine.recipe.recipe_file import parse_recipe

DEVICE = torch.device("cpu")
DENSITIES = [0.003, 0.1, 0.31, 0.5, 0.77, 0.95, 0.999]


def trimmed(method: str, base: Tensor, donor: Tensor, **parameters: float | bool) -> Tensor:
    """The merge of one donor with weight 1, float32: base plus what is kept."""
    mapping = {
        "merge_method": method,
        "base_model": "m0",
        "models": [{"model": "m1", "parameters": {"weight": 1.0}}],
        "parameters": parameters,
    }
    recipe, _notes = parse_recipe(mapping, where="test")
    return merge_tensor(recipe, "x", in_memory([base, donor]), DEVICE)


def distinct(size: int, seed: int) -> Tensor:
    """Elements of either sign whose magnitudes all differ, in no order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator) + 1
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return order.float() * signs * 2.0**-20


def normal(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2e-3


def is_inside(delta: Tensor, band: Band) -> Tensor:
    """Mask of a band whose bounds are not tied: the lower bound is in it, the upper one is not."""
    assert not band.tied
    return (delta.abs() >= band.low) & (delta.abs() < band.high)


def expected_count(delta: Tensor, band: Band) -> float:
    """How many elements the band keeps on average; one drawn number decides at both bounds."""
    size = delta.abs()
    at_low, at_high = int((size == band.low).sum()), int((size == band.high).sum())
    if band.low == band.high:
        return at_low * min(band.low_share, band.high_share)
    between = int(((size > band.low) & (size < band.high)).sum())
    return between + at_low * band.low_share + at_high * band.high_share


def rounding(size: int, edges: int) -> float:
    """Elements that a table's rounded ranks may be off by; nothing is rounded in a full one."""
    return edges * (size / (2 * TABLE) + 0.5) if size > TABLE + 1 else 1e-6 * size


@given(size=st.integers(1, 300), seed=st.integers(0, 99), data=st.data())
def test_a_band_keeps_exactly_the_elements_of_its_ranks(size, seed, data):
    delta = distinct(size, seed)
    first = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(1, size - first))
    band = Magnitudes.of(delta.abs()).band(first, count)
    ranks = delta.abs().argsort().argsort()
    wanted = (ranks >= first) & (ranks < first + count)
    assert torch.equal(is_inside(delta, band), wanted)
    kept = float(delta.double()[wanted].abs().sum())
    total = float(delta.double().abs().sum())
    assert band.mass == pytest.approx(kept, rel=1e-12)
    assert band.total == pytest.approx(total, rel=1e-12)
    assert kept < 1e-7 or band.rescale == pytest.approx(total / kept, rel=1e-12)


@pytest.mark.parametrize("size", [TABLE - 1, TABLE, TABLE + 1])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (12_345, 1), (777, 50_001), (65_000, 535)])
def test_ranks_are_exact_up_to_the_size_of_the_table(size, first, count):
    delta = distinct(size, 3)
    band = Magnitudes.of(delta.abs()).band(first, count)
    ranks = delta.abs().argsort().argsort()
    wanted = (ranks >= first) & (ranks < first + count)
    assert torch.equal(is_inside(delta, band), wanted)
    assert band.mass == pytest.approx(float(delta.double()[wanted].abs().sum()), rel=1e-11)


@pytest.mark.parametrize("size", [TABLE + 2, 300_000, 1_000_000])
def test_kept_share_of_a_large_tensor_is_right_to_the_rounding_of_its_ranks(size):
    delta = normal(size, size)
    magnitudes = Magnitudes.of(delta.abs())
    for density in DENSITIES:
        kept = int(density * size)
        above = magnitudes.band(size - kept, kept)
        assert expected_count(delta, above) == pytest.approx(kept, abs=rounding(size, 1))
        top = min(size // 20, size - kept)
        between = magnitudes.band(size - kept - top, kept)
        assert expected_count(delta, between) == pytest.approx(kept, abs=rounding(size, 2))


def test_mass_of_a_large_tensor_is_that_of_what_its_bounds_keep():
    delta = torch.linspace(1e-5, 1, 400_000).flip(0)  # no two are equal
    assert delta.unique().numel() == delta.numel()
    band = Magnitudes.of(delta.abs()).band(100_003, 200_001)
    kept = float(delta.double()[is_inside(delta, band)].sum())
    assert band.mass == pytest.approx(kept, rel=1e-12)
    assert band.rescale == pytest.approx(float(delta.double().sum()) / kept, rel=1e-12)


# Distinct magnitudes: few make groups of many table steps, many groups of less than one.
@pytest.mark.parametrize("levels", [1, 2, 5, 300, 20_000, 150_000])
@pytest.mark.parametrize("size", [1_000, TABLE + 1, 300_000])
def test_shares_at_the_bounds_make_up_the_wanted_count_among_equals(size, levels):
    generator = torch.Generator().manual_seed(levels)
    delta = torch.randint(1 - levels, levels, (size,), generator=generator) * 2.0**-20
    magnitudes = Magnitudes.of(delta.abs())
    for density in DENSITIES:
        kept = int(density * size)
        above = magnitudes.band(size - kept, kept)
        assert expected_count(delta, above) == pytest.approx(kept, abs=rounding(size, 1))
        top = min(size // 20, size - kept)
        between = magnitudes.band(size - kept - top, kept)
        assert expected_count(delta, between) == pytest.approx(kept, abs=rounding(size, 2))


@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    data=st.data(),
)
def test_bounds_among_equals_are_those_of_the_sorted_magnitudes(values, data):
    delta = torch.tensor(values, dtype=torch.float32)
    first = data.draw(st.integers(0, len(values) - 1))
    count = data.draw(st.integers(1, len(values) - first))
    band = Magnitudes.of(delta.abs()).band(first, count)
    ordered = sorted(map(abs, values))
    assert band.low == ordered[first]
    assert band.high == (ordered[first + count] if first + count < len(values) else math.inf)
    assert 0 <= band.low_share <= 1
    assert 0 <= band.high_share <= 1
    assert expected_count(delta, band) == pytest.approx(count, abs=1e-5)
    assert band.mass == sum(ordered[first : first + count])


@pytest.mark.parametrize("size", [2, 10, 1_000, 200_000])
@pytest.mark.parametrize("value", [0.0, 2.0**-9])
def test_all_equal_are_kept_by_share(size, value):
    delta = torch.full((size,), value)
    magnitudes = Magnitudes.of(delta.abs())
    above, between = magnitudes.band(size // 2, size - size // 2), magnitudes.band(0, size // 2)
    assert (above.low, above.high, between.low, between.high) == (value, math.inf, value, value)
    assert expected_count(delta, above) == pytest.approx(size / 2, abs=rounding(size, 1))
    assert expected_count(delta, between) == pytest.approx(size / 2, abs=rounding(size, 2))
    assert above.tied
    assert between.tied
    wanted = 2.0 if value else 1.0
    assert above.rescale == pytest.approx(wanted, rel=1e-4)


def test_one_element_is_kept_or_not():
    magnitudes = Magnitudes.of(torch.tensor([[3.0]]))
    assert magnitudes.band(0, 1) == Band(3.0, math.inf, 1.0, 0.0, 3.0, 3.0)
    assert magnitudes.band(0, 0) == NOTHING


@pytest.mark.parametrize("count", [0, -1])
def test_a_band_of_no_elements_keeps_nothing(count):
    delta = normal(1_000, 0)
    band = Magnitudes.of(delta.abs()).band(500, count)
    assert not is_inside(delta, band).any()
    assert band.rescale == 1.0


def test_a_tensor_without_elements_has_an_empty_band():
    magnitudes = Magnitudes.of(torch.empty(0, 5))
    assert magnitudes.size == 0
    assert magnitudes.band(0, 1) == NOTHING


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_a_tensor_without_elements_is_merged(method):
    nothing = torch.empty(0, 4)
    assert trimmed(method, nothing, nothing, density=0.5).shape == (0, 4)


@pytest.mark.parametrize(
    ("mass", "total", "rescale"),
    [(1.0, 4.0, 4.0), (9e-8, 4.0, 1.0), (9e-8, 9e-8, 1.0), (0.0, 0.0, 1.0), (1e-7, 3e-7, 3.0)],
)
def test_rescale_is_one_where_a_norm_is_tiny(mass, total, rescale):
    assert Band(0.0, math.inf, 1.0, 0.0, mass, total).rescale == pytest.approx(rescale)


def test_order_and_shape_of_the_elements_do_not_matter():
    delta = normal(6_000, 1)
    one = Magnitudes.of(delta.abs()).band(2_000, 1_234)
    shuffled = delta.roll(789).reshape(20, 300).T
    assert Magnitudes.of(shuffled.abs()).band(2_000, 1_234) == one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.05, 0.31, 0.5, 0.9])
@pytest.mark.parametrize(
    ("method", "gamma"), [("ties", None), ("breadcrumbs", 0.1), ("breadcrumbs_ties", 0.02)]
)
def test_merging_keeps_the_density_of_16_bit_donors(method, gamma, density, dtype):
    # Differences of 16-bit numbers lie on a grid: many are equal, and some of the bound's are kept.
    base = (normal(400_000, 1) * 10).to(dtype)
    donor = (base.float() + 0.5 * normal(400_000, 2)).to(dtype)
    delta = donor.float() - base.float()
    assert int(delta.unique().numel()) < 20_000
    parameters = {"density": density} | ({} if gamma is None else {"gamma": gamma})
    # Zeros are ranked as well, but one that is kept cannot be told from one that is not.
    zeros = int((delta == 0).sum())
    present = 400_000 - zeros
    top = min(int((gamma or 0) * 400_000), 400_000 - int(density * 400_000))
    wanted = min(int(density * 400_000), present - top)
    kept = int((trimmed(method, base, donor, **parameters) != base.float()).sum())
    assert kept / 400_000 == pytest.approx(wanted / 400_000, abs=1e-3)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("size", [1_000, 200_000])
def test_merging_keeps_the_density_where_all_changes_are_equal(method, size):
    gamma = {} if method == "ties" else {"gamma": 0.1}
    merged = trimmed(method, torch.zeros(size), torch.ones(size), density=0.5, **gamma)
    assert int(merged.count_nonzero()) == pytest.approx(size / 2, abs=5e-3 * size)
    rescaled = trimmed(
        method, torch.zeros(size), torch.ones(size), density=0.5, rescale=True, **gamma
    )
    assert float(rescaled.sum()) == pytest.approx(size, rel=5e-3)


# Variances over several donors


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.2, 0.73, 1.0])
@pytest.mark.parametrize("size", [1, 50, 65_537, 300_000])
def test_most_varied_elements_are_those_of_a_sort(size, share):
    generator = torch.Generator().manual_seed(3)
    deltas = list(torch.randn(3, size, generator=generator))
    varied = torch.stack(deltas).var(0, unbiased=False)
    kept = size if share == 1 else int(share * size)
    chosen = varied.argsort(descending=True)[:kept]
    band, change = Variances.of(torch.zeros(size), deltas).largest(share)
    slack = 0 if size <= 65_537 else 7.6e-6 * size + 1
    assert abs(int((variance(deltas) >= band.low).sum()) - kept) <= slack
    wanted = torch.stack([delta.double()[chosen].square().sum() / size for delta in deltas])
    torch.testing.assert_close(change, wanted, rtol=1e-6, atol=2 * slack * 30 / size)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("levels", [3, 40, 100_000])  # many donors' elements of one variance, few
def test_sums_of_changes_are_off_by_no_more_than_those_of_nearly_the_lowest_variance(levels, share):
    size, generator = 1_200_000, torch.Generator().manual_seed(7)
    wide = torch.randint(1, levels + 1, (size,), generator=generator) / levels
    shift = torch.randn(size, generator=generator)  # no variance, and most of the changes
    deltas = [shift + wide, shift - wide, shift]
    varied = variance(deltas)
    band, change = Variances.of(torch.zeros(size), deltas).largest(share)
    squares = torch.stack(deltas).double().square()
    above, near = varied > band.low, (varied / band.low - 1).abs() <= 2.0**-8
    least = squares[:, above & ~near].sum(1) / size
    most = squares[:, above | near].sum(1) / size
    assert bool((least * (1 - 1e-9) <= change).all() & (change <= most * (1 + 1e-9)).all())


def test_equal_tensors_have_no_variance_at_all():
    delta = torch.randn(1000, generator=torch.Generator().manual_seed(4))
    assert not variance([delta] * 3).any()
    assert Variances.of(torch.zeros(1000), [delta] * 3).positive == 0


@pytest.mark.parametrize("size", [1, 7, 1000, TABLE + 5])
def test_sums_between_ranks_are_the_same_however_they_are_added(size):
    numbers = normal(size, 5).abs().sort().values
    starts = torch.arange(0, size, 3)
    expected = [float(part.double().sum()) for part in numbers.split(3)]
    for found in (segment_sums(numbers, starts), segment_sums_on_device(numbers, starts)):
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-12)
