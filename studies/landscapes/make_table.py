"""Tabulate a study's landscape: the answers of many recipes to many items, once.

    python studies/landscapes/make_table.py studies/demo/study.yaml studies/landscapes/demo.npz

Searches are then replayed on the table in seconds (``tests/bench/bench_search.py``). Recipes are
the study's warm starts and, for every method, Sobol points of its space and then TPE's proposals,
given the value on all tabulated items: the table is densest where searches go. A second call
resumes an unfinished table, or extends a finished one.

The file holds, for n recipes and m items: ``answers`` (n, ceil(m / 8)) packed bits; ``tasks`` (m)
names and ``items`` (m) keys of the items; ``space``, ``weights`` of the tasks, ``points`` and
``recipes`` as JSON, models called by the last part of their name.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import TPESampler
from scipy.stats import qmc

from objectives.base import Item
from search.preparing.context import StudyContext, load, plan_study
from search.preparing.models import Hardware
from search.proposing.recipes import to_recipe
from search.proposing.space import Point, Space
from search.proposing.starts import warm_starts
from search.study.reading import load_study

SAVE_EVERY = 5
SOBOL = 1024  # points of the sequence: no method gets more


@dataclass
class Table:
    """What is tabulated so far."""

    space: Space
    weights: dict[str, float]
    items: Sequence[Item]
    points: list[Point]
    answers: list[NDArray[np.bool_]]

    def values(self) -> list[float]:
        """Each recipe's weighted task mean over all items."""
        tasks = np.array([item.task for item in self.items])
        shares = {
            task: weight / sum(self.weights.values()) for task, weight in self.weights.items()
        }
        of_items = sum(share * (tasks == t) / (tasks == t).sum() for t, share in shares.items())
        return [float(answers @ of_items) for answers in self.answers]

    def save(self, file: Path) -> None:
        """Write the table; a kill leaves the old one or the new one."""
        recipes = [to_recipe(self.space, point).model_dump(mode="json") for point in self.points]
        new = file.with_suffix(".new.npz")
        np.savez_compressed(
            new,
            answers=np.packbits(self.answers, axis=1),
            tasks=[item.task for item in self.items],
            items=[item.key for item in self.items],
            **{
                name: np.array(json.dumps(value))
                for name, value in (
                    ("space", asdict(self.space)),
                    ("weights", self.weights),
                    ("points", self.points),
                    ("recipes", recipes),
                )
            },
        )
        new.replace(file)

    def resume(self, file: Path) -> None:
        """Take over what a file holds.

        Raises:
            SystemExit: It is the table of another study.
        """
        with np.load(file) as stored:
            theirs = json.loads(str(stored["space"])), [str(key) for key in stored["items"]]
            mine = json.loads(json.dumps(asdict(self.space))), [item.key for item in self.items]
            if theirs != mine:
                raise SystemExit(f"{file} has another space or other items; choose another file")
            self.points = json.loads(str(stored["points"]))
            answers = np.unpackbits(stored["answers"], axis=1, count=len(self.items))
            self.answers = list(answers > 0)


def named(space: Space) -> Space:
    """The space with its models called by the last part of their name."""
    return replace(
        space, base=Path(space.base).name, donors=tuple(Path(donor).name for donor in space.donors)
    )


def spread(items: Sequence[Item], per_task: int) -> list[int]:
    """Numbers of at most so many different items of each task, chosen by content."""
    first = {item.key: number for number, item in reversed(list(enumerate(items)))}
    chosen: list[int] = []
    counts: Counter[str] = Counter()
    for _, number in sorted(first.items()):
        task = items[number].task
        if counts[task] < per_task:
            counts[task] += 1
            chosen.append(number)
    return sorted(chosen)


def sobol_point(space: Space, method: str, number: int) -> Point:
    """The Sobol point of this number in a method's space."""
    ranges = dict(space.distributions)
    del ranges["method"]
    shares = dict(zip(ranges, qmc.Sobol(len(ranges), rng=0).random(SOBOL)[number], strict=True))
    floats = {name: r.low + shares[name] * (r.high - r.low) for name, r in ranges.items()}
    return {"method": method, **floats}


def searched_point(table: Table, method: str, seed: int) -> Point:
    """What TPE proposes for a method after all that is tabulated of it."""
    ranges: dict[str, Any] = dict(table.space.distributions)
    ranges["method"] = optuna.distributions.CategoricalDistribution([method])
    trials = [
        optuna.create_trial(params=dict(point), distributions=ranges, value=value)
        for point, value in zip(table.points, table.values(), strict=True)
        if point["method"] == method
    ]
    sampler = TPESampler(seed=1000 * seed + len(trials), n_startup_trials=0, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(trials)
    return study.ask(ranges).params


def plan(table: Table, sobol: int, searched: int) -> Iterator[Point]:
    """Yield points as long as methods lack them, one of each method in turn."""
    yield from (point for _, point in warm_starts(table.space))
    for number in range(sobol):
        for method in table.space.methods:
            yield sobol_point(table.space, method, number)
    for seed in count():  # another one each time: what is proposed may be in the table
        counts = Counter(point["method"] for point in table.points)
        lacking = [m for m in table.space.methods if 1 < counts[m] < sobol + searched]
        if not lacking:
            return
        yield searched_point(table, min(lacking, key=lambda method: counts[method]), seed)


def tabulate(
    bench: StudyContext, table: Table, numbers: Sequence[int], file: Path, points: Iterable[Point]
) -> None:
    """Build and ask every planned recipe that is not in the table yet."""
    known = {to_recipe(table.space, point).key for point in table.points}
    for point in points:
        key = to_recipe(table.space, point).key
        if key in known:
            continue
        bench.builder.build(to_recipe(bench.space, point))
        answered = bench.objective.score(bench.builder.model, numbers)
        answers = np.array([answer.value for answer in answered])
        if not np.isin(answers, (0, 1)).all():
            raise SystemExit("a table holds answers that are right or wrong; choose such a metric")
        known.add(key)
        table.points.append(point)
        table.answers.append(answers > 0)
        if len(known) % SAVE_EVERY == 0:
            table.save(file)
            print(f"{len(known)} recipes, best {max(table.values()):.3f}", flush=True)
    table.save(file)


def main() -> None:
    """Tabulate and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sobol", type=int, default=40, help="Sobol points of each method")
    parser.add_argument("--searched", type=int, default=40, help="points of TPE of each method")
    parser.add_argument("--per-task", type=int, default=260, help="items of each task, at most")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    bench = load(plan_study(load_study(options.study)), Hardware(options.device))
    numbers = spread(bench.objective.items, options.per_task)
    items = [bench.objective.items[number] for number in numbers]
    table = Table(named(bench.space), bench.weights, items, [], [])
    if options.out.exists():
        table.resume(options.out)
    tabulate(bench, table, numbers, options.out, plan(table, options.sobol, options.searched))
    print(f"{len(table.points)} recipes x {len(items)} items, best {max(table.values()):.3f}")


if __name__ == "__main__":
    main()
