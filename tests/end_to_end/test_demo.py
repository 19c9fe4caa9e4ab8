"""The whole demo: it trains its family and finds a better merge, and its figures are true."""

import contextlib
import json
import sqlite3
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_engine.recipe.recipe_file import load_recipe
from search.cli import main
from search.options import DEMO
from search.preparing.context import load, plan_study
from search.preparing.models import Hardware
from search.storing.folder import DATABASE
from search.storing.result import read_result
from search.study.reading import load_study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--out", str(folder), "--device", "cpu"]) == 0
    return folder


def test_winner_beats_every_donor_and_the_average_by_far_on_the_test_items(run):
    result = read_result(run)
    winner = result.winner.test.mean
    assert result.verdict == "better"
    assert result.difference_to_best_donor.ci95[0] > 0
    assert winner >= max(donor.test.mean for donor in result.donors.values()) + 0.15
    assert winner >= result.uniform.test.mean + 0.25
    assert abs(result.search_score - winner) < 0.1


def test_exported_checkpoint_gives_lm_eval_the_answers_in_the_database(run):
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    language_model = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(run / "checkpoint"),
        batch_size=64,
        softmax_dtype="float32",
    )
    tasks = [f"demo_{name}" for name in ("sort", "rev", "know", "inc")]
    with contextlib.chdir(DEMO / "tasks"):  # where the tasks' relative files are
        found = lm_eval.simple_evaluate(
            language_model,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False, include_path=str(DEMO / "tasks")),
            bootstrap_iters=0,
        )["samples"]
    metric = {task: "acc" if task == "demo_know" else "exact_match" for task in tasks}
    theirs = {
        (task, sample["doc_id"]): sample[metric[task]] for task in tasks for sample in found[task]
    }
    mine = stored_answers(run)
    assert len(mine) >= 380, "all test items, and at least one block of the search items"
    assert {item: theirs[item] for item in mine} == mine


def stored_answers(run: Path) -> dict[tuple[str, int], float]:
    """Return the winner's score of every item it was evaluated on, by task and document."""
    context = load(plan_study(load_study(DEMO / "study.yaml")), Hardware("cpu"))
    key = load_recipe(run / "recipe.yaml")[0].key
    answers = {}
    with sqlite3.connect(run / DATABASE) as database:
        for split in ("search", "select", "test"):
            rows = database.execute(
                "select answers from mergesearch_answers where recipe = ? and split = ? "
                "order by block",
                (key, split),
            )
            values = [value for (text,) in rows for value in json.loads(text)]
            indices = getattr(context.splits, split)
            items = [context.objective.items[index] for index in indices]
            evaluated = zip(items, values, strict=False)  # only the first, if its race ended early
            answers |= {(item.task, item.doc_id): value for item, value in evaluated}
    return answers


def test_exported_recipe_builds_the_exported_checkpoint(run, tmp_path):
    assert main(["build", str(run / "recipe.yaml"), str(tmp_path / "again")]) == 0
    exported = load_file(run / "checkpoint" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert exported.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items())


@pytest.mark.oracle
def test_mergekit_makes_the_same_weights_of_the_exported_recipe(run, tmp_path):
    mapping = yaml.safe_load((run / "recipe.yaml").read_text())
    checkpoint = run / "checkpoint"
    if mapping["merge_method"] == "dare_linear":
        mapping["parameters"]["density"] = 1.0  # mergekit draws other masks; this one keeps all
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(mapping))
        checkpoint = tmp_path / "mine"
        assert main(["build", str(tmp_path / "recipe.yaml"), str(checkpoint)]) == 0
    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(mapping), str(tmp_path / "theirs"), options)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    mine = load_file(checkpoint / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == torch.float32
        assert (tensor - theirs[name]).abs().max() <= 1e-6 * tensor.abs().max()
