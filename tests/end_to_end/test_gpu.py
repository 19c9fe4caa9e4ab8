"""What needs a CUDA device: the same numbers as on the CPU, captured passes, models on two GPUs."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model

from bench_build import live_model, make_models, recipe_for
from in_memory import IN_MEMORY
from lm_eval_reference import ALL, difference, fast, prompts, questions, scores, texts
from merge_engine.building.builder import Builder
from merge_engine.methods import METHODS
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import Budget
from merge_engine.numerics.transfer import to_device
from search.cli import main
from tiny_models import MODELS, make_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), 14, 3, 0)


def built(models, method, device, monkeypatch, folder):
    monkeypatch.setenv("MERGESEARCH_CACHE", str(folder / device))
    model_set = ModelSet.open(models)
    model_set.place(torch.device(device), IN_MEMORY)
    builder = Builder(live_model(model_set).to(device), model_set)
    with torch.no_grad():
        builder.build(recipe_for(method, models))
    return [weight.cpu() for weight in builder.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_merge_on_a_gpu_is_that_on_the_cpu(models, method, monkeypatch, tmp_path):
    on_cpu, on_gpu = (built(models, method, d, monkeypatch, tmp_path) for d in ("cpu", "cuda"))
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(one, other)


def test_pinned_pack_that_workers_share_is_page_locked(models):
    model_set = ModelSet.open(models)
    model_set.place(torch.device("cuda"), Budget(pinned=1 << 40, sharers=2))
    placement = model_set.placement
    shared = placement.packed(models[0], placement.packs[0])
    assert shared.is_pinned()
    assert torch.equal(to_device(shared, placement.device).cpu(), shared)


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_texts_on_a_gpu_are_those_on_the_cpu(name, caplog):
    on_cpu = fast(make_model(name))
    expected = scores(on_cpu, questions()), texts(on_cpu, prompts())
    on_gpu = fast(make_model(name).cuda())
    assert on_gpu.modes == replace(ALL, captured=True), caplog.text
    assert difference(scores(on_gpu, questions()), expected[0]) < 1e-3
    assert texts(on_gpu, prompts()) == expected[1]


def test_one_capture_serves_every_candidate():
    ours = fast(make_model().cuda())
    first = texts(ours, prompts())
    kept = ours.decoder.kept
    with torch.no_grad():
        for weight in ours.model.parameters():
            weight.mul_(-0.7)
    plain = fast(make_model())
    with torch.no_grad():
        for weight in plain.model.parameters():
            weight.mul_(-0.7)
    assert texts(ours, prompts()) == texts(plain, prompts()) != first
    assert ours.decoder.kept is kept is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_model_over_two_gpus_has_every_shortcut_but_captured_passes(caplog):
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
    places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    ours, plain = fast(dispatch_model(make_model(), places)), fast(make_model())
    assert ours.modes == ALL, caplog.text
    assert difference(scores(ours, questions()), scores(plain, questions())) < 1e-3
    assert texts(ours, prompts()) == texts(plain, prompts())


def test_study_runs_on_a_gpu(make_study, tmp_path):
    study = make_study(tmp_path / "study", search__trials=4)
    assert not main(["run", str(study), "--out", str(tmp_path / "run"), "--device", "cuda"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["winner"]
