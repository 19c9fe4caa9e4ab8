import pytest
import torch
from torch.func import functional_call

from architectures import save_family
from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.merging import merge_tensor
from merge_engine.building.recipe_gradient import RecipeGradient
from merge_engine.building.units import Units
from merge_engine.errors import MergeError
from merge_engine.models.architecture import auto_class, load_config
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import ON_DISK
from merge_engine.recipe.recipe_file import parse_recipe

WEIGHTS = {"a": 0.4, "b": 0.7}
MASKED = {"density": 0.6, "epsilon": 0.2, "gamma": 0.1}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "gemma3": {},
    "gpt2": {},
}


def load(folder):
    return auto_class(load_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {
        name: save_family(tmp_path_factory.mktemp(name), name, **changes)
        for name, changes in FAMILIES.items()
    }


def recipe_of(folder, method="task_arithmetic", weights=None, **parameters):
    own = MASKED if method not in ("task_arithmetic", "linear", "ties") else {}
    known = {"dare_linear": ("density",), "della_linear": ("density", "epsilon")}
    own = {key: own[key] for key in known.get(method, own)}
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight, **own}}
        for name, weight in (weights or WEIGHTS).items()
    ]
    base = {} if method == "linear" else {"base_model": str(folder / "base")}
    mapping = {"merge_method": method, "models": models, "parameters": parameters, **base}
    return parse_recipe(mapping, "r.yaml")[0]


def built(folder, recipe, budget=IN_MEMORY):
    model_set = ModelSet.open([str(folder / name) for name in ("base", *WEIGHTS)])
    model_set.place(torch.device("cpu"), budget)
    builder = Builder(load(folder / "base"), model_set)
    builder.build(recipe)
    return builder


def loss_of(model):
    tokens = torch.arange(60).view(3, 20) % 90 + 5

    def loss():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss, tokens


def live_weights(builder, stored):
    """The live tensors of stored ones, with autograd through stacks of experts."""
    found = {}
    for name in dict(builder.model.named_parameters()):
        conversion = builder.live.joined[name]
        parts = [torch.stack([stored[n] for n in own]) for own in conversion.stored.values()]
        experts = conversion.converter is not None
        found[name] = torch.cat(parts, 1) if experts else stored[conversion.names[0]]
    return found


def expected(builder, folder, method, normalize, lambda_=1.0):
    """Derivatives (tensors, donors) by autograd through a merge in which weights are tensors."""
    models, (loss, tokens) = builder.model_set, loss_of(builder.model)
    ends = [
        recipe_of(folder, method, {name: float(name == own) for name in WEIGHTS}) for own in WEIGHTS
    ]
    weights, stored = {}, {}
    for name in builder.live.targets:
        device = torch.device("cpu")
        base = models.read(str(folder / "base"), name) if method != "linear" else 0.0
        left = [merge_tensor(end, name, models, device) - base for end in ends]
        weights[name] = torch.tensor([*WEIGHTS.values()], requires_grad=True)
        used = weights[name] / weights[name].sum() if normalize else weights[name]
        stored[name] = base + lambda_ * sum(w * v for w, v in zip(used, left, strict=True))
    values = live_weights(builder, stored)
    logits = functional_call(
        builder.model, values, kwargs={"input_ids": tokens, "use_cache": False}
    ).logits[:, :-1]
    value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert value.item() == pytest.approx(loss().item(), rel=1e-5)
    found = torch.autograd.grad(value, [*weights.values()], allow_unused=True)
    return {
        name: torch.zeros(2) if each is None else each
        for name, each in zip(weights, found, strict=True)
    }


def check(builder, wanted, **settings):
    units = Units.of_tensors(builder.model_set.names)
    _, found = RecipeGradient(builder, units, **settings).value_and_grad(loss_of(builder.model)[0])
    scale = max(each.abs().max() for each in wanted.values())
    assert scale > 0
    for name, each in wanted.items():
        error = (found[units.index[name]] - each).abs().max()
        assert error <= 1e-4 * each.abs().max() + 1e-6 * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_autograd_through_the_merge(families, family):
    builder = built(families[family], recipe_of(families[family]))
    wanted = expected(builder, families[family], "task_arithmetic", False)
    check(builder, wanted)
    check(builder, wanted, recompute=True)


