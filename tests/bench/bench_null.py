"""What the program says where there is nothing to find, and the truth is known exactly.

    python tests/bench/bench_null.py FAMILY --out DIR [--seeds 0,1,2] [--noise 0.05] [--trials N]

Three donors are copies of the base of a family of the demo's (``studies/demo/zoo.py``): to each of
their tensors Gaussian noise is added whose norm is that share of the tensor's. Every item asks to
choose among four texts, and which is right was drawn by lot, so that the true score of any recipe
is 25 % and its true lead over any other is 0, while the copies do answer differently. Copies, items
and lots differ from seed to seed.

One JSON line, scores in per cent: ``not_better`` of ``runs``; ``posterior``, ``select``, ``search``
and ``test`` are the mean excess of these scores of the winner over the truth; ``covered`` counts
the 95 % intervals of each kind that have the truth; ``width`` is the mean one of the leads' over
the best donor; ``tuned`` counts winners with tuned weights.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from random import Random
from statistics import mean
from string import ascii_lowercase, digits
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from search.cli import main as mergesearch
from search.options import DEMO

TASKS = {"sort": (digits, 5), "rev": (ascii_lowercase, 5), "know": (ascii_lowercase, 4)}
ITEMS = 400  # of a task
CHOICES = 4


def make_tasks(folder: Path, seed: int) -> None:
    """Write the tasks' items and files."""
    folder.mkdir(exist_ok=True)
    file = (DEMO / "tasks" / "demo_know.yaml").read_text()
    for task, (alphabet, length) in TASKS.items():
        draw, rows = Random(f"{task}{seed}"), list[str]()
        for _ in range(ITEMS):
            text = draw.sample(alphabet, k=length)
            choices = dict[str, None]()
            while len(choices) < CHOICES:
                choices["".join(draw.sample(text, k=length))] = None
            label = draw.randrange(CHOICES)
            row = {"prompt": f"{task}:{''.join(text)}=", "choices": [*choices], "label": label}
            rows.append(f"{json.dumps(row)}\n")
        (folder / f"demo_{task}.jsonl").write_text("".join(rows))
        (folder / f"demo_{task}.yaml").write_text(file.replace("demo_know", f"demo_{task}"))


def make_study(folder: Path, given: argparse.Namespace, seed: int) -> Path:
    """Write donors, tasks and study; return the study's file."""
    base = given.family / "zoo" / "base"
    weights = load_file(base / "model.safetensors")
    for number, donor in enumerate("abc"):
        shutil.copytree(base, folder / donor, dirs_exist_ok=True)
        generator = torch.Generator().manual_seed(3 * seed + number)
        tensors = {}
        for name, each in weights.items():
            noise = torch.randn(each.shape, generator=generator)
            tensors[name] = each + given.noise * each.square().mean().sqrt() * noise
        save_file(tensors, folder / donor / "model.safetensors", metadata={"format": "pt"})
    make_tasks(folder / "tasks", seed)
    study = yaml.safe_load((DEMO / "study.yaml").read_text())
    study |= {"base_model": str(base.resolve()), "models": ["./a", "./b", "./c"]}
    study["search"] |= {"trials": given.trials, "tune": True, "seed": seed}
    study["objective"]["tasks"] = [{"task": f"demo_{name}"} for name in TASKS]
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def measure(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run one seed."""
    folder = given.out / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    file, out = make_study(folder, given, seed), folder / "run"
    if mergesearch(["run", str(file), "--out", str(out), "--device", "cpu"]) != 0:
        raise SystemExit(f"{file}: the run failed")
    result = json.loads((out / "result.json").read_text())
    inputs = {**result["donors"], "base": result["base"], "average": result["uniform"]}
    best = result["difference_to_best_donor"]
    covered = {f"lead over {name}": covers(one["difference"], 0) for name, one in inputs.items()}
    covered |= {
        f"score of {name}": covers(one["test"], 1 / CHOICES) for name, one in inputs.items()
    }
    covered["lead over the best donor"] = covers(best, 0)
    covered["score of the winner"] = covers(result["winner"]["test"], 1 / CHOICES)
    scores = {
        "posterior": result["posterior_mean"],
        "select": result["select_score"],
        "search": result["search_score"],
        "test": result["winner"]["test"]["mean"],
    }
    return {
        "seed": seed,
        "verdict": result["verdict"],
        "tuned": result["untuned"] is not None,
        **{name: score - 1 / CHOICES for name, score in scores.items()},
        "lead": best["mean"],
        "width": best["ci95"][1] - best["ci95"][0],
        "covered": covered,
    }


def covers(score: dict[str, Any], truth: float) -> bool:
    """Return whether a score's 95 % interval has the truth."""
    low, high = score["ci95"]
    return bool(low <= truth <= high)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--trials", type=int, default=100)
    given = parser.parse_args()
    found = []
    for seed in map(int, given.seeds.split(",")):
        found.append(measure(given, seed))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    per_cent = ("posterior", "select", "search", "test", "lead", "width")
    line = {name: round(100 * mean(one[name] for one in found), 2) for name in per_cent}
    covered = Counter[str]()
    for one in found:
        covered.update(name for name, has in one["covered"].items() if has)
    line |= {
        "not_better": [one["verdict"] for one in found].count("not better"),
        "tuned": sum(one["tuned"] for one in found),
        "runs": len(found),
    }
    print(json.dumps(line | {"covered": covered}))


if __name__ == "__main__":
    main()
