"""Kernels in chunks and compiled: the same numbers, written in place, whatever the sizes are."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from in_memory import in_memory
from merge_engine.building.merging import merge_into
from merge_engine.methods import METHODS, Base
from merge_engine.methods.linear import weighted_sum
from merge_engine.methods.task_vectors import (
    drop_at_random,
    drop_by_rank,
    l1_norms,
    sparse_sum,
    trim,
)
from merge_engine.numerics import kernel_runner
from merge_engine.numerics.kernel_runner import (
    CHUNK,
    KERNELS,
    PAYS,
    KernelRunner,
    compiler_options,
    compiling_pays,
    configure_compiler,
)
from merge_engine.numerics.noise import LEVELS, key_of, level
from merge_engine.numerics.packing import WIDTH, TensorPack
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import parse_recipe
from uniform import uniform

SHAPES = [(1,), (2,), (1_000,), (401, 50), (200_001,)]
# dare_ties and breadcrumbs are made of parts that two others of these have, too.
COMPILED = [method for method in METHODS if method not in ("dare_ties", "breadcrumbs")]
COMPILED_IN_BFLOAT16 = ("task_arithmetic", "breadcrumbs_ties", "ram", "nearswap")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"
)  # inductor's imports
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


class Allocations(TorchDispatchMode):
    """Records the most elements of any tensor made meanwhile."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, leaf.numel())
        return result


@pytest.fixture(scope="module")
def chunked() -> KernelRunner:
    return KernelRunner(compiled=False)


@pytest.fixture(scope="module")
def compiled() -> Iterator[KernelRunner]:
    """One for all tests, so that nothing is compiled twice."""
    with torch._dynamo.config.patch(recompile_limit=256):
        configure_compiler()
        yield KernelRunner(compiled=True)


