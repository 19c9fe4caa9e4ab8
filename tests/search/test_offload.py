"""A live model in host memory gives the bits of one that is not offloaded, and follows its recipe.

accelerate's hooks are the same whatever the device; here it is the CPU.
"""

import pytest
import torch

from architectures import save_family
from in_memory import IN_MEMORY
from merge_engine.building.builder import Builder
from merge_engine.building.recipe_gradient import RecipeGradient
from merge_engine.building.units import Units
from merge_engine.errors import MergeError
from merge_engine.models.architecture import auto_class, load_config
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe_file import parse_recipe
from search.preparing.offload import check_offload, offload
from search.study.reading import load_study
from search.study.spec import StudyError

TOKENS = torch.arange(3, 15)[None]


def make_builder(family):
    models = ModelSet.open(str(family / name) for name in ("base", "a", "b"))
    models.place(torch.device("cpu"), IN_MEMORY)
    auto = auto_class(load_config(family / "base"))
    return Builder(auto.from_pretrained(family / "base", dtype=torch.float32).eval(), models)


def recipe(family, weight):
    donors = [
        {"model": str(family / name), "parameters": {"weight": w}}
        for name, w in (("a", weight), ("b", 0.4))
    ]
    base = str(family / "base")
    mapping = {"merge_method": "task_arithmetic", "base_model": base, "models": donors}
    return parse_recipe(mapping, "here")[0]


@torch.no_grad()
def logits_of(model):
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(TOKENS, **more).logits


# A tied head, experts in stacks, a buffer that is stored, convolutions read without being called,
# and an encoder with a decoder.
@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "deepseek_v3", "mamba", "qwen3_vl", "bart"])
def test_offloaded_model_has_the_bits_of_every_recipe_that_is_built(kind, tmp_path):
    family = save_family(tmp_path / kind, kind)
    plain, offloaded = make_builder(family), make_builder(family)
    offload(offloaded.model, "cpu")
    assert all(tensor.is_meta for tensor in offloaded.model.parameters())
    found = []
    for weight in (0.3, 0.9):
        for builder in (plain, offloaded):
            builder.build(recipe(family, weight))
        found.append(logits_of(offloaded.model))
        assert torch.equal(found[-1], logits_of(plain.model))
        for (name, one), (other, two) in zip(plain.tensors(), offloaded.tensors(), strict=True):
            assert name == other
            assert torch.equal(one, two)
    assert not torch.equal(*found)


def test_model_that_reads_weights_outside_its_layers_is_refused(tmp_path):
    builder = make_builder(save_family(tmp_path / "family", "llama4_text"))
    with pytest.raises(StudyError, match="cannot bring a Llama4ForCausalLM its weights"):
        offload(builder.model, "cpu")


def test_gradient_of_an_offloaded_model_is_refused(tmp_path):
    builder = make_builder(save_family(tmp_path / "family", "llama"))
    offload(builder.model, "cpu")
    with pytest.raises(MergeError, match="leave out --offload"):
        RecipeGradient(builder, Units.of_layers(builder.model_set))


def test_several_devices_and_own_objectives_are_refused(make_study, tmp_path):
    spec = load_study(make_study(tmp_path / "one"))
    check_offload(spec, "cuda:0")
    with pytest.raises(StudyError, match="name it, as in --device cuda:0"):
        check_offload(spec, "auto")
    tasks = [{"task": "pick"}, {"objective": "mine:Own"}]
    spec = load_study(make_study(tmp_path / "two", objective__tasks=tasks))
    with pytest.raises(StudyError, match="objective 'mine:Own' is a class of your own"):
        check_offload(spec, "cpu")
