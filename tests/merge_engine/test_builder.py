import pytest
import torch
from accelerate import dispatch_model
from mergekit.merge_methods import merge_state_dicts
from transformers import AutoModelForCausalLM

from merge_engine.building.builder import Builder
from merge_engine.errors import MergeError
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe import Recipe


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def recipe_for(zoo, method="task_arithmetic", parameters=None, **weights):
    entries = [
        {"model": str(zoo / name), "parameters": {"weight": weight}}
        for name, weight in (weights or {"a": 0.6, "b": 0.3, "c": -0.2}).items()
    ]
    base = None if method == "linear" else str(zoo / "base")
    fields = {"merge_method": method, "base_model": base, "models": entries}
    return Recipe.model_validate(fields | {"parameters": parameters or {}})


@pytest.fixture
def builder(zoo):
    models = ModelSet.open(str(zoo / name) for name in ("base", "a", "b", "c"))
    return Builder(load(zoo / "base"), models)


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "model_stock", "ties"])
def test_live_model_equals_mergekits_state_dict(zoo, builder, method):
    builder.build(recipe_for(zoo, method))
    models = {name: load(zoo / name) for name in ("base", "a", "b", "c")}
    parameters = {} if method == "model_stock" else {"weight": [0.6, 0.3, -0.2]}
    if method == "linear":
        models.pop("base")
    with torch.no_grad():
        theirs = merge_state_dicts(
            models, method, parameters=parameters, base=None if method == "linear" else "base"
        )
    for name, tensor in builder.model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)


def test_parameters_keep_their_storage(zoo, builder):
    before = {name: p.data_ptr() for name, p in builder.model.named_parameters()}
    builder.build(recipe_for(zoo))
    assert before == {name: p.data_ptr() for name, p in builder.model.named_parameters()}


def test_model_spread_by_a_device_map_is_written_in_place(zoo, builder):
    spread = load(zoo / "base")
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    parts += [f"model.layers.{number}" for number in range(3)]
    dispatch_model(spread, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    other = Builder(spread, builder.model_set)
    tokens = torch.arange(3, 20)[None]
    for method in ("ties", "linear"):
        builder.build(recipe_for(zoo, method))
        other.build(recipe_for(zoo, method))
        with torch.no_grad():
            assert torch.equal(spread(tokens).logits, builder.model(tokens).logits)


def test_candidate_does_not_depend_on_the_one_before(zoo, builder):
    builder.build(recipe_for(zoo, "dare_ties", {"density": 0.5}))
    once = {name: tensor.clone() for name, tensor in builder.tensors()}
    builder.build(recipe_for(zoo, "linear"))
    builder.build(recipe_for(zoo, "dare_ties", {"density": 0.5}))
    assert all(torch.equal(tensor, once[name]) for name, tensor in builder.tensors())
    assert builder.version == 3


def test_seed_decides_the_masks(zoo, builder):
    def build(seed):
        recipe = recipe_for(zoo, "dare_linear", {"density": 0.5}).model_copy(update={"seed": seed})
        builder.build(recipe)
        return torch.cat([tensor.flatten() for _, tensor in builder.tensors()])

    assert torch.equal(build(1).clone(), build(1))
    assert not torch.equal(build(1).clone(), build(2))


def test_failed_build_is_never_mistaken_for_a_model(zoo, builder):
    good = recipe_for(zoo)
    builder.build(good)
    assert builder.loaded == good
    broken = recipe_for(zoo, "linear", {"normalize": True}, a=1.0, b=-1.0)
    with pytest.raises(MergeError, match=r"linear of '.*': weights \[1.0, -1.0\] sum to"):
        builder.build(broken)
    assert builder.loaded is None


def test_gradient_gives_first_value_outside_the_layers_and_last_value_to_the_last(zoo, builder):
    builder.build(recipe_for(zoo, a=[0.0, 1.0]))
    live, base, donor = builder.model.state_dict(), load(zoo / "base"), load(zoo / "a")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(live[name], base.state_dict()[name])
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(live[name], donor.state_dict()[name])


def test_result_is_rounded_once_to_the_models_dtype(zoo, builder):
    builder.build(recipe_for(zoo))
    exact = dict(builder.tensors())
    rounded = Builder(load(zoo / "base", torch.bfloat16), builder.model_set)
    rounded.build(recipe_for(zoo))
    for name, tensor in rounded.tensors():
        assert torch.equal(tensor, exact[name].bfloat16())


def test_donor_with_no_weight_is_not_read(zoo, builder, monkeypatch):
    recipe = recipe_for(zoo, a=0.5, b=0.0)
    monkeypatch.delitem(builder.model_set.checkpoints, str(zoo / "b"))
    builder.build(recipe)
    assert builder.loaded == recipe


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_method_is_mergekits_up_to_the_masks(zoo, builder, method):
    # Other masks of the same chances: as many kept, the same L1 norm, the same mean change.
    builder.build(recipe_for(zoo, method, {"density": 0.4}, a=0.8))
    models = {name: load(zoo / name) for name in ("base", "a")}
    torch.manual_seed(0)
    with torch.no_grad():
        parameters = {"weight": [0.8], "density": 0.4}
        theirs = merge_state_dicts(models, method, parameters=parameters, base="base")
    base = models["base"].state_dict()
    changes = [
        torch.cat([(found[name] - base[name]).flatten() for name in base])
        for found in (builder.model.state_dict(), theirs)
    ]
    size = changes[0].numel()
    kept = [int(change.count_nonzero()) for change in changes]
    assert abs(kept[0] - kept[1]) < 5 * (2 * size * 0.4 * 0.6) ** 0.5
    masses = [float(change.abs().sum()) for change in changes]
    assert masses[0] == pytest.approx(masses[1], rel=1e-4)
    means = [float(change.mean()) for change in changes]
    assert means[0] == pytest.approx(means[1], abs=5 * float(changes[0].std()) * (2 / size) ** 0.5)
