"""What kills cost a run, and what several workers gain it; prints one JSON line an experiment.

``python tests/bench/bench_faults.py coordinator path workers throughput steps idle`` with
``PYTHONPATH=tests/support``. The last simulates time; the others run the demo's study, whose models
have to be trained already (``mergesearch demo``), or another (``--study``).
"""

import argparse
import heapq
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
from search.running.ray_workers import RayWorkers
from search.running.run import Run
from search.running.search_loop import search
from search.running.tuner import Tuner
from search.running.workers import Job, LocalWorker, Workers
from search.storing.folder import DATABASE
from search.study.reading import load_study
from simulated import SimulatedWorkers, simulated_context, simulated_run

STUDY = DEMO / "study.yaml"
Row = tuple[Any, ...]


def counted(log: str, *arguments: str) -> None:
    """Run the command, with a line in a file for every block that a worker is given."""
    for kind in (LocalWorker, RayWorkers):

        def submit(self: Any, worker: int, job: Job, submit: Any = kind.submit) -> None:
            with Path(log).open("a") as file:
                file.write(f"{job.recipe.key}\n")
            submit(self, worker, job)

        kind.submit = submit  # type: ignore[method-assign]
    sys.exit(main(arguments))


class Session:
    """Sessions of one run of a study, one after another."""

    def __init__(self, folder: Path, study: Path, *options: str) -> None:
        self.run, self.log = folder / "run", folder / "submitted"
        folder.mkdir(parents=True)
        self.log.touch()
        self.command = [sys.executable, __file__, "counted", str(self.log), "run", str(study)]
        self.command += ["--out", str(self.run), "--device", "cpu", *options]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=sys.stderr)

    @property
    def submitted(self) -> int:
        """Blocks that were given to workers, over all sessions."""
        return self.log.read_bytes().count(b"\n")

    def wait_for(self, count: int, process: subprocess.Popen[bytes]) -> bool:
        """Whether so many were given before the session was over."""
        return wait_until(lambda: self.submitted >= count, process)

    def rows(self, query: str) -> list[Row]:
        if not (self.run / DATABASE).exists():
            return []
        with sqlite3.connect(f"file:{self.run / DATABASE}?mode=ro", uri=True) as database:
            return sorted(database.execute(query))

    @property
    def finished(self) -> list[Row]:
        """Number, state and value of each finished trial."""
        return self.rows(
            "select number, state, value from trials left join trial_values using (trial_id) "
            "where state in ('COMPLETE', 'FAIL')"
        )

    @property
    def steps(self) -> list[Row]:
        """Number, losses and evaluations of each step of tuning, and the weights of points."""
        query = (
            "select path, step, is_point, losses, evaluations, case when is_point then state end"
        )
        return self.rows(f"{query} from mergesearch_steps")

    @property
    def answers(self) -> list[Row]:
        return self.rows("select recipe, split, block, answers from mergesearch_answers")

    @property
    def recipe(self) -> str:
        return (self.run / "recipe.yaml").read_text()


