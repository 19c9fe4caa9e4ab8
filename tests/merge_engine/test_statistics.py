"""Ranks within rows, as della's chances need them, and the order of variances that sce needs."""

import pytest
import torch

from in_memory import in_memory
from merge_engine.numerics.order_statistics import Variances
from merge_engine.numerics.statistics import (
    row_ranks,
    row_width,
    salient,
    variance,
)

SHAPES = [(), (1,), (97,), (5, 1), (1, 7), (64, 48), (3, 8, 5), (2, 6, 3, 4), (0,), (0, 4), (4, 0)]


def expected_ranks(delta):
    rows = delta.abs().float() if delta.dim() > 1 else delta.abs().float().reshape(1, -1)
    return rows.argsort(dim=1, stable=True).argsort(dim=1, stable=True).reshape(delta.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_those_of_a_double_argsort(shape, dtype):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ranks = row_ranks(delta)
    assert (ranks.shape, ranks.dtype) == (delta.shape, torch.int32)
    assert torch.equal(ranks.long(), expected_ranks(delta))


@pytest.mark.parametrize("width", [65_536, 65_537])
def test_every_rank_of_a_wide_row_has_room(width):
    delta = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    ranks = row_ranks(delta)
    shares = ranks / (width - 1)
    wanted = expected_ranks(delta).double() / (width - 1)
    assert (shares.double() - wanted).abs().max() < 1e-7
    assert (float(shares.min()), float(shares.max())) == (0.0, 1.0)


def test_equals_are_ranked_in_their_order():
    assert row_ranks(torch.tensor([[2.0, -1.0, 2.0, 1.0, -0.0, 0.0]])).tolist() == [
        [4, 2, 5, 3, 0, 1]
    ]


def test_rows_run_along_the_second_dimension():
    assert [row_width(shape) for shape in ((), (7,), (3, 5), (3, 5, 2))] == [1, 7, 5, 5]


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


def test_elements_are_counted_by_who_changed_them():
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    first = torch.tensor([3.0, 0.1, -2.0, 0.0, 1.0, 2.0])
    second = torch.tensor([3.0, 0.0, 0.1, -0.2, 5.0, 2.0])
    family = in_memory([base, first, second])
    assert family.measurements.overlaps("x", ("m1", "m2"), "m0", 0.05).tolist() == [[1, 2], [2, 2]]
    assert family.measurements.overlaps("x", ("m2", "m1"), "m0", 0.1).tolist() == [[2, 1], [1, 1]]
    assert family.measurements.overlaps("x", ("m1",), "m0", 0.0).tolist() == [[3], [0]]


def test_elements_are_counted_exactly_over_many_stretches():
    generator = torch.Generator().manual_seed(5)
    changed = torch.rand(2, 2_300_001, generator=generator) < 0.6
    family = in_memory([torch.zeros(2_300_001), *changed.float()])
    found = family.measurements.overlaps("x", ("m1", "m2"), "m0", 0.5)
    alone = [int((changed[i] & ~changed[1 - i]).sum()) for i in range(2)]
    assert found.tolist() == [alone, [int(changed.all(0).sum())] * 2]


@pytest.mark.parametrize("shape", [(), (70_001,), (3, 40_000), (90, 1_000), (6, 50, 300), (0, 4)])
def test_salient_elements_are_those_of_the_formula_taken_at_once(shape):
    generator = torch.Generator().manual_seed(6)
    base, donor = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    p, q = donor.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    importance = (donor - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    wanted = torch.ones(shape, dtype=torch.bool)
    if importance.numel():
        quarters = torch.linspace(0, 1, 5, dtype=torch.float64)[1:4]
        low, median, high = importance.quantile(quarters, interpolation="lower")
        wanted = importance >= median + 1.5 * (high - low)
    found = salient(base.float(), donor.float())
    assert (found.shape, found.dtype) == (torch.Size(shape), torch.bool)
    assert int((found != wanted).sum()) <= 1e-5 * found.numel()  # of those at the threshold
