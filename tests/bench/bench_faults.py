"""What kills cost a run, and what several workers gain it; prints one JSON line an experiment.

``python tests/bench/bench_faults.py coordinator workers throughput idle`` with
``PYTHONPATH=tests/support``. The first three run the demo's study, whose models have to be trained
already (``mergesearch demo``); the last simulates time.
"""

import argparse
import heapq
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from landscape import planted
from objectives.items import SPLITS
from search.cli import main
from search.options import DEMO
from search.preparing.context import load_outline, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.proposing.starts import warm_starts
from search.running.evaluator import Evaluator
from search.running.ray_workers import RayWorkers
from search.running.search_loop import search
from search.running.workers import EvalJob, LocalWorker
from search.storing.folder import DATABASE
from search.storing.store import Store
from search.study.reading import load_study
from simulated import SimulatedWorkers, simulated_context, simulated_run

STUDY = DEMO / "study.yaml"
Row = tuple[Any, ...]


def counted(log: str, *arguments: str) -> None:
    """Run the command, with a line in a file for every block that a worker is given."""
    for kind in (LocalWorker, RayWorkers):

        def submit(self: Any, worker: int, job: EvalJob, submit: Any = kind.submit) -> None:
            with Path(log).open("a") as file:
                file.write(f"{job.recipe.key}\n")
            submit(self, worker, job)

        kind.submit = submit  # type: ignore[method-assign]
    sys.exit(main(arguments))


class Session:
    """Sessions of one run of the demo's study, one after another."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.run, self.log = folder / "run", folder / "submitted"
        folder.mkdir(parents=True)
        self.log.touch()
        self.command = [sys.executable, __file__, "counted", str(self.log), "run", str(STUDY)]
        self.command += ["--out", str(self.run), "--device", "cpu", *options]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=sys.stderr)

    @property
    def submitted(self) -> int:
        """Blocks that were given to workers, over all sessions."""
        return self.log.read_bytes().count(b"\n")

    def wait_for(self, count: int, process: subprocess.Popen[bytes]) -> bool:
        """Whether so many were given before the session was over."""
        while process.poll() is None and self.submitted < count:
            time.sleep(0.01)
        return process.poll() is None

    def rows(self, query: str) -> list[Row]:
        if not (self.run / DATABASE).exists():
            return []
        with sqlite3.connect(self.run / DATABASE) as database:
            return sorted(database.execute(query))

    @property
    def finished(self) -> list[Row]:
        """Number, state and value of each finished trial."""
        return self.rows(
            "select number, state, value from trials left join trial_values using (trial_id) "
            "where state in ('COMPLETE', 'FAIL')"
        )

    @property
    def answers(self) -> list[Row]:
        return self.rows("select recipe, split, block, answers from mergesearch_answers")

    @property
    def recipe(self) -> str:
        return (self.run / "recipe.yaml").read_text()


def coordinator(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The coordinator is killed at random moments, and the run goes on each time."""
    whole = Session(folder / "whole", "--trials", str(options.trials))
    assert whole.start().wait() == 0
    killed = Session(folder / "killed", "--trials", str(options.trials))
    draw, before, lost, kills = random.Random(options.seed), [], 0, 0
    for moment in sorted(draw.sample(range(1, whole.submitted), options.kills)):
        process = killed.start()
        if killed.wait_for(moment, process):
            time.sleep(draw.uniform(0, 0.1))
            process.kill()
            kills += 1
        process.wait()
        lost += len(set(before) - set(killed.finished))
        before = killed.finished
    assert killed.start().wait() == 0
    lost += len(set(before) - set(killed.finished))
    numbers = [number for number, *_ in killed.finished]
    return {
        "trials": len(numbers),
        "kills": kills,
        "trials_lost": lost,
        "trials_doubled": len(numbers) - len(set(numbers)),
        "blocks": len(killed.answers),
        "blocks_evaluated_again": killed.submitted - len(killed.answers),
        "same_trials": killed.finished == whole.finished,
        "same_answers": killed.answers == whole.answers,
        "same_recipe": killed.recipe == whole.recipe,
    }


