"""A failure in scoring a response ends with its item or its model, and has a reason."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from objectives.base import ItemResult, ObjectiveError, printable
from objectives.entries import TextEntry
from objectives.harness import isolation
from objectives.harness.judging import is_untrusted
from tiny_models import make_model, make_tokenizer
from tiny_tasks import (
    ANSWER,
    CHOICE,
    ROWS,
    everything,
    prepare,
    write_task,
)

JUDGE = r"""import os, re, signal, sys

def judge(doc, results):
    row = QUESTIONS.index(doc['question'])
    if row == 1:
        raise ValueError("cannot read \x1b]0;evil\x07 " + "x" * 5000)
    if row == 2:
        signal.alarm(0)
        re.match("(a+)+$", "a" * 64 + "b")
    if row == 3:
        os._exit(7)
    if row == 4:
        bytearray(1 << 45)
    if row == 5:
        print("a model's own words", file=sys.stderr)
        print("a model's own words")
    return {"exact_match": 1.0}
"""


@pytest.fixture
def faulty(folder, model):
    """A task whose scoring of rows 1 to 4 fails, each in its own way."""
    rows = [json.loads(line) for line in (folder / "answer.jsonl").read_text().splitlines()]
    questions = [row["question"] for row in rows]
    (folder / "faulty.py").write_text(f"QUESTIONS = {questions!r}\n{JUDGE}")
    write_task(folder, "faulty", **ANSWER)
    with (folder / "faulty.yaml").open("a") as file:
        file.write("process_results: !function faulty.judge\n")
    harness = prepare(folder, model, "faulty")
    harness.judge_seconds = 2.0
    return harness


def test_a_response_that_cannot_be_scored_counts_0_with_its_reason_and_the_rest_go_on(
    faulty, model, capfd
):
    answers = faulty.score(model, range(7))
    assert [answer.value for answer in answers] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    faults = [answer.fault for answer in answers]
    assert faults[1].startswith("ValueError: cannot read \\x1b]0;evil\\x07 xxx")
    assert len(faults[1]) < 400
    assert faults[2] == "scoring it took longer than 2 s"
    assert faults[3] == "the process that scored it died"
    assert faults[4].startswith("MemoryError")
    assert faults[0] is faults[5] is faults[6] is None
    assert capfd.readouterr() == ("", "")


def test_items_that_hang_one_after_another_end_the_scoring_of_their_block(
    faulty, model, monkeypatch
):
    monkeypatch.setattr("objectives.harness.judging._HANGS", 2)
    faulty.judge_seconds = 0.5
    faulty.questions[1] = faulty.questions[4] = faulty.questions[2]
    with pytest.raises(ObjectiveError, match=r"longer than 0\.5 s for 2 of 3 responses; look"):
        faulty.score(model, [0, 1, 2, 5])
    faulty.judge_seconds = 0.5
    assert [each.value for each in faulty.score(model, [0, 5, 2])] == [1.0, 1.0, 0.0]


def test_scoring_that_hangs_on_the_first_items_ends_there(faulty, model):
    faulty.judge_seconds = 0.5
    faulty.questions[:4] = [faulty.questions[2]] * 4
    with pytest.raises(ObjectiveError, match="for 3 of 3 responses; look"):
        faulty.score(model, [0, 1, 2, 3])


def test_no_process_is_left_behind_by_scoring_that_hangs(faulty, model):
    faulty.score(model, [2])
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_model_that_never_stops_ends_at_the_tasks_own_limit(folder):
    model = make_model()
    model.model.norm.weight.data.zero_()  # all logits equal: it writes its first token for ever
    harness = prepare(folder, model, "answer", tokenizer=make_tokenizer(first="5"))
    answers = harness.score(model, everything(harness))
    assert {answer.value for answer in answers} == {0.0}
    generated = {question.requests[0].resps[0] for question in harness.questions}
    assert generated == {"5" * ANSWER["generation_kwargs"]["max_gen_toks"]}


def test_a_model_that_generates_with_nan_fails_instead_of_scoring_0(folder, model):
    harness = prepare(folder, model, "answer")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(ObjectiveError, match=r"not a number \(NaN\) during generation"):
        harness.score(model, [0])
    assert not model.lm_head._forward_hooks


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"])
def test_margin_is_positive_exactly_where_the_answer_is_correct(folder, model, metric):
    name = f"choice_{metric}"
    listed = {"metric": metric, "aggregation": "mean", "higher_is_better": True}
    write_task(folder, name, **CHOICE | {"metric_list": [listed]})
    harness = prepare(folder, model, name)
    answers = harness.score(model, everything(harness))
    assert [answer.margin > 0 for answer in answers] == [answer.value == 1 for answer in answers]
    assert len({answer.value for answer in answers}) == 2


def test_margin_of_a_choice_with_several_correct_answers_is_that_of_the_best(folder, model):
    write_task(folder, "several", **CHOICE | {"doc_to_target": "{{[gold, (gold + 1) % 3]}}"})
    harness = prepare(folder, model, "several")
    for answer in harness.score(model, everything(harness)):
        assert (answer.margin > 0) == (answer.value == 1)


def test_margin_of_a_predicted_text_is_its_loglikelihood(folder, model):
    config = {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]}
    shared = {key: ANSWER[key] for key in ("dataset_kwargs", "doc_to_text", "doc_to_target")}
    write_task(folder, "predicted", **shared | config)
    harness = prepare(folder, model, "predicted")
    answers = harness.score(model, everything(harness))
    responses = [question.requests[0].resps[0] for question in harness.questions]
    assert [(a.margin, a.value) for a in answers] == [(ll, float(hit)) for ll, hit in responses]


def test_the_value_of_a_text_is_its_probability_per_byte(folder, model, tmp_path):
    texts = ["one two\nthree", "four", "five six seven eight nine ten " * 20]
    (tmp_path / "a.txt").write_text(f"{texts[0]}\n\n{texts[1]}\n\n\n\n{texts[2]}\n")
    harness = prepare(folder, model, TextEntry(text=(tmp_path / "a.txt",), name="a", weight=2.0))
    answers = harness.score(model, everything(harness))
    assert harness.tasks == {"a": 2.0}
    logliks = [question.requests[0].resps[0] for question in harness.questions]
    documents = [question.requests[0].args[0] for question in harness.questions]
    assert [text.strip() for text in documents] == [text.strip() for text in texts]
    per_byte = [ll / len(text.encode()) for ll, text in zip(logliks, documents, strict=True)]
    assert answers == [ItemResult(math.exp(each), each) for each in per_byte]
    tokens = make_tokenizer()(documents[1], return_tensors="pt")["input_ids"]
    ids = torch.cat([torch.tensor([[1]]), tokens], dim=1)  # lm-eval begins with <s>
    scores = model(ids).logits[0, :-1].float().log_softmax(-1)
    expected = scores.gather(1, ids[0, 1:, None]).sum().item()
    assert logliks[1] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("unit", "items"), [("document", 2), ("paragraph", 3), ("line", 4)])
def test_an_item_is_a_document_a_paragraph_or_a_line(folder, model, tmp_path, unit, items):
    (tmp_path / "1.txt").write_text("first\nsecond\n\nthird\n")
    (tmp_path / "2.txt").write_text("fourth\n\n\n")
    files = (tmp_path / "1.txt", tmp_path / "2.txt")
    assert len(prepare(folder, model, TextEntry(text=files, name="t", unit=unit)).items) == items


def test_perplexity_of_a_registered_kind_of_task_is_taken_item_by_item(folder, model):
    config = {
        "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    write_task(folder, "rolling", **config)
    harness = prepare(folder, model, "rolling")
    answers = harness.score(model, everything(harness))
    assert len(answers) == ROWS + 1
    assert all(0 < answer.value < 1 for answer in answers)


def test_characters_a_terminal_would_obey_are_escaped():
    assert printable("a\x1b[2Jb\rc\nd\u202ee\ud800") == r"a\x1b[2Jb\rc\nd\u202ee\ud800"
    assert printable("Zürich 東京 😀") == "Zürich 東京 😀"
    assert str(ObjectiveError("bad \x1b[31m")) == r"bad \x1b[31m"


PLAIN = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
STRIPPED = [{"name": "own", "filter": [{"function": "remove_whitespace"}]}]
LETTER = [{"name": "own", "filter": [{"function": "regex", "regex_pattern": "(a+)+$"}]}]


@pytest.mark.parametrize(
    ("settings", "is_apart"),
    [
        ({}, False),
        ({"doc_to_target": "answer"}, False),
        ({"filter_list": STRIPPED}, False),
        ({"metric_list": [PLAIN | {"ignore_case": True, "ignore_punctuation": True}]}, False),
        ({"doc_to_target": "{{answer | upper}}"}, True),
        ({"doc_to_target": "no field"}, True),
        ({"filter_list": LETTER}, True),
        ({"metric_list": [PLAIN | {"regexes_to_ignore": ["(a+)+$"]}]}, True),
        ({"metric_list": [PLAIN, PLAIN | {"metric": "bleu", "aggregation": "bleu"}]}, True),
    ],
)
def test_only_texts_that_are_compared_as_they_are_need_no_process_of_their_own(
    folder, model, monkeypatch, settings, is_apart
):
    write_task(folder, "own", **ANSWER | settings)
    harness, started = prepare(folder, model, "own"), []
    assert {is_untrusted(question) for question in harness.questions} == {is_apart}
    begin = isolation.start
    monkeypatch.setattr(
        "objectives.harness.judging.start", lambda *a: started.append(a) or begin(*a)
    )
    harness.score(model, everything(harness))
    assert bool(started) == is_apart