def coordinator(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The coordinator is killed at random moments, and the run goes on each time."""
    whole = Session(folder / "whole", options.study, "--trials", str(options.trials))
    assert whole.start().wait() == 0
    killed = Session(folder / "killed", options.study, "--trials", str(options.trials))
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
    session = Session(
        folder / "run", options.study, "--trials", str(options.trials), "--workers", "2"
    )
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


def path(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The coordinator is killed at random steps of a path of tuned weights, and goes on."""
    more = ["--trials", str(options.trials)]
    if options.workers > 1:  # without the option no Ray is needed
        more += ["--workers", str(options.workers)]
    whole = Session(folder / "whole", options.study, *more)
    assert whole.start().wait() == 0
    killed = Session(folder / "killed", options.study, *more)
    draw, kills, alike = random.Random(options.seed), 0, 0
    seconds = whole.rows("select max(seconds) from mergesearch_steps")[0][0]
    for moment in sorted(draw.sample(range(1, len(whole.steps) - 1), options.kills)):
        process = killed.start()
        if wait_until(lambda moment=moment: len(killed.steps) > moment, process):
            time.sleep(draw.uniform(0, seconds))
            process.kill()
            kills += 1
        process.wait()
        alike += killed.steps == whole.steps[: len(killed.steps)]
    assert killed.start().wait() == 0
    return {
        "steps": len(whole.steps),
        "kills": kills,
        "same_until_each_kill": alike,
        "same_steps": killed.steps == whole.steps,
        "same_trials": killed.finished == whole.finished,
        "same_recipe": killed.recipe == whole.recipe,
    }


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Whether something happened before a process was over."""
    while process.poll() is None and not happened():
        time.sleep(0.01)
    return process.poll() is None


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


class First:
    """The first of some workers."""

    def __init__(self, workers: Workers, count: int) -> None:
        self.count = count
        self.submit, self.next = workers.submit, workers.next
        self.call, self.close = workers.call, workers.close


def throughput(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two workers of one thread each against one of them, on the same recipes."""
    spec = load_study(options.study)
    context = load_outline(plan_study(spec))
    recipes = [to_recipe(context.space, point) for _, point in warm_starts(context.space)[:6]]
    crew = RayWorkers(spec, Hardware("cpu"), count=2)
    rates: dict[int, list[float]] = {2: [], 1: []}
    for number in range(9):
        for count, found in rates.items():
            (mine := folder / f"{number}-{count}").mkdir()
            run = Run(mine, context, First(crew, count), lambda _: None)
            start = time.perf_counter()
            run.scores.evaluate(recipes, "search")
            items = len(recipes) * len(context.splits.search)
            found.append(items / (time.perf_counter() - start))
    crew.close()
    found = {f"items_per_second_by_{count}": rate for count, rate in rates.items()}
    return {**found, "gain": gain(rates)}


def steps(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of tuning by several workers of one thread each, against those of one of them.

    ``gain`` is of steps per second. ``cpu_gain`` is the same in CPU seconds, of the coordinator and
    of the worker that had most, which other programs on the machine do not take.
    """
    spec = load_study(options.study)
    context = load_outline(plan_study(spec))
    crew = RayWorkers(spec, Hardware("cpu"), count=options.workers)
    rates: dict[int, list[float]] = {options.workers: [], 1: []}
    by_cpu: dict[int, list[float]] = {options.workers: [], 1: []}
    weights = {}
    for number in range(options.repeats + 1):
        for count in rates:
            (mine := folder / f"{number}-{count}").mkdir()
            run = Run(mine, context, First(crew, count), lambda _: None)
            run.bind_to_store()
            before = cpu_seconds()
            Tuner(run, math.inf).advance([])
            spent = [now - then for now, then in zip(cpu_seconds(), before, strict=True)]
            weights[count] = run.store.states(points=True)[-1][0]
            if number:  # the first are slower
                taken = [step.seconds for step in run.store.steps() if step.step]
                rates[count].append(len(taken) / sum(taken))
                by_cpu[count].append(len(taken) / (spent[0] + max(spent[1:])))
    crew.close()
    apart = np.abs(weights[1] - weights[options.workers]).max()
    found = {f"steps_per_second_by_{count}": rate for count, rate in rates.items()}
    return {**found, "gain": gain(rates), "cpu_gain": gain(by_cpu), "apart": float(apart)}


def cpu_seconds() -> list[float]:
    """CPU seconds of this process, and of each worker's."""
    times = [actor.cpu_times() for actor in sorted(actors(os.getpid()), key=lambda one: one.pid)]
    return [time.process_time(), *(each.user + each.system for each in times)]


def gain(rates: dict[int, list[float]]) -> float:
    """Return the median ratio of the rates of several workers, which come first, to one's."""
    return float(np.median([more / one for more, one in zip(*rates.values(), strict=True)]))


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


EXPERIMENTS = {
    each.__name__: each for each in (coordinator, path, workers, throughput, steps, idle)
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["counted"]:
        counted(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--workers", type=int, default=2, help="of the experiments path and steps")
    parser.add_argument("--repeats", type=int, default=3, help="of the experiment steps")
    chosen = parser.parse_args()
    for name in chosen.experiments:
        with tempfile.TemporaryDirectory() as folder:
            found = EXPERIMENTS[name](Path(folder), chosen)
        print(json.dumps({"experiment": name, **vars(chosen), **found}, default=str), flush=True)
