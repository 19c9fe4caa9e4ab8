"""What kills cost a run, and what several workers gain it; prints one JSON line an experiment.

``python tests/bench_faults.py coordinator workers throughput idle``. The first three run the demo's
study, whose family has to be trained already (``mergesearch demo``); the last simulates time.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from landscape import Items, Landscape, planted
from objectives.base import Item, ItemResult, ItemSnapshot
from objectives.items import SPLITS, Splits
from search.arguments import DEMO
from search.cli import main
from search.preparing.context import StudyContext, load_outline, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.proposing.starts import warm_starts
from search.running.evaluator import Evaluator
from search.running.ray_workers import RayWorkers
from search.running.run import Run
from search.running.workers import EvalJob, EvalReply, LocalWorker
from search.showing.terminal import Terminal
from search.storing.folder import DATABASE
from search.storing.store import Store
from search.study.reading import load_study, parse_study

STUDY = DEMO / "study.yaml"
Row = tuple[Any, ...]


def counted(log: str, *arguments: str) -> None:
    """The command, with a line in a file for every block that a worker is given."""
    for crew in (LocalWorker, RayWorkers):

        def submit(self: Any, place: int, job: EvalJob, submit: Any = crew.submit) -> None:
            with Path(log).open("a") as file:
                file.write(f"{job.recipe.key}\n")
            submit(self, place, job)

        crew.submit = submit  # type: ignore[method-assign]
    sys.exit(main(arguments))


class Session:
    """Sessions of one run of the demo's study, one after another."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.run, self.log = folder / "run", folder / "asked"
        folder.mkdir(parents=True)
        self.log.touch()
        self.command = [sys.executable, __file__, "counted", str(self.log), "run", str(STUDY)]
        self.command += ["--out", str(self.run), "--device", "cpu", *options]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=sys.stderr)

    @property
    def asked(self) -> int:
        """Blocks that were given to workers, over all sessions."""
        return self.log.read_bytes().count(b"\n")

    def wait_for(self, count: int, process: subprocess.Popen[bytes]) -> bool:
        """Whether so many were given before the session was over."""
        while process.poll() is None and self.asked < count:
            time.sleep(0.01)
        return process.poll() is None

    def rows(self, query: str) -> list[Row]:
        if not (self.run / DATABASE).exists():
            return []
        with sqlite3.connect(self.run / DATABASE) as database:
            return sorted(database.execute(query))

    @property
    def finished(self) -> list[Row]:
        """Number, state and value of each trial that was told."""
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
    for moment in sorted(draw.sample(range(1, whole.asked), options.kills)):
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
        "blocks_asked_again": killed.asked - len(killed.answers),
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
        "blocks_asked_again": session.asked - len(session.answers),
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
    """Two workers of one thread each against one of them, with the same recipes to ask."""
    spec = load_study(STUDY)
    bench = load_outline(plan_study(spec))
    recipes = [to_recipe(bench.space, point) for _, point in warm_starts(bench.space)[:6]]
    crew = RayWorkers(spec, Hardware("cpu"), count=2)
    rates: dict[int, list[float]] = {2: [], 1: []}
    for number in range(9):
        for count, found in rates.items():
            crew.count = count
            evaluator = Evaluator(bench, Store(folder / f"{number}-{count}.db"), crew)
            start = time.perf_counter()
            evaluator.evaluate(recipes, "search")
            items = len(recipes) * len(bench.splits.search)
            found.append(items / (time.perf_counter() - start))
    crew.close()
    gains = [two / one for two, one in zip(*rates.values(), strict=True)]
    return {
        "items_per_second_by_2": [round(rate) for rate in rates[2]],
        "items_per_second_by_1": [round(rate) for rate in rates[1]],
        "gain": float(np.median(gains)),
    }


