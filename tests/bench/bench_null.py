"""What the program says where there is nothing to find: donors that are copies of the base.

    python tests/bench/bench_null.py FAMILY --out DIR [--seeds 0,1,2] [--noise 0.01] [--trials N]

The base is that of a family of the demo's (``studies/demo/zoo.py``). To each tensor of its three
copies Gaussian noise is added whose norm is that share of the tensor's. The tasks are to sort, to
reverse and to increment four characters, which the base does in part. The truth of a recipe is its
mean on all items that no split has, thousands of a task. One JSON line: ``not_better`` of ``runs``;
``believed``, ``select`` and ``search`` are the mean excess of these scores over the truth, ``test``
that of the test's; ``covered``, how often the 95 % interval of the lead over the best donor has the
true one. Scores are in per cent.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from random import Random
from statistics import mean
from string import ascii_lowercase, digits

import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_engine.recipe.recipe_file import load_recipe
from objectives.items import SPLITS
from search.cli import main as mergesearch
from search.options import DEMO
from search.preparing.context import LiveContext, load, plan_study
from search.preparing.models import Hardware
from search.proposing.starts import baselines
from search.running.workers import EvalJob, Worker
from search.study.reading import load_study

sys.path.append(str(DEMO))
from zoo import NEXT_LETTER

LENGTH = 4
ITEMS = 2500  # of a task
TASKS = {
    "sort": (digits, lambda text: "".join(sorted(text))),
    "rev": (ascii_lowercase, lambda text: text[::-1]),
    "inc": (ascii_lowercase, lambda text: text.translate(NEXT_LETTER)),
}


def make_family(family: Path, folder: Path, noise: float, trials: int) -> Path:
    """Write donors, tasks and study; return the study's file."""
    base = family / "zoo" / "base"
    weights = load_file(base / "model.safetensors")
    for seed, donor in enumerate("abc"):
        shutil.copytree(base, folder / donor, dirs_exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: each
            + noise * each.square().mean().sqrt() * torch.randn(each.shape, generator=generator)
            for name, each in weights.items()
        }
        save_file(tensors, folder / donor / "model.safetensors", metadata={"format": "pt"})
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    for name, (alphabet, rewrite) in TASKS.items():
        draw, texts = Random(name), dict[str, None]()
        while len(texts) < ITEMS:
            texts["".join(draw.choices(alphabet, k=LENGTH))] = None
        rows = [{"prompt": f"{name}:{text}=", "answer": rewrite(text)} for text in texts]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tasks / f"demo_{name}.jsonl").write_text(lines)
        shutil.copy(DEMO / "tasks" / f"demo_{name}.yaml", tasks)
    study = yaml.safe_load((DEMO / "study.yaml").read_text())
    study |= {"base_model": str(base.resolve()), "models": ["./a", "./b", "./c"]}
    study["search"] |= {"trials": trials, "tune": True}
    study["objective"]["tasks"] = [{"task": f"demo_{name}"} for name in TASKS]
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def truths(context: LiveContext, seed: int, out: Path) -> tuple[float, dict[str, float]]:
    """Evaluate a run's winner and the donors on the items that its splits do not have."""
    used = {number for split in SPLITS for number in getattr(context.splits, split)}
    fresh = tuple(n for n in range(len(context.objective.items)) if n not in used)
    recipe, _ = load_recipe(out / "recipe.yaml")
    known = baselines(context.space)
    worker = Worker(context)

    def truth(recipe) -> float:
        return mean(one.value for one in worker.evaluate(EvalJob(recipe, fresh)).results)

    return truth(recipe), {Path(name).name: truth(known[name]) for name in context.space.donors}


def measure(family: Path, folder: Path, seed: int, noise: float, trials: int) -> dict[str, object]:
    """Run one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    study, out = make_family(family, folder, noise, trials), folder / f"run{seed}"
    mapping = yaml.safe_load(study.read_text())
    mapping["search"]["seed"] = seed
    file = study.with_name(f"study{seed}.yaml")
    file.write_text(yaml.safe_dump(mapping, sort_keys=False))
    if mergesearch(["run", str(file), "--out", str(out), "--device", "cpu"]) != 0:
        raise SystemExit(f"{file}: the run failed")
    result = json.loads((out / "result.json").read_text())
    context = load(plan_study(load_study(file)), Hardware("cpu"))
    truth, donors = truths(context, seed, out)
    lead = result["difference_to_best_donor"]
    true_lead = truth - donors[Path(lead["donor"]).name]
    return {
        "verdict": result["verdict"],
        "truth": truth,
        "true_lead": true_lead,
        "lead": lead["mean"],
        "covered": lead["ci95"][0] <= true_lead <= lead["ci95"][1],
        "believed": result["believed_score"] - truth,
        "select": result["select_score"] - truth,
        "search": result["search_score"] - truth,
        "test": result["winner"]["test"]["mean"] - truth,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--trials", type=int, default=100)
    given = parser.parse_args()
    found = []
    for seed in map(int, given.seeds.split(",")):
        found.append(measure(given.family, given.out, seed, given.noise, given.trials))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    per_cent = ("truth", "true_lead", "lead", "believed", "select", "search", "test")
    line = {name: round(100 * mean(one[name] for one in found), 2) for name in per_cent}
    verdicts = [one["verdict"] for one in found]
    line |= {"not_better": verdicts.count("not better"), "runs": len(found)}
    print(json.dumps(line | {"covered": mean(one["covered"] for one in found)}))


if __name__ == "__main__":
    main()
