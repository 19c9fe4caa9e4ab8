"""Every method against mergekit 0.1.5's own kernels, and against what it promises."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors, registered_methods
from torch import Tensor

from merge_engine.builder import merge_tensor
from merge_engine.donors import Family, TensorInfo
from merge_engine.methods import METHODS, Base, Elementwise
from merge_engine.recipe import Recipe

# rms(e)/rms(w) and max|e|/max|w| against mergekit in float32: twice its own distance from float64.
TOLERANCES = {
    "linear": (2e-7, 1e-6),
    "slerp": (3e-6, 1e-5),
    "task_arithmetic": (1e-7, 1e-6),
    "model_stock": (5e-7, 2e-6),
    "ties": (1e-7, 1e-6),
    "dare_linear": (1e-7, 1e-6),
    "dare_ties": (1e-7, 1e-6),
}
SHAPES = [(64, 48), (1, 33), (33, 1), (97,), (1,), (3, 8, 5)]
RANDOM = [m for m, row in METHODS.items() if isinstance(row, Elementwise) and row.random]
FIXED = [m for m in METHODS if m not in RANDOM]
DEVICE = torch.device("cpu")


class InMemory(Family):
    """A family whose one tensor lives in memory: model i is tensor i."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.stored = {f"m{i}": tensor for i, tensor in enumerate(tensors)}
        self.reference = self
        self._grams = {}
        self.tensors = {"x": TensorInfo(None, tuple(tensors[0].shape), tensors[0].dtype)}

    def read(self, model: str, name: str) -> Tensor:
        return self.stored[model]

    def depth(self, name: str) -> float:
        return 0.0


def recipe_of(method: str, count: int, per_donor: dict, shared: dict) -> Recipe:
    row = METHODS[method]
    base = None if row.base is Base.INPUT else "m0"
    donors = [f"m{i}" for i in range(count) if row.base is not Base.ORIGIN or i]
    return Recipe.model_validate(
        {
            "merge_method": method,
            "base_model": base,
            "models": [
                {"model": m, "parameters": {k: v[i] for k, v in per_donor.items()}}
                for i, m in enumerate(donors)
            ],
            "parameters": shared,
        }
    )


def merged(method: str, tensors: Sequence[Tensor], per_donor: dict, shared: dict) -> Tensor:
    recipe = recipe_of(method, len(tensors), per_donor, shared)
    return merge_tensor(recipe, "x", InMemory(tensors), DEVICE)


def oracle(method: str, tensors: Sequence[Tensor], per_donor: dict, shared: dict) -> Tensor:
    base_index = None if METHODS[method].base is Base.INPUT else 0
    parameters = {**{k: list(v) for k, v in per_donor.items()}, **shared}
    floats = [tensor.float() for tensor in tensors]
    return merge_tensors(floats, method, parameters=parameters, base_index=base_index)


def assert_close(mine: Tensor, theirs: Tensor, method: str, tensors: Sequence[Tensor]) -> None:
    assert mine.dtype == torch.float32
    assert mine.shape == theirs.shape
    error = mine.double() - theirs.double()
    size = torch.stack([tensor.double() for tensor in (theirs, *tensors)])  # what was rounded
    rms, largest = TOLERANCES[method]
    assert error.pow(2).mean().sqrt() <= rms * size.pow(2).mean().sqrt() + 1e-12
    assert error.abs().max() <= largest * size.abs().max() + 1e-12