def workers(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One of two Ray workers is killed at random moments."""
    session = Session(folder / "run", "--trials", str(options.trials), "--workers", "2")
    draw, kills = random.Random(options.seed), 0
    process = session.start()
    for moment in sorted(draw.sample(range(1, 4 * options.trials), options.kills)):
        if session.wait_for(moment, process):
            time.sleep(draw.uniform(0, 0.1))
            victim = draw.choice(actors(process.pid))
            victim.send_signal(signal.SIGKILL)
            kills += 1
    code = process.wait()
    finished = session.finished
    return {
        "exit": code,
        "kills": kills,
        "trials": len({number for number, *_ in finished}),
        "trials_doubled": len(finished) - len({number for number, *_ in finished}),
        "trials_failed": sum(state == "FAIL" for _, state, _ in finished),
        "blocks": len(session.answers),
        "blocks_evaluated_again": session.submitted - len(session.answers),
        "test_mean": json.loads((session.run / "result.json").read_text())["winner"]["test"][
            "mean"
        ],
    }


def actors(pid: int) -> list[psutil.Process]:
    """The worker processes of a run."""
    while True:
        children = psutil.Process(pid).children(recursive=True)
        if found := [child for child in children if "ray::_Actor" in _name(child)]:
            return found


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def throughput(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two workers of one thread each against one of them, on the same recipes."""
    spec = load_study(STUDY)
    context = load_outline(plan_study(spec))
    recipes = [to_recipe(context.space, point) for _, point in warm_starts(context.space)[:6]]
    crew = RayWorkers(spec, Hardware("cpu"), count=2)
    rates: dict[int, list[float]] = {2: [], 1: []}
    for number in range(9):
        for count, found in rates.items():
            crew.count = count
            evaluator = Evaluator(context, Store(folder / f"{number}-{count}.db"), crew)
            start = time.perf_counter()
            evaluator.evaluate(recipes, "search")
            items = len(recipes) * len(context.splits.search)
            found.append(items / (time.perf_counter() - start))
    crew.close()
    gains = [two / one for two, one in zip(*rates.values(), strict=True)]
    return {
        "items_per_second_by_2": [round(rate) for rate in rates[2]],
        "items_per_second_by_1": [round(rate) for rate in rates[1]],
        "gain": float(np.median(gains)),
    }


def idle(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the run's own loop over trials of uneven length with the same in generations."""
    found: dict[str, Any] = {}
    for count in (2, 8):
        counts = dict.fromkeys(SPLITS, 240)
        settings = {"trials": options.trials, "stop": False}
        context = simulated_context(planted(options.seed), options.seed, counts, search=settings)
        workers = SimulatedWorkers(context.objective, count, options.seed, clock=time.process_time)
        run = simulated_run(folder / str(count), context, workers)
        search(run)
        trials = [trial for trial in run.log.finished() if trial.recipe in workers.spent]
        spent = [workers.spent[trial.recipe] for trial in trials]
        found[f"trials_by_{count}"] = len(trials)
        found[f"idle_{count}"] = 1 - workers.busy / (count * workers.now)
        for size in (count, 4 * count):
            length = sum(longest(part, count) for part in generations(spent, size))
            found[f"idle_{count}_generations_of_{size}"] = 1 - sum(spent) / (count * length)
        found[f"seconds_a_trial_{count}"] = sum(spent) / len(trials)
    return found


def generations(spent: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    for start in range(0, len(spent), size):
        yield spent[start : start + size]


def longest(spent: Sequence[float], count: int) -> float:
    """Compute how long a generation takes when a free worker does the next trial."""
    ends = [0.0] * count
    for seconds in spent:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


EXPERIMENTS = {each.__name__: each for each in (coordinator, workers, throughput, idle)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["counted"]:
        counted(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for name in chosen.experiments:
        with tempfile.TemporaryDirectory() as folder:
            found = EXPERIMENTS[name](Path(folder), chosen)
        print(json.dumps({"experiment": name, **vars(chosen), **found}), flush=True)
