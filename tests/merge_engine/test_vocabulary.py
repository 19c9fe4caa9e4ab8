"""Merges over different vocabularies against mergekit's, token by token."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from merge_engine.building.builder import Builder
from merge_engine.building.plan import plan_merge
from merge_engine.errors import MergeError
from merge_engine.models.model_set import ModelSet
from merge_engine.recipe.recipe_file import load_recipe, parse_recipe

ENDS = ["<eos>", "<pad>", "<unk>"]
TOKENS = {  # of the base, and of two donors in other orders, each with tokens of its own
    "base": [*ENDS, *"abcdefgh"],
    "a": ["<unk>", "<pad>", "<eos>", *"hgfeéàcba", "<tool>"],
    "b": [*ENDS, *"xàyabcd"],
}
ROWS = {"base": 16, "a": 13, "b": 12}  # a has exactly its tokens, the others padding


def save_tokenizer(folder, tokens, template=None):
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    if "<tool>" in tokens:
        tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def names(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        ids = {f"{end}_token_id": tokens.index(f"<{end}>") for end in ("pad", "eos")}
        make_model(folder / name, seed=seed, vocab_size=ROWS[name], num_hidden_layers=1, **ids)
        for file in folder.glob(f"{name}/tokenizer*"):
            file.unlink()
        save_tokenizer(folder / name, tokens, None if name == "base" else "{{ messages }}, always")
    return {name: str(folder / name) for name in TOKENS}


def recipe(names, method="linear", **changes):
    models = [
        {"model": names[m], "parameters": {"weight": w}}
        for m, w in (("base", 0.5), ("a", 0.9), ("b", 0.4))
    ]
    mapping = {"merge_method": method, "base_model": names["base"], "models": models}
    if method == "task_arithmetic":
        models.pop(0)
    return {**mapping, "dtype": "float32", **changes}


def rows_by_token(folder):
    tensors = load_file(folder / "model.safetensors")
    tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
    return {
        (name, token): tensors[name][row]
        for name in ("model.embed_tokens.weight", "lm_head.weight")
        for token, row in tokens.items()
    }


def options(names):
    of_model = {"kind": "model_token", "model": names["a"]}
    tokens = {
        "é": {"source": names["a"], "force": True},
        "<new>": {"source": of_model | {"token": "h"}},
        "<other>": {"source": of_model | {"token_id": 4}, "force": True},
        "<zero>": {"source": {"kind": "zero"}},
        "b": {"source": names["b"]},
        "x": {"source": {"kind": "zero"}},
    }
    return {
        "union": {"tokenizer_source": "union"},
        "base": {"tokenizer_source": "base"},
        "model": {"tokenizer_source": names["a"]},
        "tokens": {"tokenizer": {"source": "union", "tokens": tokens}},
        "padded": {"tokenizer": {"source": "base", "pad_to_multiple_of": 8}},
    }


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("option", ["union", "base", "model", "tokens", "padded"])
def test_every_token_has_the_row_that_mergekit_gives_it(
    names, tmp_path, build, mergekits, method, option
):
    mapping = recipe(names, method, **options(names)[option])
    mine, theirs = (run(mapping, tmp_path / run.__name__) for run in (build, mergekits))
    folders = tmp_path / build.__name__, tmp_path / mergekits.__name__
    rows, expected = map(rows_by_token, folders)
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        torch.testing.assert_close(row, expected[key], rtol=1e-5, atol=1e-6, msg=str(key))
    for name in mine.keys() - {"model.embed_tokens.weight", "lm_head.weight"}:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)
    sizes = [json.loads((each / "config.json").read_text())["vocab_size"] for each in folders]
    assert sizes[0] == sizes[1] == len(mine["lm_head.weight"])
    assert mine["lm_head.weight"].shape == theirs["lm_head.weight"].shape
    AutoModelForCausalLM.from_pretrained(folders[0])


def test_padding_rows_are_the_mean_of_the_others(names, tmp_path, build):
    mine = build(recipe(names, **options(names)["padded"]), tmp_path / "out")
    head = mine["lm_head.weight"]
    assert len(head) == 16
    torch.testing.assert_close(head[11:], head[:11].mean(0).expand(5, -1))


def test_special_tokens_of_the_configs_get_their_new_numbers(names, tmp_path, build):
    """mergekit keeps the base's numbers in config.json, which another tokenizer reads otherwise."""
    build(recipe(names, tokenizer_source=names["a"]), tmp_path / "out")
    for file in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "out" / file).read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == (2, 1)