@pytest.mark.parametrize("method", ["linear", "dare_linear", "della_linear", "breadcrumbs"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_passes_masks_and_the_sum_of_the_weights(families, method, normalize):
    factor = {} if method == "linear" else {"lambda": 1.5}
    folder = families["llama"]
    builder = built(folder, recipe_of(folder, method, normalize=normalize, **factor))
    check(builder, expected(builder, folder, method, normalize, factor.get("lambda", 1.0)))


def test_donor_of_weight_zero_has_a_gradient_and_donors_may_stay_on_disk(families):
    folder = families["llama"]
    found = []
    for budget in (IN_MEMORY, ON_DISK):
        builder = built(folder, recipe_of(folder, weights={"a": 0.5, "b": 0.0}), budget)
        gradient = RecipeGradient(builder, Units.of_tensors(builder.model_set.names))
        found.append(gradient.value_and_grad(loss_of(builder.model)[0])[1])
    assert torch.allclose(found[0], found[1], rtol=1e-6)
    assert (found[0][:, 1] != 0).any()


def test_units_add_up_the_gradients_of_their_tensors(families):
    folder = families["llama"]
    builder = built(folder, recipe_of(folder))
    models = builder.model_set
    loss, _ = loss_of(builder.model)
    tensors, layers = Units.of_tensors(models.names), Units.of_layers(models)
    single = RecipeGradient(builder, tensors).value_and_grad(loss)[1]
    by_layer = RecipeGradient(builder, layers).value_and_grad(loss)[1]
    assert by_layer.shape == (3, 2)  # two layers and the rest
    for unit in range(3):
        own = [tensors.index[name] for name in models.names if layers.index[name] == unit]
        assert torch.allclose(by_layer[unit], single[own].sum(0))


def test_one_gradient_is_alive_at_a_time_and_nothing_is_left_behind(families):
    builder = built(families["llama"], recipe_of(families["llama"]))
    parameters = [*builder.model.parameters()]
    loss, _ = loss_of(builder.model)
    needed, alive = [each.requires_grad for each in parameters], []

    def count(_):
        alive.append(sum(each.grad is not None for each in parameters))

    hooks = [each.register_post_accumulate_grad_hook(count) for each in parameters]
    RecipeGradient(builder, Units.of_layers(builder.model_set)).value_and_grad(loss)
    for hook in hooks:
        hook.remove()
    assert len(alive) == len(parameters)
    assert max(alive) == 1
    assert all(each.grad is None for each in parameters)
    assert [each.requires_grad for each in parameters] == needed


def test_batches_add_up_and_are_halved_until_they_fit(families):
    builder = built(families["llama"], recipe_of(families["llama"]))
    model, tokens = builder.model, torch.randint(5, 90, (6, 12))
    sizes = []

    def losses(items, most=6):
        sizes.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError("full")
        rows = tokens[[*items]]
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), rows[:, 1:], reduction="none"
        ).mean(1)

    units = Units.of_tensors(builder.model_set.names)
    whole = RecipeGradient(builder, units, batch=6).values_and_grad(losses, range(6))
    sizes.clear()
    small = RecipeGradient(builder, units, batch=6)
    parts = small.values_and_grad(lambda items: losses(items, 2), range(6))
    assert (sizes, small.batch, small.recompute) == ([6, 3, 1, 1, 1, 1, 1, 1], 1, False)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    with pytest.raises(MergeError, match="not enough memory for the gradient of one item"):
        small.values_and_grad(lambda items: losses(items, 0), range(6))
    assert small.recompute


@pytest.mark.parametrize("method", ["ties"])
def test_method_without_gradient_is_refused(families, method):
    builder = built(families["llama"], recipe_of(families["llama"], method))
    gradient = RecipeGradient(builder, Units.of_tensors(builder.model_set.names))
    with pytest.raises(MergeError, match=r"ties has no gradient; these have one: linear, task"):
        gradient.value_and_grad(loss_of(builder.model)[0])
