"""Where the time of a search's trials goes: one JSON line.

    python tests/bench/bench_trial.py STUDY.yaml [--trials N] [--seed S]

``seconds`` are those of the search loop, from the first proposal to the last trial told. The shares
are of building candidates (``build``), scoring them (``score``), proposing (``propose``), the
database (``store``), the page and the best trial so far (``show``), and everything else
(``other``). ``overhead`` is the share of all but building and scoring.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from merge_engine.building.builder import Builder
from objectives.harness.harness import Harness
from search import pipeline
from search.cli import main as mergesearch
from search.proposing.samplers import Proposer
from search.running.search_loop import SearchLoop
from search.storing.store import Store
from search.storing.trials import OpenTrial, TrialLog

PARTS: dict[str, list[tuple[Any, str]]] = {
    "build": [(Builder, "build")],
    "score": [(Harness, "score")],
    "propose": [(Proposer, "ask")],
    "store": [
        *((Store, name) for name in ("save", "results", "blocks", "evaluations")),
        *((TrialLog, name) for name in ("records", "enqueue", "open", "header", "set_header")),
        *((OpenTrial, name) for name in ("set_recipe", "fail", "tell")),
    ],
    "show": [(pipeline, "draw_report"), (pipeline, "_announce_best")],
    "other": [(SearchLoop, "work")],
}


class Clock:
    """Seconds of each part of the search loop, without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds = Counter[str]()
        self._parts: list[str] = []  # that are under way, the innermost last
        self._since = 0.0

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._parts and self._parts[0] == "other":
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._parts.pop()

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--trials", default="40")
    parser.add_argument("--seed", default="0")
    given = parser.parse_args()
    clock = Clock()
    for part, places in PARTS.items():
        for owner, name in places:
            patch.object(owner, name, clock.timed(part, getattr(owner, name))).start()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", f"{folder}/run", "--trials", given.trials, "--seed", given.seed]
        mergesearch(["run", str(given.study), *options])
    total = sum(clock.seconds.values())
    shares = {part: round(clock.seconds[part] / total, 4) for part in PARTS}
    overhead = 1 - shares["build"] - shares["score"]
    print(json.dumps({"seconds": round(total, 1), **shares, "overhead": round(overhead, 4)}))


if __name__ == "__main__":
    main()