@pytest.mark.oracle
@pytest.mark.parametrize("source", ["base", "union"])
def test_tokens_beyond_the_bases_rows_get_rows_and_others_those_of_mergekit(
    names, tmp_path, build, mergekits, make_model, source
):
    ids = {"eos_token_id": 0, "pad_token_id": 1}
    make_model(tmp_path / "base", seed=0, vocab_size=9, num_hidden_layers=1, **ids)
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    save_tokenizer(tmp_path / "base", [*TOKENS["base"], "<none has it>"])  # 12 tokens, 9 rows
    mapping = recipe(names | {"base": str(tmp_path / "base")}, tokenizer_source=source)
    mine, _ = (run(mapping, tmp_path / run.__name__) for run in (build, mergekits))
    rows, expected = (rows_by_token(tmp_path / run.__name__) for run in (build, mergekits))
    assert rows.keys() >= expected.keys()  # mergekit drops what no model used has a row for
    for key, row in expected.items():
        torch.testing.assert_close(rows[key], row, rtol=1e-5, atol=1e-6, msg=str(key))
    assert not rows["lm_head.weight", "<none has it>"].any()
    out = AutoTokenizer.from_pretrained(tmp_path / build.__name__)
    assert max(out.get_vocab().values()) < len(mine["lm_head.weight"])


