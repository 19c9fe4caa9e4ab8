"""A study over models with different vocabularies: its candidates, its export, and its recipe."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe_file import load_recipe
from search.cli import main
from search.preparing.context import load, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.proposing.starts import baselines
from search.storing.result import Result, read_result
from search.study.reading import load_study
from tiny_models import LETTERS
from vocabularies import ENDS, make_with_tokens

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
ROWS = {"base": 300, "a": 301, "b": 316}
PLAIN = [*LETTERS, *(f"<word {number}>" for number in range(250))]
OWN = {"base": [], "a": ["é", "ß"], "b": ["é", "<|im_start|>", "<|im_end|>"]}  # unknown to the base
METHODS = ["task_arithmetic", "ties", "dare_linear", "linear"]
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokens_of(name):
    """Tokens in the order of their rows, in each model another."""
    first = ENDS if name != "a" else ENDS[::-1]
    plain = [*PLAIN, *(token for token in OWN[name] if not token.startswith("<|"))]
    if name != "base":
        Random(name).shuffle(plain)
    return [*first, *plain]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    for seed, (name, rows) in enumerate(ROWS.items()):
        added = [token for token in OWN[name] if token.startswith("<|")]
        templates = [{"name": kind, "template": CHAT} for kind in ("default", "tool_use")]
        make_with_tokens(
            folder / name, tokens_of(name), added, rows=rows, seed=seed, template=templates
        )
    return {name: str(folder / name) for name in ROWS}


TOKENIZERS = {
    "union": {"source": "union"},
    "base": {"source": "base"},
    "model": {"source": "a"},
    "padded": {"source": "union", "pad_to_multiple_of": 64},
    "tokens": {
        "source": "union",
        "tokens": {
            "é": {"source": {"kind": "model_token", "model": "b", "token": "é"}, "force": True},
            "<new>": {"source": {"kind": "zero"}},
        },
    },
}


def named(value, names):
    """The block with each model's folder in place of its short name."""
    text = json.dumps(value)
    for name in "ab":
        text = text.replace(f'"{name}"', json.dumps(names[name]))
    return json.loads(text)


@pytest.fixture
def write(make_study, names, tmp_path):
    def write(tokenizer, folder="study", **changes):
        search = {"methods": METHODS, "trials": 14}
        changes = {"models": [names["a"], names["b"]], "search": search} | changes
        block = {} if tokenizer is None else {"tokenizer": named(tokenizer, names)}
        return make_study(tmp_path / folder, base_model=names["base"], **changes, **block)

    return write


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_candidate_is_to_the_bit_what_build_makes_of_its_recipe(write, build, tmp_path, kind):
    spec = load_study(write(TOKENIZERS[kind]))
    context = load(plan_study(spec), Hardware("cpu"))
    builder, space = context.builder, context.space
    candidates = [to_recipe(space, space.point(method, (0.7, 0.4))) for method in METHODS]
    for number, recipe in enumerate([*candidates, *baselines(space).values()]):
        builder.build(recipe)
        mapping = yaml.safe_load(recipe.to_yaml())
        assert mapping["tokenizer"]["source"] == spec.tokenizer.source
        built = build(mapping, out := tmp_path / str(number))
        assert built.keys() == dict(builder.tensors()).keys()
        for name, tensor in builder.tensors():
            assert torch.equal(tensor, built[name]), (recipe.merge_method, name)
    config, live = json.loads((out / "config.json").read_text()), builder.model.config
    keys = ("vocab_size", "eos_token_id", "pad_token_id")
    assert [config[key] for key in keys] == [getattr(live, key) for key in keys]
    size = builder.model.get_input_embeddings().num_embeddings
    assert size == config["vocab_size"] == len(built["lm_head.weight"])
    assert size % 64 == 0 or kind != "padded"


def rows_by_token(folder):
    tensors = load_file(Path(folder) / "model.safetensors")
    tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
    return {
        (name, token): tensors[name][row]
        for name in VOCABULARY
        for token, row in tokens.items()
        if row < len(tensors[name])
    }