class Simulated:
    """Workers whose time is simulated; the coordinator's own counts by its CPU seconds.

    Args:
        count: How many.
        items: What recipes answer, by split.
        seed: Of how long jobs take.
    """

    def __init__(self, count: int, items: dict[int, tuple[Items, int]], seed: int) -> None:
        self.count, self.items, self.seed = count, items, seed
        self.now, self.busy = 0.0, 0.0
        self.at_work: list[tuple[float, int, EvalJob]] = []
        self.built: dict[int, str] = {}
        self.spent: dict[str, float] = {}  # seconds of a recipe's jobs
        self._left = time.process_time()

    def submit(self, place: int, job: EvalJob) -> None:
        self._count_coordinator()
        of_recipe = np.random.default_rng([self.seed, int(job.recipe.key[:12], 16)])
        build, item = of_recipe.lognormal(0.0, 0.7), 0.1 * of_recipe.lognormal(0.0, 0.7)
        seconds = item * len(job.items) + (build if self.built.get(place) != job.recipe.key else 0)
        self.built[place] = job.recipe.key
        self.busy += seconds
        self.spent[job.recipe.key] = self.spent.get(job.recipe.key, 0.0) + seconds
        heapq.heappush(self.at_work, (self.now + seconds, place, job))

    def next(self) -> tuple[int, EvalReply]:
        self._count_coordinator()
        end, place, job = heapq.heappop(self.at_work)
        self.now = max(self.now, end)
        found = [self.items[number] for number in job.items]
        answers = {id(items): items.answers(job.recipe) for items, _ in found}
        self._left = time.process_time()  # answers are the workers' business
        return place, EvalReply([ItemResult(float(answers[id(i)][n])) for i, n in found], 0.0, 0.0)

    def _count_coordinator(self) -> None:
        now = time.process_time()
        self.now += now - self._left
        self._left = now


class Questions:
    """Items that only a simulation asks."""

    def __init__(self, items: Sequence[Item], weights: dict[str, float]) -> None:
        self.items, self.tasks = items, weights

    def snapshots(self, items: Sequence[int]) -> list[ItemSnapshot]:
        return [ItemSnapshot(str(number), "") for number in items]


def idle(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run's own loop over trials of uneven length, and the same ones in generations."""
    found: dict[str, Any] = {}
    for count in (2, 8):
        counts = dict.fromkeys(SPLITS, 240)
        search = {"trials": options.trials, "stop": False}
        items, bench = simulated(planted(options.seed), options.seed, counts, search)
        crew = Simulated(count, items, options.seed)
        (folder / str(count)).mkdir()
        run = Run(folder / str(count), bench, crew, Terminal(Console(quiet=True)))
        run.bind_to_store()
        search(run)
        trials = [trial for trial in run.log.finished() if trial.recipe in crew.spent]
        spent = [crew.spent[trial.recipe] for trial in trials]
        found[f"trials_by_{count}"] = len(trials)
        found[f"idle_{count}"] = 1 - crew.busy / (count * crew.now)
        for size in (count, 4 * count):
            length = sum(longest(part, count) for part in generations(spent, size))
            found[f"idle_{count}_generations_of_{size}"] = 1 - sum(spent) / (count * length)
        found[f"seconds_a_trial_{count}"] = sum(spent) / len(trials)
    return found


def simulated(
    landscape: Landscape,
    seed: int,
    counts: Mapping[str, int],
    search: Mapping[str, Any],
    floors: Mapping[str, float | str] | None = None,
) -> tuple[dict[int, tuple[Items, int]], StudyContext]:
    """Who answers each item, and the bench of a landscape's study.

    Args:
        landscape: What is searched.
        seed: Of the items.
        counts: Items of each split.
        search: The study's settings besides its methods.
        floors: Its constraints.
    """
    generator = np.random.default_rng(seed)
    items: dict[int, tuple[Items, int]] = {}
    questions: list[Item] = []
    numbers: dict[str, tuple[int, ...]] = {}
    for split in SPLITS:
        drawn, first = landscape.draw(counts[split], generator), len(questions)
        numbers[split] = tuple(range(first, first + counts[split]))
        for place, task in enumerate(drawn.tasks):
            items[first + place] = drawn, place
            questions.append(Item(task, f"{first + place:x}", place))
    space = landscape.space
    study = {
        "base_model": space.base,
        "models": list(space.donors),
        "search": {"methods": list(space.methods), **search},
        "objective": {
            "tasks": [{"task": task} for task in landscape.weights],
            "constraints": dict(floors or {}),
        },
    }
    spec = parse_study(study, Path(), "simulated")
    objective = Questions(questions, dict(landscape.weights))
    return items, StudyContext(spec, objective, Splits(**numbers), space, {})


def generations(spent: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    for start in range(0, len(spent), size):
        yield spent[start : start + size]


def longest(spent: Sequence[float], count: int) -> float:
    """How long a generation takes, who is free doing the next."""
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