def test_special_token_that_the_result_lacks_is_the_new_tokenizers_own(names, tmp_path, build):
    folder = tmp_path / "base"
    shutil.copytree(names["base"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": [3, 4, 10], "pad_token_id": 10, "image_token_index": 8}
    (folder / "config.json").write_text(json.dumps(config))  # 10 is h, which b lacks
    build(recipe(names | {"base": str(folder)}, tokenizer_source=names["b"]), tmp_path / "out")
    built = json.loads((tmp_path / "out" / "config.json").read_text())
    assert built["eos_token_id"] == [TOKENS["b"].index("a"), TOKENS["b"].index("b"), 0]
    assert built["pad_token_id"] == TOKENS["b"].index("<pad>")
    assert built["image_token_index"] is None


def test_slices_take_each_end_from_their_own_models(names, tmp_path, build):
    def source(name, layers):
        return {"sources": [{"model": names[name], "layer_range": layers}]}

    slices = [source("a", [0, 1]), source("b", [0, 1])]
    mapping = recipe(names, parameters={"weight": 1}, slices=slices, tokenizer_source="union")
    mapping.pop("models")
    mine = build(mapping, tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    first, last = (load_file(f"{names[n]}/model.safetensors") for n in "ab")
    embedding, head = mine["model.embed_tokens.weight"], mine["lm_head.weight"]
    assert torch.equal(
        embedding[tokens["é"]], first["model.embed_tokens.weight"][TOKENS["a"].index("é")]
    )
    assert torch.equal(head[tokens["x"]], last["lm_head.weight"][TOKENS["b"].index("x")])
    assert not embedding[tokens["x"]].any()  # no model of this slice has it


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("auto", "{{ messages }}, always"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}",) * 2,
        ("chatml", "<|im_start|>user\nhi<|im_end|>\n"),
    ],
)
@pytest.mark.parametrize("source", [{}, {"tokenizer_source": "union"}])
def test_chat_template_is_written_to_the_tokenizer(
    names, tmp_path, build, source, template, expected
):
    mapping = recipe(names, chat_template=template, **source)
    if not source:
        mapping["models"] = mapping["models"][:1]
    if not source and template == "auto":
        mapping |= {"base_model": names["a"], "models": [{"model": names["a"]}]}
        mapping["parameters"] = {"weight": 1}
    build(mapping, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    if template == "chatml":
        messages = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    else:
        assert tokenizer.chat_template == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_source": "union", "tokenizer": {}}, "both tokenizer and tokenizer_source"),
        ({"tokenizer": "union"}, "to name a source only, use tokenizer_source"),
        ({"tokenizer": {"sorce": "union"}}, "unknown key 'sorce'; did you mean 'source'"),
        ({"tokenizer": {"tokens": {"a": {"forced": 1}}}}, "unknown key 'forced'; did you mean"),
        ({"tokenizer": {"tokens": {"a": {"source": "no"}}}}, "'no' is not one of the recipe's"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: Input should"),
        ({"tokenizer_source": "no/such/place"}, "model 'no/such/place': no such folder"),
        (
            {"chat_template": "llama9", "tokenizer_source": "base"},
            "'llama9' is neither 'auto' .* alpaca, chatml",
        ),
        ({}, "tokenizer_source: union"),
    ],
)
def test_wrong_tokenizer_options_are_refused_with_the_fix(names, changes, message):
    with pytest.raises(MergeError, match=message):
        plan_merge(parse_recipe(recipe(names, **changes), "r.yaml")[0])


def test_named_row_that_is_not_there_is_refused(names):
    of_model = {"kind": "model_token", "model": names["a"], "token_id": 99}
    tokenizer = {"tokens": {"<new>": {"source": of_model}}}
    with pytest.raises(MergeError, match=r"tokenizer.tokens.<new>: '.*a' has no row for it"):
        plan_merge(parse_recipe(recipe(names, tokenizer=tokenizer), "r.yaml")[0])


def test_live_model_keeps_its_vocabulary(zoo):
    entries = [{"model": str(zoo / "a"), "parameters": {"weight": 1}}]
    mapping = {"merge_method": "linear", "models": entries, "tokenizer_source": "union"}
    live = AutoModelForCausalLM.from_pretrained(zoo / "base")
    with pytest.raises(MergeError, match="tokenizer is 'union' and that of the live model, which"):
        Builder(live, ModelSet.open([str(zoo / "a")])).build(parse_recipe(mapping, "r")[0])


@pytest.mark.parametrize("option", ["union", "base", "model", "tokens", "padded"])
def test_live_model_with_the_recipes_vocabulary_gets_its_rows(names, tmp_path, build, option):
    mapping = recipe(names, "ties", **options(names)[option])
    expected = build(mapping, tmp_path / "out")
    parsed, _ = parse_recipe(mapping, "r")
    models = ModelSet.open(parsed.models_read, tokenizer=parsed.vocabulary)
    live = AutoModelForCausalLM.from_pretrained(names["base"], dtype=torch.float32)
    live.resize_token_embeddings(models.vocabulary.size)
    builder = Builder(live, models)
    builder.build(parsed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in builder.tensors())


def test_default_source_is_named_in_yaml(names):
    first, _ = parse_recipe(recipe(names, tokenizer={"pad_to_multiple_of": 8}), "r.yaml")
    written = yaml.safe_load(first.to_yaml())
    assert written["tokenizer"] == {"source": "union", "pad_to_multiple_of": 8}
    assert parse_recipe(written, "again")[0].key == first.key


def test_options_survive_yaml_and_find_folders_beside_the_file(names, tmp_path):
    mapping = recipe(names, **options(names)["tokens"])
    first, _ = parse_recipe(mapping, "r.yaml")
    again, _ = parse_recipe(yaml.safe_load(first.to_yaml()), "again")
    assert again == first
    assert again.key == first.key
    local = yaml.safe_load(yaml.safe_dump(mapping).replace(str(names["base"])[: -len("base")], ""))
    file = tmp_path / "r.yaml"
    for name in TOKENS:
        (tmp_path / name).mkdir()
    file.write_text(yaml.safe_dump(local))
    placed, _ = load_recipe(file)
    assert placed.tokenizer.tokens["<new>"].source.model == str(tmp_path / "a")
    assert placed.tokenizer.tokens["b"].source == str(tmp_path / "b")
    assert placed.tokenizer.source == "union"


def test_template_of_several_by_name_is_the_default_one(names, tmp_path, build):
    shutil.copytree(names["a"], tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer.chat_template = {"default": "{{ messages }}, by default", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "a")
    models = [{"model": str(tmp_path / "a"), "parameters": {"weight": 1}}]
    mapping = {"merge_method": "linear", "models": models, "chat_template": "auto"}
    build(mapping, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert found == "{{ messages }}, by default"