def make_tensors(count: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.02
    deltas = [torch.randn(shape, generator=generator) * 2e-3 for _ in range(count - 1)]
    return [tensor.to(dtype) for tensor in (base, *(base + delta for delta in deltas))]


def degenerate(tensors: list[Tensor], kind: str) -> list[Tensor]:
    first, *others = tensors
    if kind == "untouched donor":
        return [*tensors[:-1], first.clone()]
    if kind == "same donors":
        return [first, *(others[0].clone() for _ in others)]
    return [first.clone() for _ in tensors] if kind == "all the same" else tensors


@st.composite
def cases(draw, method: str):
    row = METHODS[method]
    count = 2 if row.donors == (2, 2) else draw(st.integers(max(2, row.donors[0] + 1), 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 999))
    kind = draw(
        st.sampled_from(["ordinary"] * 2 + ["untouched donor", "same donors", "all the same"])
    )
    tensors = degenerate(make_tensors(count, shape, seed, dtype), kind)
    owners = count - (row.base is Base.ORIGIN)
    choices = {
        "weight": st.sampled_from([-0.7, 0.0, 0.3, 1.0, 1.4]),
        "density": st.sampled_from([0.05, 0.31, 0.5, 0.9, 1.0]),
        "normalize": st.booleans(),
        "rescale": st.booleans(),
        "filter_wise": st.booleans(),
        "lambda": st.sampled_from([1.0, 0.35, 1.3]),
        "t": st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.2]),
    }
    active = {name: param for name, param in row.params.items() if param.effect}
    per_donor = {
        name: draw(st.lists(choices[name], min_size=owners, max_size=owners))
        for name, param in active.items()
        if param.per_donor
    }
    shared = {name: draw(choices[name]) for name, param in active.items() if not param.per_donor}
    if shared.get("normalize"):  # an average over next to nothing amplifies rounding
        assume(abs(sum(per_donor["weight"])) > 0.25)
    return tensors, per_donor, shared


@pytest.mark.oracle
@pytest.mark.parametrize("method", FIXED)
@given(data=st.data())
def test_method_equals_mergekit(method, data):
    tensors, per_donor, shared = data.draw(cases(method))
    theirs = oracle(method, tensors, per_donor, shared)
    if method == "model_stock":  # near the pole of t = n c / (1 + (n-1) c) rounding is amplified
        reach = max(float((tensor.float() - tensors[0].float()).abs().max()) for tensor in tensors)
        assume(float((theirs - tensors[0].float()).abs().max()) <= 2 * reach)
    if method == "ties" and min(per_donor["density"]) < 1:
        # Which of several equal magnitudes is kept is nobody's promise: compare where it is clear.
        deltas = [tensor.float() - tensors[0].float() for tensor in tensors[1:]]
        assume(not any(has_equal_magnitudes(delta) for delta in deltas))
    assert_close(merged(method, tensors, per_donor, shared), theirs, method, tensors)


def has_equal_magnitudes(delta: Tensor) -> bool:
    return bool(len(delta.abs().unique()) < delta.numel() and delta.any())


@pytest.mark.oracle
@pytest.mark.parametrize("method", RANDOM)
@given(data=st.data())
def test_random_method_equals_mergekit_under_its_masks(method, data):
    tensors, per_donor, shared = data.draw(cases(method))
    base, donors = tensors[0].float(), [tensor.float() for tensor in tensors[1:]]
    torch.manual_seed(0)
    masks = [
        torch.bernoulli(torch.full_like(base, density)) if density < 1 else torch.ones_like(base)
        for density in per_donor["density"]
    ]
    torch.manual_seed(0)
    theirs = oracle(method, tensors, per_donor, shared)
    noise = [1 - mask for mask in masks]  # below any density where the mask keeps
    values = {k if k != "lambda" else "lambda_": v for k, v in (per_donor | shared).items()}
    assert_close(
        METHODS[method].kernel(base, donors, noise=noise, **values), theirs, method, tensors
    )


@pytest.mark.oracle
@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_defaults_are_mergekits(method):
    spec = next(row for row in registered_methods() if row.spec.name == method).spec
    theirs = {p.name: p for p in spec.parameters}
    mine = METHODS[method].params
    assert set(mine) == set(theirs)
    for name, param in mine.items():
        required = param.default is None
        assert required or param.default == theirs[name].default, name
        assert param.per_donor == (theirs[name].scope.value != "shared"), name


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.base is Base.ORIGIN])
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_of_the_base_merge_to_the_base(method, shape):
    base = make_tensors(1, shape, 0, torch.float32)[0]
    per_donor = {"weight": [0.4, 1.1, -0.2]} if "weight" in METHODS[method].params else {}
    result = merged(method, [base] * 4, per_donor, {})
    torch.testing.assert_close(result, base, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if "lambda" in row.params])
