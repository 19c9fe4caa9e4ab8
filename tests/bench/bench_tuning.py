"""What tuning by gradient finds, on real families: one JSON line per study and system.

    python tests/bench/bench_tuning.py STUDY... [--seeds 0,1,2] [--systems tuned,flat]
        [--items tune=60] [--trials N] [--out FOLDER]

Every run is the whole program's, with its own export; an item's gradient counts three evaluations.
``test`` are the winner's means on test items by seed, ``evaluations`` those of items without the
test, ``optimism`` the mean estimate on search items less the test's, ``lead`` that over the best
donor. All scores are in per cent.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from search.cli import main as mergesearch

SYSTEMS = {"tuned": {"tune": True}, "flat": {"tune": False}, "layer": {"tune_by": "layer"}}


def run(study: Path, out: Path, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Run a study with changes of its search block, and of its items; return result.json."""
    mapping = yaml.safe_load(study.read_text(encoding="utf-8"))
    items = changes.pop("items")
    mapping["search"] |= {"seed": seed, **changes}
    mapping["objective"]["items"] |= items
    file = study.with_name(f"bench-{out.name}.yaml")  # its paths are relative
    file.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    try:
        if mergesearch(["run", str(file), "--out", str(out), "--json"]) != 0:
            raise SystemExit(f"{file}: the run failed")
    finally:
        file.unlink()
    result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    shutil.rmtree(out / "checkpoint")
    return result


def describe(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise runs that differ in their seeds."""
    scores = [100 * one["winner"]["test"]["mean"] for one in results]
    evaluated = [one["split_evaluations"] for one in results]
    leads = [one["difference_to_best_donor"] for one in results]
    return {
        "mean": round(mean(scores), 2),
        "test": [round(score, 1) for score in scores],
        "evaluations": [sum(n for split, n in one.items() if split != "test") for one in evaluated],
        "trials": [one["trials"] for one in results],
        "optimism": round(
            mean(
                100 * one["search_score"] - score
                for one, score in zip(results, scores, strict=True)
            ),
            2,
        ),
        "lead": [round(100 * one["mean"], 1) for one in leads],
        "verdicts": [one["verdict"] for one in results],
        "seconds": [round(one["seconds"]["total"]) for one in results],
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--systems", default="tuned,flat")
    parser.add_argument("--items", default="", help="sizes of splits, like tune=60")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one)")
    given = parser.parse_args()
    folder = given.out or Path(tempfile.mkdtemp())
    items = {name: int(n) for name, n in (one.split("=") for one in given.items.split(",") if one)}
    for study in given.studies:
        for system in given.systems.split(","):
            changes = {**SYSTEMS[system], **({"trials": given.trials} if given.trials else {})}
            results = []
            for seed in map(int, given.seeds.split(",")):
                out = folder / f"{study.parent.name}-{system}-{seed}"
                results.append(run(study.resolve(), out, seed, {**changes, "items": items}))
            summary = {"study": study.parent.name, "system": system, **describe(results)}
            print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
