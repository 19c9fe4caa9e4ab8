"""A run on real tasks and real models: its files, kills and interrupts, and what it refuses."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge_engine.recipe.recipe_file import load_recipe
from search.cli import main
from search.preparing.context import load, plan_study
from search.preparing.models import Hardware
from search.proposing.starts import baselines
from search.running.workers import LocalWorker
from search.storing.folder import DATABASE, set_aside
from search.storing.intact import digest_of
from search.storing.result import read_result
from search.storing.store import Store
from search.storing.trials import TrialLog
from search.study.reading import load_study
from tiny_models import pickled_twin


def trials_of(run):
    return TrialLog(Store(run / DATABASE).study()).records()


def decisions(run):
    return [(trial.number, trial.point, trial.estimate) for trial in trials_of(run)]


def answers_of(run):
    with sqlite3.connect(f"file:{run / DATABASE}?mode=ro", uri=True) as database:
        return sorted(
            database.execute("select recipe, split, block, answers from mergesearch_answers")
        )


@pytest.fixture(scope="module")
def finished(make_study, tmp_path_factory):
    """A study's file and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    study = make_study(folder)
    assert main(["run", str(study), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return study, folder / "run"


def test_run_leaves_result_recipe_and_checkpoint(finished, zoo):
    _, run = finished
    result = read_result(run)
    recipe, _ = load_recipe(run / "recipe.yaml")
    assert recipe.model_dump(mode="json") == result.winner.recipe
    assert recipe.dtype == "float32"
    assert recipe.out_dtype == "float32"
    assert recipe.base_model
    assert result.trials == 16
    assert set(result.donors) == {str(zoo / name) for name in "abc"}
    assert set(result.winner.test.tasks) == {"pick", "tell"}
    assert result.times_tested == 1
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == [
        "README.md",
        "checksums.txt",
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_pickled_models_give_the_same_run(make_study, zoo, tmp_path):
    kinds = {"base": {}, "a": {"shards": 2}, "b": {"legacy": True}}
    twins = {n: str(pickled_twin(zoo / n, tmp_path / n, **kind)) for n, kind in kinds.items()}
    answers, weights = [], []
    for name, of in (("own", {n: str(zoo / n) for n in kinds}), ("pickled", twins)):
        study = make_study(
            tmp_path / name,
            base_model=of["base"],
            models=[of["a"], of["b"]],
            search__trials=3,
            search__methods=["task_arithmetic"],
        )
        out = tmp_path / name / "run"
        assert main(["run", str(study), "--out", str(out), "--device", "cpu"]) == 0
        answers.append(sorted(row[1:] for row in answers_of(out)))
        weights.append(load_file(out / "checkpoint" / "model.safetensors"))
    assert answers[0] == answers[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_checkpoint_holds_the_recipe_built_again(finished):
    study, run = finished
    context = load(plan_study(load_study(study)), Hardware("cpu"))
    context.builder.build(load_recipe(run / "recipe.yaml")[0])
    saved = AutoModelForCausalLM.from_pretrained(run / "checkpoint").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in context.builder.tensors())


def test_candidates_are_evaluated_on_the_same_first_items_and_splits_are_disjoint(finished):
    study, run = finished
    context = load(plan_study(load_study(study)), Hardware("cpu"))
    keys = {
        split: {context.objective.items[number].key for number in getattr(context.splits, split)}
        for split in ("search", "select", "test")
    }
    assert [len(found) for found in keys.values()] == [24, 16, 24]
    assert len(set.union(*keys.values())) == 64
    searched = [row for row in answers_of(run) if row[1] == "search"]
    assert {len(json.loads(answers)) for _, _, _, answers in searched} == {8}
    blocks = {recipe: [b for r, _, b, _ in searched if r == recipe] for recipe, *_ in searched}
    assert all(numbers == list(range(len(numbers))) for numbers in blocks.values())
    counts = {len(numbers) for numbers in blocks.values()}
    assert max(counts) == 3
    assert min(counts) == 1  # a candidate was stopped
    items = {trial.recipe: trial.items for trial in trials_of(run)}
    donors = {recipe.key for recipe in baselines(context.space).values()}  # raced by themselves
    assert all(items[recipe] == 8 * len(blocks[recipe]) for recipe in items.keys() - donors)


def test_warm_starts_come_first_and_base_scores_as_the_base(finished, zoo):
    study, run = finished
    starts = [trial.start for trial in trials_of(run)]
    assert starts[0] == "uniform average"
    assert starts[1] in {str(zoo / "a"), str(zoo / "b")}
    assert sum(start is not None for start in starts) <= 16 // 3
    context = load(
        plan_study(load_study(study)), Hardware("cpu")
    )  # holds the base as loaded by transformers
    alone = context.objective.score(context.builder.model, context.splits.search)
    stored = [row for row in answers_of(run) if row[1] == "search"]
    key = baselines(context.space)[str(zoo / "base")].key
    answers = [a for row in stored if row[0] == key for a in json.loads(row[3])]
    assert answers == [answer.value for answer in alone][: len(answers)]
    assert answers


def test_running_again_changes_nothing_and_evaluates_nothing(finished):
    study, run = finished
    before, result = answers_of(run), json.loads((run / "result.json").read_text())
    written = (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    assert answers_of(run) == before
    assert (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns == written
    again = json.loads((run / "result.json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_killed_run_that_goes_on_ends_as_one_that_was_not_killed(finished, tmp_path):
    study, whole = finished
    run = tmp_path / "run"
    command = [sys.executable, "-m", "search.cli", "run", str(study), "--out", str(run)]
    command += ["--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) as process:
        while process.poll() is None and _blocks(run) < 26:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert 0 < len([t for t in trials_of(run) if t.state == "complete"]) < 16
    assert main(command[3:]) == 0
    assert decisions(run) == decisions(whole)
    assert answers_of(run) == answers_of(whole)
    assert (run / "recipe.yaml").read_text() == (whole / "recipe.yaml").read_text()


@pytest.fixture
def _default_interrupts():
    """A process that was started in the background may ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_default_interrupts")
def test_interrupted_run_stores_its_block_and_says_how_to_go_on(
    finished, tmp_path, monkeypatch, capfd
):
    study, _ = finished
    run, blocks, evaluate = tmp_path / "run", [], LocalWorker.next

    def interrupted(self):
        blocks.append(0)
        if len(blocks) == 6:
            signal.raise_signal(signal.SIGINT)
        return evaluate(self)

    monkeypatch.setattr(LocalWorker, "next", interrupted)
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 130
    assert len(answers_of(run)) == len(blocks) == 6
    error = capfd.readouterr().err
    assert "stopping after this block" in error
    assert "repeat the command to continue" in error


@pytest.mark.usefixtures("_default_interrupts")
def test_second_interrupt_stops_within_the_block(finished, tmp_path, monkeypatch):
    study, _ = finished
    blocks = []

    def interrupted(self):
        blocks.append(0)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LocalWorker, "next", interrupted)
    assert main(["run", str(study), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 130
    assert blocks == [0]
    assert not answers_of(tmp_path / "run")


def test_force_new_sets_the_old_study_aside(finished, make_study, tmp_path):
    _, whole = finished
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    other = make_study(tmp_path / "other", search__trials=1, search__methods=["task_arithmetic"])
    command = ["run", str(other), "--out", str(run), "--device", "cpu"]
    assert main(command) == 2
    assert main([*command, "--force-new"]) == 0
    assert trials_of(run)
    assert decisions(run / "old-1") == decisions(whole)
    assert (run / "old-1" / "recipe.yaml").read_text() == (whole / "recipe.yaml").read_text()
    set_aside(run)
    assert (run / "old-2" / DATABASE).is_file()


def _blocks(run):
    try:
        return len(answers_of(run))
    except sqlite3.Error:  # not made yet
        return 0


def test_winner_of_an_earlier_run_is_a_warm_start(finished, make_study, tmp_path):
    _, earlier = finished
    winner, _ = load_recipe(earlier / "recipe.yaml")
    study = make_study(tmp_path, search__start=[str(earlier)], search__trials=14)
    run = tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    (again,) = [trial for trial in trials_of(run) if trial.start == "start 1"]
    assert again.recipe == winner.key
    assert again.state == "complete"


def test_another_study_is_refused_with_the_difference(finished, tmp_path, capsys):
    study, run = finished
    changed = yaml.safe_load(study.read_text())
    changed["search"]["methods"].remove("ties")
    other = study.with_name("other.yaml")
    other.write_text(yaml.safe_dump(changed))
    assert main(["run", str(other), "--out", str(run), "--device", "cpu"]) == 2
    assert "search.methods was ['task_arithmetic', 'ties'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("pick.jsonl", "=", ":", "its prompt was "),
        ("tell.jsonl", '"answer": "', '"answer": "z', "its right answer or row of data was "),
        ("pick.yaml", "doc_to_text: question", "doc_to_text: 'Q {{question}}'", "prompt was "),
        ("tell.yaml", "max_gen_toks: 1", "max_gen_toks: 2", "its prompt was "),
        (
            "tell.yaml",
            "- metric: exact_match",
            "- ignore_case: true\n  metric: exact_match",
            "its task's way of asking or judging changed",
        ),
    ],
)
def test_changed_tasks_are_refused_with_the_difference(finished, capsys, file, old, new, message):
    study, run = finished
    data = study.parent / "tasks" / file
    before = data.read_text()
    assert old in before
    data.write_text(before.replace(old, new))
    try:
        assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 2
    finally:
        data.write_text(before)
    error = capsys.readouterr().err
    assert "the tasks' items have changed since the run began: task '" in error
    assert message in error


def test_changed_weights_are_refused_and_copied_ones_are_not(make_study, zoo, tmp_path, capsys):
    models = shutil.copytree(zoo, tmp_path / "zoo")
    named = {"base_model": str(models / "base"), "models": [str(models / name) for name in "ab"]}
    study = make_study(tmp_path, **named, search__trials=1)
    command = ["run", str(study), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(command) == 0
    file = models / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert main(command) == 0
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file)
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"the weights of {models / 'b'} have changed since the run began" in error
    assert "--force-new" in error


@pytest.mark.parametrize(("changed", "code"), [(1, 0), (8, 2)])
def test_export_whose_scores_differ_by_more_than_rounding_is_refused(
    finished, tmp_path, capsys, changed, code
):
    run = shutil.copytree(finished[1], tmp_path / "run")
    winner = load_recipe(run / "recipe.yaml")[0].key
    where = f"where recipe = '{winner}' and split = 'test' and block = 0"
    with sqlite3.connect(run / DATABASE) as database:
        columns = "recipe, split, block, answers, margins, faults, tokens"
        [row] = database.execute(f"select {columns} from mergesearch_answers {where}")
        values = json.loads(row[3])
        values[:changed] = [1.0 - value for value in values[:changed]]
        answers = json.dumps(values)
        update = f"update mergesearch_answers set answers = ?, digest = ? {where}"
        database.execute(update, [answers, digest_of(*row[:3], answers, *row[4:])])
    out = tmp_path / "again"
    assert main(["export", str(run), str(out), "--device", "cpu"]) == code
    said = capsys.readouterr()
    assert out.exists() == (code == 0)
    if code:
        assert f"answers {changed} of" in said.err
        assert "--force-new" in said.err
    else:
        assert "the others differ by rounding" in said.out


def test_rows_of_a_data_file_may_be_reordered_during_a_run(finished):
    study, run = finished
    data = study.parent / "tasks" / "pick.jsonl"
    before, answers = data.read_text(), answers_of(run)
    data.write_text("\n".join(reversed(before.splitlines())) + "\n")
    try:
        assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    finally:
        data.write_text(before)
    assert answers_of(run) == answers


def test_margins_are_stored_beside_the_values(finished):
    _, run = finished
    store = Store(run / DATABASE)
    key = next(iter(store.recipes("test")))
    blocks = store.results(key, "test").values()
    items = [item for item in store.items() if item.split == "test"]
    answers = [answer for block in blocks for answer in block]
    for item, answer in zip(items, answers, strict=True):
        assert (answer.margin is None) == (item.task == "tell")
        if answer.margin is not None:
            assert (answer.margin > 0) == (answer.value == 1)
        assert answer.tokens == (item.task == "tell")  # whose answers are one token long


def test_a_database_of_another_version_is_refused(finished, tmp_path, capsys):
    study, run = finished
    other = tmp_path / "run"
    other.mkdir()
    shutil.copy(run / DATABASE, other)
    with sqlite3.connect(other / DATABASE) as database:
        database.execute("alter table mergesearch_answers drop column margins")
    assert main(["run", str(study), "--out", str(other), "--device", "cpu"]) == 2
    assert "made by another version of mergesearch" in capsys.readouterr().err


JUDGE = """
def judge(doc, results):
    if doc["question"][0] in "abcdef":
        raise ValueError("no \\x1b[31m way")
    return {"exact_match": float(results[0] == doc["answer"])}
"""


def test_responses_that_cannot_be_scored_are_recorded_and_the_run_goes_on(
    make_study, tmp_path, capsys
):
    study = make_study(tmp_path, search__trials=2, objective__trust_task_code=True)
    (tmp_path / "tasks" / "judge.py").write_text(JUDGE)
    with (tmp_path / "tasks" / "tell.yaml").open("a") as file:
        file.write("process_results: !function judge.judge\n")
    assert main(["run", str(study), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "answers could not be judged and count 0, the first: ValueError: no" in out
    assert "\x1b[31m" not in out
    complete = [trial for trial in trials_of(tmp_path / "run") if trial.state == "complete"]
    noted = [trial.faults for trial in complete]
    assert len(noted) == 2
    assert all("answers not judged, e.g. tell: ValueError: no" in note for note in noted)


def test_task_of_which_no_response_can_be_scored_ends_the_study(make_study, tmp_path, capsys):
    study = make_study(tmp_path, search__trials=6, objective__trust_task_code=True)
    (tmp_path / "tasks" / "judge.py").write_text("def judge(doc, results):\n    raise KeyError(1)")
    with (tmp_path / "tasks" / "tell.yaml").open("a") as file:
        file.write("process_results: !function judge.judge\n")
    assert main(["run", str(study), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert "task 'tell': no answer can be judged: KeyError: 1" in capsys.readouterr().err


OWN = """
import hashlib

import torch

from objectives.base import Item, ItemResult, ItemSnapshot


class Loud:
    tasks = {"loud": 1.0}

    def __init__(self, model, tokenizer, size):
        self.items = [Item("loud", hashlib.sha256(bytes([n])).hexdigest(), n) for n in range(size)]

    def snapshots(self, items):
        return [ItemSnapshot(f"token {number}", "") for number in items]

    def score(self, model, items):
        row = model.lm_head.weight.norm(dim=1).sigmoid()
        return [ItemResult(row[number % len(row)].item()) for number in items]
"""


def test_tasks_texts_and_an_own_objective_make_one_study(make_study, tmp_path, monkeypatch):
    (tmp_path / "own_loud.py").write_text(OWN)
    (tmp_path / "notes.txt").write_text("\n".join(f"{n:03} abc def" for n in range(40)))
    monkeypatch.syspath_prepend(tmp_path)
    tasks = [
        {"task": "pick"},
        {"text": "notes.txt", "unit": "line", "weight": 2.0},
        {"objective": "own_loud:Loud", "options": {"size": 30}},
    ]
    items = {"search": 16, "select": 8, "test": 16}
    changes = {"objective__tasks": tasks, "objective__items": items, "search__trials": 6}
    study, run = make_study(tmp_path, **changes), tmp_path / "run"
    assert main(["run", str(study), "--out", str(run), "--device", "cpu"]) == 0
    result = read_result(run)
    assert set(result.winner.test.tasks) == {"pick", "notes", "loud"}
    assert result.trials == 6
    assert all(0 < result.winner.test.tasks[task] < 1 for task in ("notes", "loud"))


def donor_with(zoo, folder, norm):
    """Donor c with another final norm."""
    shutil.copytree(zoo / "c", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], norm)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_candidate_with_infinite_weights_is_a_failed_trial(make_study, zoo, tmp_path):
    large = donor_with(zoo, tmp_path / "large", 1000.0)  # times 100 it is more than float16 holds
    changes = {"dtype": "float16", "search__scale": [0, 100], "search__trials": 20}
    study = make_study(tmp_path, models=[str(zoo / "a"), large], **changes)
    assert main(["run", str(study), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    failed = [t for t in trials_of(tmp_path / "run") if t.state == "fail"]
    assert failed
    errors = [trial.error for trial in failed]
    assert any("'model.norm.weight' has NaN or Inf" in error for error in errors)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["failed_trials"] == len(failed)
    assert result["trials"] == 20 - len(failed)


@pytest.mark.parametrize("split", ["select", "test"])
def test_candidate_that_overflows_on_later_items_gives_way(
    make_study, zoo, tmp_path, capsys, split
):
    norm, scale, seed = (4000.0, [2, 8], 1) if split == "select" else (1000.0, [8, 30], 0)
    changes = {
        "dtype": "float16",
        "models": [str(zoo / "a"), donor_with(zoo, tmp_path / "large", norm)],
        "search__scale": scale,
        "search__methods": ["task_arithmetic"],
        "search__trials": 10,
        "search__seed": seed,
        "objective__items": {"search": 8, "select": 24, "test": 48},
    }
    study, run = make_study(tmp_path, **changes), tmp_path / "run"
    command = ["run", str(study), "--out", str(run), "--device", "cpu", "--json"]
    assert main(command) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert any(f"fails on the {split} items and is replaced by the next" in n for n in notes)
    before, answers = json.loads((run / "result.json").read_text()), answers_of(run)
    failed = [trial for trial in trials_of(run) if trial.state == "fail"]
    assert before["failed_trials"] == len(failed)
    assert before["winner"]["trial"] not in {trial.number for trial in failed}
    assert main(command) == 0
    assert "is replaced" not in capsys.readouterr().out
    after = json.loads((run / "result.json").read_text())
    assert {**after, "seconds": None} == {**before, "seconds": None}
    assert answers_of(run) == answers
