"""Statistics of several models' tensors are those of the formula."""

import torch

from in_memory import in_memory
from merge_engine.models.model_set import ModelSet


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
