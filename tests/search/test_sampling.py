"""Responses of models to the same prompts: what they generate, and how test items score."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from search.cli import main
from search.running.sampling import changed
from search.storing.folder import DATABASE
from search.storing.result import read_result
from search.storing.resume import stored_spec
from search.storing.samples import read_samples
from search.storing.store import Store
from tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def run(make_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("responses")
    study = make_study(
        folder, search__trials=6, objective__system_instruction="b", search__scale=[0, 60]
    )
    assert main(["run", str(study), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder / "run"


@pytest.fixture
def sampled(run, capsys):
    """Ask a run; returns the exit status and the last event."""

    def ask(*options):
        status = main(["sample", str(run), *options, "--device", "cpu", "--json"])
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return ask


def greedy(folder, text, tokens):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer()
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)


def test_every_model_continues_the_prompts_greedily(run, sampled):
    status, event = sampled("--prompt", "abc=", "--prompt", "x?", "--max-tokens", "4")
    assert status == 0
    assert [sample["prompt"] for sample in event["samples"]] == ["babc=", "bx?"]
    spec = stored_spec(run)
    for sample in event["samples"]:
        said = {one["name"]: one["text"] for one in sample["responses"]}
        assert [*said] == ["base", "a", "b", "c", "winner"]
        folders = [spec.base_model, *spec.models, run / "checkpoint"]
        for folder, text in zip(folders, said.values(), strict=True):
            assert text == greedy(folder, sample["prompt"], 4)


def test_items_gained_and_lost_have_the_responses_whose_scores_were_stored(run, sampled):
    result = read_result(run)
    at_its_end = read_samples(run, result)
    assert any(sample.task for sample in at_its_end), "the run has asked itself"
    status, event = sampled("--items", "3")
    assert status == 0
    best = result.difference_to_best_donor.donor
    assert event["samples"]
    for sample in event["samples"]:
        worth = {one["model"]: one["value"] for one in sample["responses"]}
        gain = worth[f"trial {result.winner.trial}"] - worth[best]
        assert sample["change"] == ("gained" if gain > 0 else "lost")
        assert gain
        for one in sample["responses"]:
            assert (one["text"] == sample["right"]) == one["value"]
    asked = {sample["prompt"] for sample in event["samples"]}
    frozen = {item.prompt for item in Store(run / DATABASE).items() if item.split == "test"}
    assert all(any(text.startswith(prompt) for text in frozen) for prompt in asked)


def test_samples_of_prompts_and_of_items_are_stored_side_by_side(run, sampled):
    sampled("--prompt", "abc", "--max-tokens", "2")
    sampled("--items", "1")
    kept = read_samples(run, read_result(run))
    assert {sample.task is None for sample in kept} == {True, False}
    assert [sample.prompt for sample in kept if sample.task is None] == ["babc"]


def test_sample_writes_plain_printable_blocks_to_a_pipe(run, capsys):
    command = ["sample", str(run), "--prompt", "a\x1b[2J", "--device", "cpu"]
    assert main(command) == 0  # though the model holds 64 tokens, and 128 may be written
    out = capsys.readouterr().out
    assert "cost:" not in out  # nothing is searched
    assert "\x1b" not in out
    assert "prompt:\n    ba\\x1b[2J\nbase:\n" in out
    assert "winner:\n" in out


def test_sample_without_a_winner_is_exit_2(make_study, tmp_path, capsys):
    assert main(["sample", str(tmp_path)]) == 2
    study, run = make_study(tmp_path / "study"), tmp_path / "run"
    assert main(["sample", str(run), "--prompt", " "]) == 2
    assert study.is_file()
    error = capsys.readouterr().err
    assert "no run here" in error
    assert "it is empty" in error


ANSWERS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 2)))


@given(ANSWERS, st.integers(1, 5))
def test_changed_items_come_from_each_task_in_turn_and_equal_scores_are_left_out(rows, count):
    tasks, before, after = zip(*rows, strict=True) if rows else ((), (), ())
    indices = changed(tasks, before, after, count)
    assert len(indices) == len({*indices})
    for sign in (1, -1):
        wanted = {t for t, then, now in rows if sign * (now - then) > 0}
        there = [at for at in indices if sign * (after[at] - before[at]) > 0]
        assert len(there) <= count
        assert {tasks[at] for at in there[: len(wanted)]} <= wanted
        assert len({tasks[at] for at in there}) == min(count, len(wanted))
