"""Models whose tensors have other names: layouts, text-only fine-tunes, and what cannot be."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from architectures import make_architecture, save_family
from merge_engine.errors import MergeError
from merge_engine.models.alignment import match_names
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_set import ModelSet


def weights(folder):
    return load_file(folder / "model.safetensors")


def resave(family, name, new, rename):
    """Write a copy of a model with other names of its tensors."""
    shutil.copytree(family / name, family / new)
    changed = {rename(own): tensor for own, tensor in weights(family / name).items()}
    save_file(changed, family / new / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", params=["gemma3", "mistral3", "llava"])
def family(request, tmp_path_factory):
    """A multimodal base, a donor ``a``, the same with live names, and its text-only part."""
    family = save_family(tmp_path_factory.mktemp(request.param), request.param, ("a",))
    live = make_architecture(request.param)
    names = match_names(family / "base", weights(family / "base"), live.state_dict())
    back = {stored: name for name, stored in names.items()}
    resave(family, "a", "live", lambda own: back[own])
    text = live.config.text_config
    text.tie_word_embeddings = live.config.tie_word_embeddings
    only = AutoModelForCausalLM.from_config(text)
    a = weights(family / "a")
    tower = {name.removeprefix("language_model."): each for name, each in a.items()}
    only.load_state_dict({n: tower[n] for n in only.state_dict() if n in tower}, strict=False)
    only.save_pretrained(family / "text")
    return family


def aligned(family, *names):
    return ModelSet.open([str(family / name) for name in names])


def test_donor_in_another_layout_has_the_bases_names(family):
    models = aligned(family, "base", "live")
    a = weights(family / "a")
    assert models.names == tuple(sorted(a))
    for name, tensor in a.items():
        assert torch.equal(models.read(str(family / "live"), name), tensor), name


def test_text_only_donor_has_the_text_of_a_multimodal_base(family):
    models = aligned(family, "base", "text")
    a, text = weights(family / "a"), str(family / "text")
    assert models.names == tuple(sorted(a))
    for name in models.names:
        tower = "language_model" in name
        assert (text in models.inputs[name]) == tower, name
        if tower:
            assert torch.equal(models.read(text, name), a[name])


def test_multimodal_donor_gives_its_text_to_a_text_only_base(family):
    models = aligned(family, "text", "a")
    assert models.names == tuple(sorted(Checkpoint(str(family / "text")).tensors))
    for name in models.names:
        for model in ("text", "a"):
            assert torch.equal(
                models.read(str(family / model), name), models.read(str(family / "text"), name)
            )


def test_fused_beside_separate_experts_is_refused(tmp_path):
    family = save_family(tmp_path, "qwen3_moe", ("a",))
    live = make_architecture("qwen3_moe").state_dict()
    shutil.copytree(family / "a", family / "fused")
    save_file(dict(live), family / "fused" / "model.safetensors", metadata={"format": "pt"})
    for names in (("base", "fused"), ("fused", "base")):
        with pytest.raises(MergeError, match=r"stores '.*experts.*', of which .* the parts"):
            aligned(family, *names)


def test_text_of_another_type_is_refused(tmp_path):
    save_family(tmp_path / "a", "gemma3", ())
    save_family(tmp_path / "b", "llama", ())
    with pytest.raises(MergeError, match="gemma3_text against llama"):
        aligned(tmp_path, "a/base", "b/base")
