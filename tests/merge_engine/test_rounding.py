"""Which elements kernels choose, in the arithmetic that compilers for a GPU are free to use."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from in_memory import in_memory
from merge_engine.building.merging import merge_into
from merge_engine.methods import METHODS, Elementwise
from merge_engine.methods.task_vectors import sparse_sum, trim
from merge_engine.numerics.kernel_runner import KernelRunner
from merge_engine.numerics.statistics import variance
from merge_engine.recipe.recipe_file import parse_recipe

ELEMENTWISE = [name for name, method in METHODS.items() if isinstance(method, Elementwise)]
ADD, SUB, MUL, DIV = (getattr(torch.ops.aten, name).Tensor for name in ("add", "sub", "mul", "div"))


class FusedArithmetic(TorchDispatchMode):
    """Rounds a product and the sum it is a term of once, and divides by way of a reciprocal.

    Products of float32 are exact in float64. Where both terms are products the last is fused, or
    the ``first``.
    """

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self.fused = 0  # number of sums
        self._order = (0, 1) if first else (1, 0)
        self._products: dict[int, tuple[Tensor, Tensor]] = {}  # rounded and exact, by identity

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DIV:
            reciprocal = torch.ones(()) / args[1]
            return args[0] * reciprocal
        result = func(*args, **(kwargs or {}))
        if func in (ADD, SUB):
            return self._sum(func, args, result)
        if func is MUL and result.dtype == torch.float32:
            self._products[id(result)] = result, _exact(args[0]) * _exact(args[1])
        return result

    def _sum(self, func: Any, terms: Any, unfused: Tensor) -> Tensor:
        for place in self._order:
            if product := self._products.get(id(terms[place])):
                exact = [_exact(term) for term in terms]
                exact[place] = product[1]
                self.fused += 1
                return func(*exact).float()
        return unfused


def _exact(number: Any) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float32).double()


class FusedRunner(KernelRunner):
    """Runs kernels in fused arithmetic; what is measured of the donors is not fused."""

    @override
    def write(self, *args: Any, **values: Any) -> None:
        with FusedArithmetic():
            super().write(*args, **values)


def family(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    """A base and donors in bfloat16, whose changes are often equal or opposite."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator) * 0.02
    deltas = [torch.randn(shape, generator=generator) * 2e-4 for _ in range(count)]
    return [tensor.bfloat16() for tensor in (base, *(base + delta for delta in deltas))]


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("weight", [0.7, 1 / 3])
def test_merge_in_fused_arithmetic_differs_by_rounding_alone(method, weight):
    count = METHODS[method].donors[1] or 5
    wanted = {"weight": weight, "density": 0.6, "gamma": 0.05, "select_topk": 0.4, "t": 1e-4}
    mapping = {
        "merge_method": method,
        "base_model": "m0",
        "models": [{"model": f"m{donor}"} for donor in range(1, count + 1)],
        "parameters": {name: wanted[name] for name in METHODS[method].params if name in wanted},
    }
    recipe, _ = parse_recipe(mapping, where="test")
    base, *donors = family(count, (300, 200))
    found = []
    for runner in (KernelRunner(compiled=False), FusedRunner(compiled=False)):
        found.append(torch.empty(base.shape))
        merge_into(found[-1], recipe, "x", in_memory([base, *donors], runner))
    largest = max(float((donor.float() - base.float()).abs().max()) for donor in donors)
    steps = 2.0**-23 * max(largest, float(base.float().abs().max()))
    assert float((found[0] - found[1]).abs().max()) <= 4 * steps


def changes(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[list[Tensor]]:
    """Task vectors of two to five donors, (size,) each."""

    def of(count: int) -> st.SearchStrategy[list[Tensor]]:
        rows = st.lists(st.lists(numbers, min_size=count, max_size=count), min_size=1, max_size=30)
        return rows.map(lambda rows: [*torch.tensor(rows, dtype=torch.float32).T])

    return st.integers(2, 5).flatmap(of)


# Small multiples of one step cancel out often.
@given(changes(st.integers(-3, 3)), st.integers(1, 1_500).map(lambda k: k / 1_000), st.booleans())
def test_equal_weights_elect_the_same_signs_in_fused_arithmetic(deltas, weight, first):
    base, equal = torch.zeros_like(deltas[0]), torch.full((len(deltas),), weight)
    donors = [delta * 2.0**-9 for delta in deltas]
    values = {"factor": equal, "weight": equal, "lambda_": 1.0}
    values |= {"low": 0 * equal, "low_share": equal}
    expected = sparse_sum(trim)(base, donors, **values)
    with FusedArithmetic(first=first):
        found = sparse_sum(trim)(base, donors, **values)
    assert torch.equal(found.sign(), expected.sign())


@given(changes(st.floats(-1, 1, width=16)), st.booleans())
def test_variances_are_equal_to_the_bit_in_fused_arithmetic(deltas, first):
    expected = variance(deltas)
    with FusedArithmetic(first=first):
        found = variance(deltas)
    assert torch.equal(found, expected)
