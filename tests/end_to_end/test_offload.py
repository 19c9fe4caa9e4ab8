"""Commands with ``--offload``: the same scores and files, and what it is not possible with."""

import json
import sqlite3

from safetensors.torch import load_file

from search.cli import main
from search.storing.folder import DATABASE


def outcome(folder, capsys, study, *options):
    """Run a study; return its results, the tensors of its checkpoint and its plan."""
    command = ["run", str(study), "--out", str(folder), "--device", "cpu", "--json", *options]
    assert main(command) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    plan = " ".join(event["text"] for event in events if event["event"] == "plan")
    with sqlite3.connect(folder / DATABASE) as database:
        columns = "recipe, split, block, answers, margins, tokens"
        rows = sorted(database.execute(f"select {columns} from mergesearch_answers"))
    tensors = load_file(folder / "checkpoint" / "model.safetensors")
    return rows, {name: tensor.tolist() for name, tensor in tensors.items()}, plan


def test_offloaded_run_has_the_same_scores_and_export_to_the_bit(make_study, tmp_path, capsys):
    small = {"search": 8, "select": 8, "test": 8}
    study = make_study(tmp_path, search__trials=4, objective__items=small)
    rows, tensors, plan = outcome(tmp_path / "plain", capsys, study)
    assert "which is slow" not in plan
    others, built, plan = outcome(tmp_path / "offloaded", capsys, study, "--offload")
    assert "every forward pass copies the layers to cpu, which is slow" in plan
    assert others == rows
    assert built == tensors
    scores = []
    for options in ([], ["--offload"]):
        command = ["score", str(tmp_path / "plain" / "recipe.yaml"), str(study), "--device", "cpu"]
        assert main([*command, "--json", *options]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert scores[0] == scores[1]
    assert main(["sample", str(tmp_path / "offloaded"), "--offload", "--prompt", "abc"]) == 0


def test_offload_for_several_workers_is_refused(make_study, tmp_path, capsys):
    command = ["run", str(make_study(tmp_path)), "--out", str(tmp_path / "run")]
    assert main([*command, "--offload", "--workers", "2"]) == 2
    assert "--offload is for a live model in this process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