def make_tensors(
    count: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.02
    deltas = [torch.randn(shape, generator=generator) * 2e-3 for _ in range(count - 1)]
    return [tensor.to(dtype) for tensor in (base, *(base + delta for delta in deltas))]


def recipe_of(method: str, weights: tuple[float, ...] = (0.4, 1.1)) -> Recipe:
    """A recipe of m0 as base, if the method has one, and as many donors as it takes."""
    row = METHODS[method]
    base = row.base is not Base.INPUT
    names = ["m0", "m1"] if row.base is Base.ENDPOINT else ["m1", "m2"]
    names = names[: row.donors[1] or 2]
    per_donor: dict[str, Any] = {"weight": weights, "density": (0.31, 0.5), "gamma": (0.1, 0.05)}
    shared = {"t": 1e-3 if method == "nearswap" else 0.3, "select_topk": 0.3}
    mapping = {
        "merge_method": method,
        "models": [
            {
                "model": name,
                "parameters": {key: v[i] for key, v in per_donor.items() if key in row.params},
            }
            for i, name in enumerate(names)
        ],
        "parameters": {key: value for key, value in shared.items() if key in row.params},
    } | ({"base_model": "m0"} if base else {})
    recipe, _notes = parse_recipe(mapping, where="test")
    return recipe


def merged(method: str, tensors: list[Tensor], runner: KernelRunner, dtype: torch.dtype) -> Tensor:
    out = torch.full(tensors[0].shape, torch.nan, dtype=dtype)
    merge_into(out, recipe_of(method), "x", in_memory(tensors, runner))
    return out


def assert_same(one: Tensor, other: Tensor, terms: list[Tensor]) -> None:
    """Equal to two float32 steps of the largest term, and to one of 16-bit outputs' own steps.

    Such a step is only taken where the float32 results straddle the middle between two bfloat16.
    """
    assert one.dtype == other.dtype
    assert bool(one.isfinite().all())
    error = (one.double() - other.double()).abs()
    rounding = 2.0**-22 * max(float(term.abs().max()) for term in terms)
    if one.dtype == torch.bfloat16:
        assert (error > rounding).double().mean() <= 1e-3
        assert bool((error <= rounding + 2.0**-7 * other.double().abs()).all())
    else:
        assert float(error.max()) <= rounding


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", COMPILED)
def test_compiled_kernels_give_what_chunked_ones_give(method, chunked, compiled):
    # Compiling takes seconds a dtype, so each kernel has one; linear methods share two kernels.
    dtype = torch.bfloat16 if method in COMPILED_IN_BFLOAT16 else torch.float32
    for shape in SHAPES:
        tensors = make_tensors(3, shape, dtype=dtype)
        one, other = (merged(method, tensors, runner, dtype) for runner in (compiled, chunked))
        assert_same(one, other, tensors)


def test_the_sum_is_rounded_once_to_the_outputs_dtype(chunked):
    tensors = make_tensors(3, (1_000,), dtype=torch.bfloat16)
    exact, rounded = (
        merged("task_arithmetic", tensors, chunked, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert not torch.equal(exact, rounded.float())
    assert torch.equal(exact.bfloat16(), rounded)


def pack_of(size: int) -> TensorPack:
    return TensorPack({"x": (size,)})


@needs_compiler
@pytest.mark.slow
def test_a_kernel_is_compiled_once_whatever_sizes_values_and_keys_are(compiled):
    def write(size: int, density: float, seed: int) -> Tensor:
        base, *donors = make_tensors(3, (size,))
        values = {"factor": [density, 0.3], "keep_probability": [level(density), level(0.5)]}
        out = torch.empty(size)
        noise = pack_of(size).noise(seed, (0, 1), out.device, even=False)
        compiled.write(out, sparse_sum(drop_at_random), (base, donors), values, noise)
        return out

    write(10_000, 0.4, 3)
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size, density, seed in [(2, 0.9, 1), (8_192, 0.0, -5), (70_001, 1.0, 2**62)]:
            assert bool(write(size, density, seed).isfinite().all())
    assert counters["stats"]["unique_graphs"] == before


def test_number_of_rows_is_all_that_the_compiler_does_not_know(monkeypatch):
    unknown, compiler = [], torch.compile

    def record(graph, inputs, **_settings):
        unknown.append(sum(not torch.is_tensor(each) for each in inputs))
        return graph.forward

    def recorded(run, **settings):
        return compiler(run, backend=record, **settings)

    monkeypatch.setattr(torch, "compile", recorded)
    tensors = make_tensors(3, (5 * WIDTH + 7,))
    merged("ties", tensors, KernelRunner(compiled=True), torch.float32)
    assert unknown == [1]


def kept_by(runner: KernelRunner, size: int, chance: float, seed: int) -> Tensor:
    """Which elements of each donor are kept: bit i for donor i."""
    base, ones = torch.zeros(size), torch.ones(size)
    out = torch.empty(size)
    values = {"factor": [1.0, 2.0], "keep_probability": [level(chance)] * 2}
    noise = pack_of(size).noise(seed, (0, 1), out.device, even=False)
    runner.write(out, sparse_sum(drop_at_random), (base, [ones] * 2), values, noise)
    return out


def drawn_below(size: int, chance: float, seed: int) -> Tensor:
    drawn = [uniform(key_of(seed, "x", donor), (size,)) for donor in range(2)]
    return sum(2.0**i * (numbers < level(chance) / LEVELS) for i, numbers in enumerate(drawn))


@pytest.mark.parametrize("chunk", [1, 4_096, 10_000, 1 << 20])
def test_masks_do_not_depend_on_the_chunks(chunk, chunked, monkeypatch):
    monkeypatch.setattr(kernel_runner, "CHUNK", chunk)
    assert torch.equal(kept_by(chunked, 150_001, 0.3, 3), drawn_below(150_001, 0.3, 3))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 1_000, 200_001])
def test_masks_are_the_same_compiled(size, chunked, compiled):
    kept = kept_by(compiled, size, 0.3, 3)
    assert torch.equal(kept, kept_by(chunked, size, 0.3, 3))
    assert torch.equal(kept, drawn_below(size, 0.3, 3))


@pytest.mark.parametrize("chunk", [1, 10_000])
@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_the_chunks(method, chunk, chunked, monkeypatch):
    tensors = make_tensors(3, (230, 87), dtype=torch.bfloat16)
    whole = merged(method, tensors, chunked, torch.float32)
    monkeypatch.setattr(kernel_runner, "CHUNK", chunk)
    assert torch.equal(merged(method, tensors, chunked, torch.float32), whole)


@given(size=st.integers(1, 20_000), seed=st.integers(0, 2**31))
def test_equals_are_chosen_by_their_position_and_key_alone(size, seed):
    ones, values = torch.ones(size), {"factor": [1.0], "low": [1.0], "low_share": [level(0.4)]}
    results = []
    for step in (1, size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel_runner, "CHUNK", step)
            out = torch.empty(size)
            noise = pack_of(size).noise(seed, (0,), out.device, even=True)
            inputs = (torch.zeros(size), [ones])
            KernelRunner(compiled=False).write(out, sparse_sum(trim), inputs, values, noise)
        results.append(out)
    assert torch.equal(*results)
    # An even choice of 0.4 of them is right to a few elements, however many there are.
    assert abs(int(results[0].count_nonzero()) - 0.4 * size) <= 5


@pytest.mark.parametrize("size", [1, 1_000, 1_048_577])
@pytest.mark.parametrize(
    "path", ["chunked", pytest.param("compiled", marks=[needs_compiler, pytest.mark.slow])]
)
def test_l1_norms_are_sums_under_the_same_mask(path, size, request):
    runner = request.getfixturevalue(path)
    base, donor = make_tensors(2, (size,))
    generator = torch.Generator().manual_seed(1)
    shares = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    change = (donor - base).double().abs()
    pack = pack_of(size)
    noise = pack.noise(0, (0,), base.device, even=False)
    least, reach = level(0.3), level(0.2 * 256 / 255)
    values = {
        "rank_share": [shares],
        "min_keep_probability": [least],
        "keep_probability_range": [reach],
    }
    sums = runner.sums(l1_norms(drop_by_rank), (base, [donor]), values, noise)
    (before,), (after,) = pack.sums(sums).tolist()
    chances = least + (shares.int() * reach >> 8)
    exact = 0.3 + 0.2 * shares.double() / 255
    assert float((chances.double() / LEVELS - exact).abs().max()) <= 4e-5  # approx would take 20 s
    kept = uniform(key_of(0, "x", 0), (size,)) * LEVELS < chances
    assert before == pytest.approx(float(change.sum()), rel=1e-6)
    assert after == pytest.approx(float(change[kept].sum()), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_results_are_written_where_they_are_to_be(method, chunked):
    tensors = make_tensors(3, (30, 20))
    before = [tensor.clone() for tensor in tensors]
    buffer = torch.full((3, 30, 20), torch.nan)
    place = buffer.data_ptr()
    merge_into(buffer[1], recipe_of(method), "x", in_memory(tensors, chunked))
    assert buffer.data_ptr() == place
    assert torch.equal(buffer[1], merged(method, tensors, chunked, torch.float32))
    assert bool(buffer[[0, 2]].isnan().all())
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_need_not_be_contiguous(method, chunked):
    tensors = [tensor.T for tensor in make_tensors(3, (30, 20))]
    assert not tensors[0].is_contiguous()
    copies = [tensor.contiguous() for tensor in tensors]
    one, other = (merged(method, ts, chunked, torch.float32) for ts in (tensors, copies))
    assert torch.equal(one, other)


def test_an_output_that_is_not_contiguous_is_refused(chunked):
    tensors = make_tensors(2, (4, 6))
    out = torch.zeros(6, 4).T
    with pytest.raises(RuntimeError, match="view"):
        chunked.write(out, weighted_sum, (None, tensors), {"factor": [0.5, 0.5]})
    assert not out.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_without_elements_stays_without(method, chunked):
    tensors = [torch.empty(0, 4) for _ in range(3)]
    assert merged(method, tensors, chunked, torch.float32).shape == (0, 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_candidate_makes_no_tensor_of_the_size_of_its_result(method, chunked):
    tensors = make_tensors(3, (400, 1_000), dtype=torch.bfloat16)
    out = torch.empty(400, 1_000, dtype=torch.bfloat16)
    models = in_memory(tensors, chunked)
    merge_into(out, recipe_of(method), "x", models)  # measured once for a study
    known = [found for found in models.measurements.kept.values() if torch.is_tensor(found)]
    with Allocations(out, *tensors, *known) as made:
        merge_into(out, recipe_of(method, weights=(0.7, 0.2)), "x", models)
    assert 0 < made.most <= CHUNK


def test_every_position_is_written_once(chunked, monkeypatch):
    monkeypatch.setattr(kernel_runner, "CHUNK", 2 * WIDTH)
    shapes = []

    def counted(base, donors, **values):
        shapes.append(tuple(donors[0].shape))
        return donors[0]

    size = 5 * WIDTH + 7
    (donor,) = make_tensors(1, (size,))
    out = torch.full((size,), torch.nan)
    chunked.write(out, counted, (None, [donor]), {})
    assert shapes == [(2, WIDTH), (2, WIDTH), (1, WIDTH), (1, 7)]
    assert torch.equal(out, donor)


def test_compiling_pays_only_with_a_compiler_and_for_much_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    assert compiling_pays(PAYS, 1)
    assert not compiling_pays(PAYS - 1, 1)
    assert compiling_pays(PAYS * KERNELS // 100, 100)
    assert not compiling_pays(PAYS * KERNELS // 100 - 1, 100)
    assert not compiling_pays(PAYS, 0)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert not compiling_pays(PAYS, 1_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiling_pays(PAYS, 1)


@pytest.mark.parametrize("work", ["write", "sums"])
def test_compiler_that_fails_is_noted_and_done_without(work, caplog):
    import torch._inductor.config as inductor

    def kernel(_base, donors):
        return donors[0].float() * 1.23456789  # one that no cache knows

    def summed(_base, donors):
        return (donors[0].float() * 1.23456789).sum(-1).unsqueeze(0)

    (donor,) = make_tensors(1, (2, WIDTH))
    runner, out = KernelRunner(compiled=True), torch.empty(2, WIDTH)
    scaled = donor * 1.23456789

    def run():
        if work == "write":
            runner.write(out, kernel, (None, [donor]), {})
            return out, scaled
        return runner.sums(summed, (None, [donor]), {}), scaled.sum(1).double().unsqueeze(0)

    with inductor.patch({"cpp.cxx": ("/no/such/compiler",)}):
        assert torch.equal(*run())
        assert "is not compiled but runs in chunks" in caplog.text
        assert runner.compiled  # other kernels may be
        caplog.clear()
        assert torch.equal(*run())
        assert not caplog.text  # it is not tried again


def test_compiler_is_told_to_compute_on_a_gpu_as_on_a_cpu():
    options = compiler_options("cuda")
    assert options["emulate_precision_casts"]
    assert options["eager_numerics.division_rounding"]
    assert options.keys() <= set(torch._inductor.list_options())  # it would refuse any other
    assert "emulate_precision_casts" not in compiler_options("cpu")
