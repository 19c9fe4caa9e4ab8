"""vLLM's engine behind its documented interface, by a stand-in that transformers generates for."""

import importlib.machinery
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lm_eval_reference import fast, prompts, questions, scores, texts
from objectives.base import ObjectiveError
from objectives.inference.agreement import settle_engine
from objectives.inference.nan_watch import NanError
from objectives.inference.vllm_engine import VllmEngine, check_installed
from tiny_models import make_model
from tiny_tasks import everything, prepare


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop: list[str]
    stop_token_ids: list[int]


class Model(torch.nn.Module):
    """What vLLM calls a model: it takes weights by name."""

    def __init__(self, config):
        super().__init__()
        self.inner = AutoModelForCausalLM.from_config(config)

    def load_weights(self, weights):
        own = self.inner.state_dict()
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)


class LLM:
    """vLLM's class: one model from a folder's config, a cache of prefixes, greedy generation."""

    made: ClassVar[list] = []
    wrong = False

    def __init__(self, model, *, dtype, load_format, gpu_memory_utilization, seed):
        assert (dtype, load_format) == ("float32", "dummy")
        assert 0 < gpu_memory_utilization < 1
        self.model = Model(AutoConfig.from_pretrained(model)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.cached: dict = {}
        LLM.made.append(self)

    def apply_model(self, func):
        return [func(self.model)]

    def reset_prefix_cache(self):
        self.cached.clear()
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm):
        return [self.written(*pair) for pair in zip(prompts, sampling_params, strict=True)]

    def written(self, prompt, params):
        assert params.temperature == 0
        key = tuple(prompt["prompt_token_ids"]), repr(params)
        if key not in self.cached:  # a cache that is not reset gives texts of other weights
            tokens = list(key[0])
            for _ in range(params.max_tokens):
                logits = self.model.inner(torch.tensor([tokens])).logits[0, -1]
                tokens.append(int(logits.argmin() if self.wrong else logits.argmax()))
                text = self.tokenizer.decode(tokens[len(key[0]) :])
                if tokens[-1] in params.stop_token_ids or any(s in text for s in params.stop):
                    break
            self.cached[key] = tokens[len(key[0]) :]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(self.cached[key]))])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(LLM, "made", [])
    return module


def with_engine(model):
    ours = fast(model)
    settle_engine(ours, VllmEngine(ours.runner, ours.decoder, ours.tokenizer))
    return ours


def test_engine_writes_every_candidates_texts_and_scores_no_choices(vllm):
    model = make_model()
    plain, ours = fast(model), with_engine(model)
    wanted = [*prompts(6), *prompts(6, until=["e"], max_gen_toks=15)]
    for factor in (1.0, -0.7):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(factor)
        assert ours.generate_counted(wanted) == plain.generate_counted(wanted)
        assert scores(ours, questions(4)) == scores(plain, questions(4))
    assert len(LLM.made) == 1, "one engine serves every candidate"


def test_candidate_of_nans_is_refused(vllm):
    ours = with_engine(make_model())
    with torch.no_grad():
        ours.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NanError):
        texts(ours, prompts(2))


def test_engine_whose_texts_are_not_the_models_is_refused(vllm, monkeypatch):
    monkeypatch.setattr(LLM, "wrong", True)
    with pytest.raises(ObjectiveError, match=r"objective\.engine: its texts are not the model's"):
        with_engine(make_model())


def test_engine_that_cannot_run_a_model_is_refused_with_its_reason(vllm, monkeypatch):
    def refuse(self, model, **settings):
        raise ValueError("LlamaForCausalLM of 2 layers is not supported")

    monkeypatch.setattr(LLM, "__init__", refuse)
    with pytest.raises(ObjectiveError, match="of 2 layers is not supported"):
        with_engine(make_model())


def test_study_that_wants_it_is_refused_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ObjectiveError, match=r"vllm is not installed; pip install"):
        check_installed()


def test_harness_with_the_engine_gives_the_values_it_gives_without(vllm, folder):
    model = make_model()
    plain = prepare(folder, model, "choice", "answer")
    ours = prepare(folder, model, "choice", "answer", engine="vllm")
    assert len(LLM.made) == 1
    assert ours.score(model, everything(ours)) == plain.score(model, everything(plain))
    prepare(folder, model, "choice", engine="vllm")
    assert len(LLM.made) == 1, "nothing is written"
