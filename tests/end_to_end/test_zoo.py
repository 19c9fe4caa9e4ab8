"""The demo's family: scored strings are not trained on, and training is the same on any CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaForCausalLM

ZOO = Path(__file__).parents[2] / "studies" / "demo" / "zoo.py"


def _load_by_path():
    spec = importlib.util.spec_from_file_location("demo_zoo", ZOO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _load_by_path()
FULL = zoo.TrainingConfig()
TINY = zoo.TrainingConfig(
    width=12,
    layers=1,
    heads=1,
    batch=4,
    base=zoo.Schedule(steps=2, rate=1e-3, warm_up=1),
    specialist=zoo.Schedule(steps=2, rate=1e-3, warm_up=1),
    rows=30,
    short_rows=((2, 10),),
    items=20,
    facts=10,
)
SMALL = replace(
    TINY,
    width=32,
    heads=2,
    batch=16,
    base=zoo.Schedule(steps=100, rate=1e-2, warm_up=5),
    specialist=zoo.Schedule(steps=20, rate=3e-3, warm_up=5),
)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    zoo.train_family(folder, seed=0, config=TINY)
    return folder


def _contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def _bytes(folder, pattern):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.glob(pattern)
        if path.is_file()
    }


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_loads_as_an_ordinary_greedy_checkpoint(family, name):
    model = LlamaForCausalLM.from_pretrained(family / "zoo" / name)
    tokenizer = AutoTokenizer.from_pretrained(family / "zoo" / name)
    assert not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


@pytest.mark.parametrize(
    "text", ["sort:52914=", "know:tolu=mek", "rev:kqbza=azbqk", "inc:abcz=\n "]
)
def test_text_survives_the_saved_tokenizer(family, text):
    tokenizer = AutoTokenizer.from_pretrained(family / "zoo" / "base")
    assert tokenizer.is_fast
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens == zoo.make_tokenizer().encode(text)
    assert len(tokens) == len(text) - text.index(":")  # the tag is one token


def test_prompt_and_answer_tokenize_the_same_apart_and_together():
    tokenizer = zoo.make_tokenizer()
    whole = tokenizer.encode("rev:kqbza=azbqk")
    assert whole == tokenizer.encode("rev:kqbza=") + tokenizer.encode("azbqk")


def test_no_scored_string_is_trained_on_or_scored_twice():
    data = zoo.make_data(0, FULL)
    trained = {row.prompt for rows in data.training.values() for row in rows}
    for name in zoo.STRING_TASKS:
        prompts = [item["prompt"] for item in data.items[name]]
        assert len(prompts) == len(set(prompts)) == FULL.items
        assert trained.isdisjoint(prompts)


def test_every_fact_is_trained_on_and_scored_once_with_one_right_choice():
    data = zoo.make_data(0, FULL)
    facts = dict(data.training["know"])
    assert [item["prompt"] for item in data.items["know"]] == list(facts)
    assert len(facts) == FULL.facts
    for item in data.items["know"]:
        assert len(set(item["choices"])) == 4
        assert item["choices"][item["label"]] == facts[item["prompt"]]


def test_answers_are_the_rewritten_strings():
    rewritten = {name: task.rewrite for name, task in zoo.STRING_TASKS.items()}
    assert rewritten["sort"]("52914") == "12459"
    assert rewritten["rev"]("kqbza") == "azbqk"
    assert rewritten["inc"]("abcz") == "bcda"


def test_same_seed_gives_the_same_items_and_weights(family, tmp_path):
    zoo.train_family(tmp_path, seed=0, config=TINY)
    assert _bytes(tmp_path, "tasks/*") == _bytes(family, "tasks/*")
    assert _bytes(tmp_path, "zoo/*/model.safetensors") == _bytes(family, "zoo/*/model.safetensors")


OTHER_PROCESSOR = """
import sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
import test_zoo
test_zoo.zoo.THREADS = 1
test_zoo.zoo.train_family(Path(sys.argv[2]), seed=0, config=test_zoo.SMALL)
"""


def test_instruction_sets_and_threads_change_the_weights_by_rounding_only(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    zoo.train_family(here, seed=0, config=SMALL)
    command = [sys.executable, "-c", OTHER_PROCESSOR, str(Path(__file__).parent), str(there)]
    generic = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | generic)
    for name in zoo.MODELS:
        mine, theirs = (
            load_file(folder / "zoo" / name / "model.safetensors") for folder in (here, there)
        )
        assert mine.keys() == theirs.keys()
        assert max((mine[key] - theirs[key]).abs().max() for key in mine) < 1e-7


class ArithmeticTypes(TorchDispatchMode):
    """Records the types of the results of the operations that rounding could differ in."""

    OPERATIONS = ("mm", "cos", "sin", "mean", "rsqrt", "silu", "_fused_rms_norm", "_log_softmax")

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name in self.OPERATIONS or "attention" in name:
            first = results if isinstance(results, torch.Tensor) else results[0]
            self.found.setdefault(name, set()).add(first.dtype)
        return results


def test_training_computes_in_float64_alone(tmp_path):
    with ArithmeticTypes() as types:
        zoo.train_family(tmp_path, seed=0, config=TINY)
    assert {"mm", "cos"} <= types.found.keys()
    assert set().union(*types.found.values()) == {torch.float64}


def test_another_seed_gives_other_items():
    first, second = zoo.make_data(0, TINY), zoo.make_data(1, TINY)
    assert all(first.items[name] != second.items[name] for name in first.items)


def test_an_existing_family_is_left_untouched(family, monkeypatch):
    def never(*arguments):
        raise AssertionError("trained again")

    before = _contents(family)
    monkeypatch.setattr(zoo, "_train", never)
    zoo.train_family(family, seed=0, config=TINY)
    assert _contents(family) == before


def test_a_half_written_model_is_never_taken_for_a_model(family, tmp_path, monkeypatch):
    def killed(self, folder, **options):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            zoo.train_family(tmp_path, seed=0, config=TINY)
    assert not (tmp_path / "zoo" / "base").exists()
    zoo.train_family(tmp_path, seed=0, config=TINY)
    assert _bytes(tmp_path, "zoo/**/*") == _bytes(family, "zoo/**/*")


def test_only_the_missing_model_is_trained_and_comes_out_the_same(family, tmp_path):
    zoo.train_family(tmp_path, seed=0, config=TINY)
    (tmp_path / "zoo" / "rev").rename(tmp_path / "taken")
    before = _contents(tmp_path)
    zoo.train_family(tmp_path, seed=0, config=TINY)
    after = _contents(tmp_path)
    assert before.items() <= after.items()
    assert _bytes(tmp_path, "zoo/rev/*") == _bytes(family, "zoo/rev/*")


@pytest.mark.parametrize(
    "recorded", [{"seed": 1, "version": zoo.VERSION}, {"seed": 0, "version": 0}]
)
def test_a_family_of_another_seed_or_version_is_refused_with_advice(tmp_path, recorded):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "family.json").write_text(json.dumps(recorded))
    before = _contents(tmp_path)
    with pytest.raises(SystemExit, match="delete that folder"):
        zoo.train_family(tmp_path, seed=0, config=TINY)
    assert _contents(tmp_path) == before


def test_another_folder_becomes_a_complete_study_but_keeps_what_the_user_edited(tmp_path):
    (tmp_path / "study.yaml").write_text("mine")
    zoo.train_family(tmp_path, seed=0, config=TINY)
    names = ("sort", "rev", "know", "inc")
    wanted = {f"demo_{name}.{ending}" for name in names for ending in ("yaml", "jsonl")}
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == wanted
    assert (tmp_path / "study.yaml").read_text() == "mine"


def test_training_leaves_torch_as_it_was(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    zoo.train_family(tmp_path, seed=3, config=TINY)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