def test_scale_zero_is_the_base(method):
    tensors = make_tensors(4, (16, 8), 1, torch.float32)
    result = merged(method, tensors, {"weight": [0.4, 1.1, 0.2]}, {"lambda": 0.0})
    assert torch.equal(result, tensors[0])


@pytest.mark.parametrize(
    "method",
    [m for m in FIXED if METHODS[m].donors != (2, 2)],
)
def test_order_of_donors_does_not_matter(method):
    base, *donors = make_tensors(4, (16, 8), 2, torch.float32)
    weight = {"weight": [0.4, 1.1, 0.2]} if "weight" in METHODS[method].params else {}
    turned = {"weight": [0.2, 1.1, 0.4]} if weight else {}
    if METHODS[method].base is Base.INPUT:
        weight, turned = {"weight": [0.4, 1.1, 0.2]}, {"weight": [0.2, 1.1, 0.4]}
        one, other = merged(method, donors, weight, {}), merged(method, donors[::-1], turned, {})
    else:
        one = merged(method, [base, *donors], weight, {})
        other = merged(method, [base, *donors[::-1]], turned, {})
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_are(method):
    tensors = make_tensors(2 if METHODS[method].donors == (2, 2) else 4, (16, 8), 3, torch.float32)
    before = [tensor.clone() for tensor in tensors]
    owners = len(tensors) - (METHODS[method].base is Base.ORIGIN)
    per_donor = {"weight": [0.5] * owners} if "weight" in METHODS[method].params else {}
    merged(method, tensors, per_donor, {"t": 0.5} if method == "slerp" else {})
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


@given(size=st.integers(1, 200), density=st.floats(0.001, 1.0), seed=st.integers(0, 99))
def test_ties_keeps_the_share_it_is_asked_for(size, density, seed):
    base, donor = make_tensors(2, (size,), seed, torch.float32)
    result = merged("ties", [base, donor], {"weight": [1.0], "density": [density]}, {})
    changed = int((result != base).sum())
    assert changed <= max(1, int(density * size))
    assert changed >= max(1, int(density * size)) - 1  # a kept delta below the base's own rounding


def test_dare_keeps_the_share_it_is_asked_for_and_the_norm():
    base, donor = make_tensors(2, (400, 500), 4, torch.float32)
    result = merged("dare_linear", [base, donor], {"weight": [1.0], "density": [0.3]}, {})
    kept = (result != base).double().mean().item()
    assert abs(kept - 0.3) < 4 * math.sqrt(0.3 * 0.7 / base.numel())
    ratio = (result - base).abs().sum() / (donor - base).abs().sum()
    assert abs(ratio - 1) < 1e-4


def test_average_over_nothing_is_refused():
    with pytest.raises(ValueError, match=r"weights \[1.0, -1.0\] sum to 0"):
        merged("linear", make_tensors(2, (4,), 0, torch.float32), {"weight": [1.0, -1.0]}, {})


def test_undiminished_donor_alone_is_the_donor_bit_for_bit():
    tensors = make_tensors(4, (16, 8), 5, torch.float32)
    result = merged("task_arithmetic", tensors, {"weight": [0.0, 1.0, 0.0]}, {})
    assert torch.equal(result, tensors[2])


def test_every_row_has_a_paper_and_every_searched_parameter_a_legal_range():
    for row in METHODS.values():
        assert row.paper.startswith("https://")
        assert isinstance(row, Elementwise) or hasattr(row, "coefficients")
        for param in row.params.values():
            if param.search:
                assert param.valid[0] <= param.search[0] < param.search[1] <= param.valid[1]
