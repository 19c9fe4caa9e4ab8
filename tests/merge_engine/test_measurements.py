"""Statistics of several models' tensors are those of the formula."""

import math

import pytest
import torch

from in_memory import in_memory
from merge_engine.models import measurements as measuring
from merge_engine.models.measurements import ELEMENTWISE
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.packing import TensorPack


def test_gram_is_that_of_the_task_vectors(zoo):
    models = tuple(str(zoo / name) for name in "ab")
    model_set = ModelSet.open([str(zoo / "base"), *models])
    name = "model.layers.1.mlp.up_proj.weight"
    base = model_set.read(str(zoo / "base"), name).double()
    rows = torch.stack(
        [model_set.read(model, name).double() - base for model in models]
    )  # (n, r, c)
    expected = torch.einsum("irc,jrc->rij", rows, rows)
    by_row = model_set.measurements.gram(name, models, str(zoo / "base"), dim=-1)
    torch.testing.assert_close(by_row, expected)
    whole = model_set.measurements.gram(name, models, str(zoo / "base"))
    torch.testing.assert_close(whole, expected.sum(0))


def test_elements_are_counted_by_the_donors_that_change_them():
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    first = torch.tensor([3.0, 0.1, -2.0, 0.0, 1.0, 2.0])
    second = torch.tensor([3.0, 0.0, 0.1, -0.2, 5.0, 2.0])
    models = in_memory([base, first, second])
    assert models.measurements.overlaps("x", ("m1", "m2"), "m0", 0.05).tolist() == [[1, 2], [2, 2]]
    assert models.measurements.overlaps("x", ("m2", "m1"), "m0", 0.1).tolist() == [[2, 1], [1, 1]]
    assert models.measurements.overlaps("x", ("m1",), "m0", 0.0).tolist() == [[3], [0]]


def test_elements_are_counted_exactly_over_many_chunks():
    generator = torch.Generator().manual_seed(5)
    changed = torch.rand(2, 2_300_001, generator=generator) < 0.6
    models = in_memory([torch.zeros(2_300_001), *changed.float()])
    found = models.measurements.overlaps("x", ("m1", "m2"), "m0", 0.5)
    alone = [int((changed[i] & ~changed[1 - i]).sum()) for i in range(2)]
    assert found.tolist() == [alone, [int(changed.all(0).sum())] * 2]


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (4, 3, 2), (0, 3)])
def test_rank_shares_are_the_same_however_many_rows_are_ranked_at_a_time(shape, monkeypatch):
    base, donor = torch.randn(2, *shape, generator=torch.Generator().manual_seed(6))
    whole = ELEMENTWISE["rank_share"](base, donor)
    assert whole.shape == base.shape
    if math.prod(shape) > 1:
        assert (whole.min(), whole.max()) == (0, 255)
    monkeypatch.setattr(measuring, "_PIECE", 1)
    assert torch.equal(ELEMENTWISE["rank_share"](base, donor), whole)


def test_task_vectors_are_the_same_however_many_elements_are_taken_at_a_time(monkeypatch):
    tensors = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(7)).bfloat16()
    models = in_memory([*tensors])
    monkeypatch.setattr(measuring, "_PIECE", 3)
    found = models.measurements.magnitudes("x", "m1", "m0")
    delta = (tensors[1].float() - tensors[0].float()).abs()
    assert torch.equal(found.values, delta.flatten().sort().values)


def test_statistics_as_large_as_the_weights_are_freed_when_builds_no_longer_use_them():
    models = in_memory([*torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(8))])
    pack, own = TensorPack({"x": (5, 7)}), models.measurements
    own.elementwise("rank_share", pack, "m1", "m0")
    own.gram("x", ("m1",), "m0")
    for _ in range(measuring.IDLE_BUILDS):
        own.end_build()
    ranks = own.elementwise("rank_share", pack, "m1", "m0")
    for _ in range(measuring.IDLE_BUILDS):
        own.end_build()
        assert own.elementwise("rank_share", pack, "m1", "m0") is ranks
    for _ in range(measuring.IDLE_BUILDS + 1):
        own.end_build()
    assert [key[0] for key in own.kept] == ["gram, dim None, from the last"]