@pytest.fixture(scope="module")
def finished(names, make_study, tmp_path_factory):
    """The folder of a study and its finished run."""
    folder = tmp_path_factory.mktemp("run")
    file = make_study(
        folder / "study",
        base_model=names["base"],
        models=[names["a"], names["b"]],
        search={"methods": ["task_arithmetic"], "trials": 12},
        tokenizer_source="union",
    )
    assert main(["run", str(file), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder


def test_export_is_to_the_bit_what_build_makes_of_the_recipe(finished, tmp_path):
    run, out = finished / "run", tmp_path / "built"
    assert main(["build", str(run / "recipe.yaml"), str(out), "--device", "cpu"]) == 0
    mine, theirs = (load_file(f / "model.safetensors") for f in (run / "checkpoint", out))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for file in sorted(path.relative_to(out) for path in out.rglob("*.json*")):
        assert (run / "checkpoint" / file).read_bytes() == (out / file).read_bytes(), file
    chosen = AutoTokenizer.from_pretrained(run / "checkpoint")
    assert chosen.get_chat_template() == CHAT
    assert chosen.chat_template.keys() == {"default", "tool_use"}
    assert len(chosen) == len({*PLAIN, *ENDS, *OWN["a"], *OWN["b"]})
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    assert model.generation_config.eos_token_id == chosen.eos_token_id


def test_every_token_of_the_winner_has_the_row_that_the_recipe_gives_it(finished, names):
    """Computed by hand, by the tokens' text, from the recipe's weights of the task vectors."""
    recipe, _ = load_recipe(finished / "run" / "recipe.yaml")
    rows = {name: rows_by_token(folder) for name, folder in names.items()}
    weights = [source.parameters["weight"].clauses[0].values[0] for source in recipe.models]
    for key, row in rows_by_token(finished / "run" / "checkpoint").items():
        having = [rows[n][key] for n in ("base", "a", "b") if key in rows[n]]
        base = rows["base"].get(key, sum(having) / len(having))
        donors = [rows[n].get(key, base) for n in "ab"]
        expected = base + sum(w * (d - base) for w, d in zip(weights, donors, strict=True))
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5, msg=str(key))


def test_models_of_the_study_and_its_recipe_score_as_in_the_run(finished, names, capsys):
    result = read_result(finished / "run")
    models = {
        names["a"]: result.donors[names["a"]].test,
        names["base"]: result.base.test,
        str(finished / "run" / "recipe.yaml"): result.winner.test,
        str(finished / "run" / "checkpoint"): result.winner.test,
    }
    study = str(finished / "study" / "study.yaml")
    for model, score in models.items():
        capsys.readouterr()
        words = ["score", model, study, "--split", "test", "--device", "cpu", "--json"]
        assert main(words) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert score.mean in [event["mean"] for event in events if event["event"] == "result"]


def test_another_model_is_scored_only_with_the_studys_tokens(finished, zoo, capsys):
    study = str(finished / "study" / "study.yaml")
    assert main(["score", str(zoo / "a"), study, "--device", "cpu"]) == 2
    assert "has other tokens than the study's tokenizer gives" in capsys.readouterr().err


def test_finished_run_is_resumed_and_another_vocabulary_refused(finished, names, capsys):
    study, run = finished / "study" / "study.yaml", str(finished / "run")
    before = (finished / "run" / "result.json").read_text()
    assert main(["run", str(study), "--out", run, "--device", "cpu"]) == 0
    after = json.loads((finished / "run" / "result.json").read_text())
    assert after["winner"] == json.loads(before)["winner"]
    other = yaml.safe_load(study.read_text()) | {"tokenizer_source": "base"}
    (finished / "study" / "other.yaml").write_text(yaml.safe_dump(other))
    words = ["run", str(finished / "study" / "other.yaml"), "--out", run, "--device", "cpu"]
    assert main(words) == 2
    assert "tokenizer.source was 'union' and is 'base'" in capsys.readouterr().err


def test_method_whose_recipes_leave_models_out_is_refused(write):
    with pytest.raises(ValueError, match=r"recipes of slerp do not name the base and all models"):
        load_study(write({"source": "union"}, search={"methods": ["slerp"]}))
    spec = load_study(write({"source": "union"}, "other", search={}))
    assert {"slerp", "karcher", "passthrough"}.isdisjoint(spec.search.methods)


def test_recipe_of_another_vocabulary_is_not_built_in_the_live_model(write):
    context = load(plan_study(load_study(write({"source": "union"}))), Hardware("cpu"))
    recipe = to_recipe(context.space, context.space.point("ties", (1.0, 1.0)))
    for changes, message in (
        ({"tokenizer": None}, "tokenizer is the base's as it is and that of the live model"),
        ({"models": recipe.models[:1]}, "the recipe names"),
    ):
        with pytest.raises(MergeError, match=message):
            context.builder.build(recipe.model_copy(update=changes))


def test_advice_to_a_study_of_models_with_other_rows_is_true(write, capsys):
    file = write(None)
    assert main(["check", str(file), "--device", "cpu"]) == 2
    assert "tokenizer_source: union" in capsys.readouterr().err
    file.write_text(file.read_text() + "tokenizer_source: union\n")
    assert main(["check", str(file), "--device", "cpu"]) == 0


@pytest.mark.slow
def test_workers_make_the_same_vocabulary(finished, tmp_path):
    words = ["run", str(finished / "study" / "study.yaml"), "--out", str(tmp_path / "run")]
    assert main([*words, "--device", "cpu", "--workers", "2"]) == 0
    texts = [(run / "result.json").read_text() for run in (finished / "run", tmp_path / "run")]
    one, two = map(Result.model_validate_json, texts)
    assert (one.base.test, one.donors.keys()) == (two.base.test, two.donors.keys())
    assert [b.test for b in one.donors.values()] == [b.test for b in two.donors.values()]


def test_init_writes_the_block_for_models_with_other_rows(names, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    rows = [{"question": f"{a}{b}?", "answer": a} for a in "abcdefgh" for b in "xyz"]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "study.yaml"
    words = ["--models", names["a"], names["b"], "--tasks", str(questions), "--out", str(file)]
    assert main(["init", "--base", names["base"], *words]) == 0
    assert load_study(file).tokenizer.source == "union"
