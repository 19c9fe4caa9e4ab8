"""The tokens of rows, by text and number, as the models' files have them."""

import json
import shutil

import pytest

from merge_engine.errors import MergeError
from merge_engine.models.opening import open_models
from merge_engine.models.token_table import token_table, vocabulary_notes
from tiny_models import tiny_tokenizer


@pytest.fixture
def models(zoo, tmp_path):
    for name in ("base", "a"):
        shutil.copytree(zoo / name, tmp_path / name)
    return tmp_path


def change(folder, edit):
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))


def notes(folder):
    return vocabulary_notes(open_models(str(folder / name) for name in ("base", "a")).values())


def swap(raw):
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def add(raw):
    raw["added_tokens"].append({"id": 47, "content": "<|im_end|>", "special": True})


def reuse(raw):
    raw["added_tokens"].append({"id": 46, "content": "<reserved>", "special": True})


def test_table_is_the_tokenizers_own(models):
    (model,) = open_models([str(models / "a")]).values()
    assert token_table(model) == {n: t for t, n in tiny_tokenizer().get_vocab().items()}


def test_equal_tokens_need_no_note(models):
    assert notes(models) == []


def test_two_swapped_tokens_are_named_with_the_way_out(models):
    change(models / "a", swap)
    (note,) = notes(models)
    assert "differ in the tokens of 2 rows: row 3 is 'a' and 'b', row 4 is 'b' and 'a'" in note
    assert "tokenizer: {source: union}" in note


def test_added_tokens_are_compared_too(models):
    change(models / "a", add)
    assert "row 47 is no token and '<|im_end|>'" in notes(models)[0]
    change(models / "base", reuse)
    assert "2 rows: row 46 is '<reserved>' and no token, row 47 is no token" in notes(models)[0]


def test_added_tokens_of_the_config_alone_are_compared(models):
    for name, token in (("base", "<x>"), ("a", "<y>")):
        (models / name / "tokenizer.json").unlink()
        added = {"40": {"content": token, "special": True}}
        config = {"added_tokens_decoder": added}
        (models / name / "tokenizer_config.json").write_text(json.dumps(config))
    assert "1 rows: row 40 is '<x>' and '<y>'" in notes(models)[0]


def test_tokens_beyond_the_rows_do_not_matter(models):
    change(models / "a", lambda raw: raw["added_tokens"].append({"id": 48, "content": "<z>"}))
    assert notes(models) == []


def test_many_rows_are_counted(models):
    def reverse(raw):
        tokens = [*raw["model"]["vocab"]]
        raw["model"]["vocab"] = {token: n for n, token in enumerate(tokens[:3] + tokens[:2:-1])}

    change(models / "a", reverse)
    (note,) = notes(models)
    assert note.count("row ") == 3
    assert "and so on in" in note


def test_unigram_pieces_have_the_numbers_of_their_order(models):
    unigram = lambda raw: raw.update(model={"vocab": [["x", -1.0], ["y", -2.0]]})  # noqa: E731
    for name in ("base", "a"):
        change(models / name, unigram)
    (model,) = open_models([str(models / "a")]).values()
    assert {0, 1} <= token_table(model).keys()


def test_model_without_a_tokenizer_is_left_out(models):
    for file in (models / "a").glob("tokenizer*"):
        file.unlink()
    assert notes(models) == []


@pytest.mark.parametrize("contents", ['{"model": {', '{"model": []}', "[]"])
def test_damaged_file_is_named(models, contents):
    (models / "a" / "tokenizer.json").write_text(contents)
    with pytest.raises(MergeError, match=r"tokenizer.json: damaged.*fetch it again"):
        notes(models)
