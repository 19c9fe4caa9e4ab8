"""One pass over a pack of tensors gives what merging them one by one gives."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.merging import merge_pack
from merge_engine.errors import MergeError
from merge_engine.methods import METHODS, Base
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import ON_DISK
from merge_engine.numerics.kernel_runner import KernelRunner
from merge_engine.numerics.noise import halves, key_of, weyl
from merge_engine.numerics.packing import ROWS, WIDTH, TensorPack
from merge_engine.recipe.recipe_file import parse_recipe
from uniform import uniform

BASE = "model.embed_tokens.weight"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
shapes = st.lists(st.lists(st.integers(0, 90), max_size=3).map(tuple), min_size=1, max_size=6)


def numbered(sizes):
    return {f"t{i}": shape for i, shape in enumerate(sizes)}


@given(sizes=shapes)
def test_tensors_lie_apart_and_come_back_as_they_were(sizes):
    pack = TensorPack(numbered(sizes))
    tensors = [torch.randn(shape) for shape in sizes]
    matrix = pack.fill(pack.empty(torch.float32, torch.device("cpu")), tensors)
    assert matrix.shape[1] == WIDTH
    for name, tensor in zip(pack.names, tensors, strict=True):
        assert torch.equal(pack.view(matrix, name), tensor)
    assert int(matrix.count_nonzero()) == sum(int(tensor.count_nonzero()) for tensor in tensors)


@given(sizes=shapes)
def test_a_column_has_each_tensors_number_in_its_rows(sizes):
    pack = TensorPack(numbered(sizes))
    numbers = torch.arange(len(sizes)).float()
    tensors = [torch.full(shape, float(i)) for i, shape in enumerate(sizes)]
    matrix = pack.fill(pack.empty(torch.float32, torch.device("cpu")), tensors)
    (column,) = pack.columns(numbers[None])
    assert torch.equal(torch.where(matrix != 0, column, 0.0), matrix)
    sums = pack.sums(matrix.sum(1, keepdim=True).T)
    wanted = [float(tensor.sum()) for tensor in tensors]
    assert sums[0].tolist() == pytest.approx(wanted)


def test_packs_are_of_bounded_size_and_hold_every_tensor_once():
    rows = [ROWS - 1, 1, 2, 3 * ROWS, 1]
    wanted = {f"t{i}": (count, WIDTH) for i, count in enumerate(rows)}
    packs = TensorPack.cut(wanted)
    assert [list(pack.names) for pack in packs] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]


def test_noise_of_a_pack_is_that_of_its_tensors():
    pack = TensorPack({"a": (3, WIDTH), "b": (5,)})
    noise = pack.noise(7, (0, 2), torch.device("cpu"), even=False)
    assert pack.noise(7, (0, 2), torch.device("cpu"), even=False) is noise
    assert noise.first.flatten().tolist() == [
        int(weyl(torch.tensor(i * WIDTH, dtype=torch.int32))) for i in (0, 1, 2, 0)
    ]
    for (low, high), donor in zip(noise.keys, (0, 2), strict=True):
        pairs = [halves(key_of(7, name, donor)) for name in ("a", "a", "a", "b")]
        assert list(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)) == pairs


def recipe_of(zoo, method, filtered):
    """The method over the zoo; filtered: weights by filter and by depth."""
    row = METHODS[method]
    names = ["base", "a"] if row.base is Base.ENDPOINT else ["a", "b", "c"][: row.donors[1]]
    weight = [
        {"filter": "mlp", "value": [0.2, 0.9]},
        {"filter": "norm", "value": 0},
        {"value": 0.5},
    ]
    own = {"weight": weight if filtered else 0.4, "density": 0.4, "gamma": 0.1, "epsilon": 0.1}
    shared = {"t": 1e-3 if method == "nearswap" else [0.3, 0.6] if filtered else 0.3}
    mapping = {
        "merge_method": method,
        "models": [
            {
                "model": str(zoo / name),
                "parameters": {k: v for k, v in own.items() if k in row.params},
            }
            for name in names
        ],
        "parameters": {k: v for k, v in shared.items() if k in row.params},
    } | ({} if row.base is Base.INPUT else {"base_model": str(zoo / "base")})
    recipe, _ = parse_recipe(mapping, "r.yaml")
    return recipe


def built(zoo, recipe, budget, runner=None, dtype=torch.float32):
    names = [str(zoo / name) for name in ("base", "a", "b", "c")]
    models = ModelSet.open(names, candidates=2, runner=runner or KernelRunner(compiled=False))
    models.place(torch.device("cpu"), budget)
    model = AutoModelForCausalLM.from_pretrained(zoo / "base", dtype=dtype)
    builder = Builder(model, models)
    builder.build(recipe)
    return builder


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_pack_is_merged_as_its_tensors_are_one_by_one(zoo, method, filtered):
    recipe = recipe_of(zoo, method, filtered)
    if filtered and method in ("linear", "nuslerp", "multislerp"):
        recipe = recipe_of(zoo, method, filtered=False)  # weights of zero sum to nothing
    one_by_one = dict(built(zoo, recipe, ON_DISK).tensors())
    for name, tensor in built(zoo, recipe, IN_MEMORY).tensors():
        assert torch.allclose(tensor, one_by_one[name], rtol=0, atol=2.0**-22), name


@pytest.mark.parametrize("method", METHODS)
def test_merging_a_pack_reads_no_number_back_from_the_device(zoo, method):
    builder = built(zoo, recipe_of(zoo, method, filtered=False), IN_MEMORY)  # has measured all
    for pack in builder.model_set.placement.packs:
        out = pack.empty(torch.float32, torch.device("meta"))  # has no numbers: reading one raises
        merge_pack(out, builder.loaded, pack, builder.model_set)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs_ties", "della", "dare_ties"])
def test_a_compiled_pack_is_what_chunks_give(zoo, method):
    recipe = recipe_of(zoo, method, filtered=True)
    chunked = dict(built(zoo, recipe, IN_MEMORY).tensors())
    with torch._dynamo.config.patch(recompile_limit=256):
        for name, tensor in built(zoo, recipe, IN_MEMORY, KernelRunner(compiled=True)).tensors():
            assert torch.allclose(tensor, chunked[name], rtol=0, atol=2.0**-22), name


def test_the_live_model_computes_with_what_was_written(zoo):
    recipe = recipe_of(zoo, "task_arithmetic", filtered=False)
    builder = built(zoo, recipe, IN_MEMORY)
    stored = {name: tensor.clone() for name, tensor in builder.tensors()}
    fresh = AutoModelForCausalLM.from_pretrained(zoo / "base", dtype=torch.float32)
    fresh.load_state_dict(stored, strict=False)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(builder.model(ids).logits, fresh(ids).logits)


def test_a_recipe_that_cannot_be_merged_is_refused_by_tensor(zoo):
    recipe = recipe_of(zoo, "linear", filtered=True)
    builder = built(zoo, recipe_of(zoo, "linear", filtered=False), IN_MEMORY)
    with pytest.raises(MergeError, match=r"linear of '.*norm.*': weights \[0.0, 0.0, 0.0\] sum"):
        builder.build(recipe)
    assert builder.loaded is None


def test_random_masks_of_a_pack_are_those_of_its_seed(zoo):
    recipe = recipe_of(zoo, "dare_linear", filtered=False)
    base, *_ = (dict(built(zoo, recipe, IN_MEMORY).tensors()),)
    models = ModelSet.open([str(zoo / name) for name in ("base", "a", "b", "c")])
    start = models.read(str(zoo / "base"), BASE)
    changed = base[BASE] != start
    masks = [uniform(key_of(recipe.seed, BASE, index), start.shape) < 0.4 for index in range(3)]
    assert torch.equal(changed, torch.stack(masks).any(0))
