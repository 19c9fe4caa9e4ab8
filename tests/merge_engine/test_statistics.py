"""Ranks within rows, as della's chances need them, and salient elements."""

import pytest
import torch

from merge_engine.numerics.statistics import (
    row_ranks,
    row_width,
    salient,
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
def test_every_rank_of_a_wide_row_is_distinct(width):
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
