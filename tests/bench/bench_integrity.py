"""Kills at every kind of write, changed bytes in cache and database; a JSON line an experiment.

``PYTHONPATH=tests/support python tests/bench/bench_integrity.py kills flips database``. A study of
tiny models is begun by ``init``, run and built. Each process ends by SIGKILL at one of its writes
(a file opened to be written, renamed or removed, a statement of the database), and the same command
is given again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from merge_engine.building.checksums import is_whole
from merge_engine.models import measurements
from search.cli import main
from search.storing.folder import DATABASE
from search.storing.result import read_result
from search.study.reading import load_study
from tiny_models import make_llama

AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
PHASES = ("statistics", "trial", "conclusion", "checkpoint", "card", "report", "build", "init")


def prepare(folder: Path) -> dict[str, list[str]]:
    """Make models and questions; return the commands, which are given in their order."""
    base = make_llama(folder / "base", seed=0)
    for seed, name in enumerate("ab", start=1):
        make_llama(folder / name, seed=seed, base=base)
    draw = random.Random(0)
    words = ["".join(draw.sample("abcdefghijklm", 5)) for _ in range(60)]
    rows = [{"question": f"{word}=", "choices": [*word[:4]], "answer": 0} for word in words]
    (folder / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5}}
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"models": models}))
    names = [str(folder / name) for name in ("base", "a", "b")]
    start = ["init", "--base", names[0], "--models", *names[1:], "--trials", "4"]
    start += ["--tasks", str(folder / "pick.jsonl"), "--out", str(folder / "study" / "study.yaml")]
    device = ("--device", "cpu")
    return {
        "init": start,
        "run": ["run", str(folder / "study" / "study.yaml"), "--out", str(folder / "run"), *device],
        "build": ["build", str(folder / "recipe.yaml"), str(folder / "out"), *device],
    }


def phase_of(command: str, what: str, where: str, folder: Path) -> str | None:
    """Return the phase that a write belongs to; None: it is no write of ours."""
    if what != "sql" and not where.startswith(str(folder)):
        return None
    if f"{folder}/cache" in where:
        return "statistics"
    if command != "run":
        return command
    if what == "sql":
        return "conclusion" if "select" in where or "test" in where else "trial"
    name = where.removeprefix(f"{folder}/run/")
    if name.startswith("checkpoint"):
        return "card" if "README" in name else "checkpoint"
    return "report" if "report" in name else "conclusion" if "study.db" not in name else "trial"


def watch(command: str, folder: Path, act: Callable[[str], None]) -> None:
    """Call ``act`` with the phase of every write of this process."""

    def audit(name: str, args: Sequence[Any]) -> None:
        if name not in AUDITED or (name == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if phase := phase_of(command, name, str(args[0]), folder):
            act(phase)

    def execute(_conn: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.lstrip()[:6].upper() in ("INSERT", "UPDATE", "CREATE"):
            row = values[0] if isinstance(values, list) and values else values  # of several blocks
            split = row[2] if "mergesearch_answers" in statement and row else ""
            act(phase_of(command, "sql", str(split), folder) or "")

    event.listen(Engine, "after_cursor_execute", execute)
    sys.addaudithook(audit)


def start(command: str, folder: Path, words: list[str], kill: tuple[str, int] | None) -> int:
    """Run a command in a child, killed at the n-th write of a phase; return how it ended.

    The counts of its writes are left in a file.
    """
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counts, log = Counter[str](), os.open(folder / "writes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    measurements.CACHED_FROM = 0  # type: ignore[misc]

    def act(phase: str) -> None:
        counts[phase] += 1
        os.pwrite(log, json.dumps(counts).encode(), 0)
        if kill == (phase, counts[phase]):
            os.kill(os.getpid(), signal.SIGKILL)

    watch(command, folder, act)
    os.environ["MERGESEARCH_CACHE"] = str(folder / "cache")
    with (folder.parent / "said").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        code = main(words)
        said.flush()
    os._exit(code)


def finished(run: Path) -> set[tuple[Any, ...]]:
    """Number, parameters and value of each finished trial."""
    if not (run / DATABASE).exists():
        return set()
    with sqlite3.connect(run / DATABASE) as database:
        return {
            *database.execute(
                "select number, value from trials join trial_values using (trial_id) "
                "where state = 'COMPLETE'"
            )
        }


def half(folder: Path) -> list[str]:
    """List what is there and not whole."""
    found = [str(out) for out in (folder / "out", folder / "run" / "checkpoint") if out.exists()]
    found = [out for out in found if not is_whole(Path(out))]
    try:
        read_result(folder / "run")
        if (folder / "study" / "study.yaml").exists():
            load_study(folder / "study" / "study.yaml")
    except ValueError as error:
        found.append(str(error))
    return found


def outcome(folder: Path) -> Mapping[str, Any]:
    """Return all that an undisturbed and a killed run have to have in common."""
    result = read_result(folder / "run")
    assert result is not None
    return {
        "winner": result.winner.model_dump_json().replace(str(folder), ""),
        "lead": result.difference_to_best_donor.mean,
        "trials": finished(folder / "run"),
        "weights": [
            (out / "model.safetensors").read_bytes()
            for out in (folder / "out", folder / "run" / "checkpoint")
        ],
        "whole": half(folder) == [],
    }


def left_over(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if "partial" in path.name]


def kills(options: argparse.Namespace, top: Path) -> dict[str, Any]:
    """Kill at writes spread evenly over those of each phase; then the commands are given again."""
    whole, counts = top / "whole", Counter[str]()
    whole.mkdir()
    for command, words in prepare(whole).items():
        assert start(command, whole, words, None) == 0, (top / "said").read_text()
        counts |= Counter(json.loads((whole / "writes").read_text()))
    expected = outcome(whole)
    found = Counter[str]()
    each = -(-options.kills // len(PHASES))
    for phase in PHASES:
        for turn in range(each):
            number = 1 + turn * (counts[phase] - 1) // max(1, each - 1)
            folder = top / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for command, words in prepare(folder).items():
                code = start(command, folder, words, (phase, number))
                if code == -signal.SIGKILL:
                    found["kills"] += 1
                    before = finished(folder / "run")
                    found["half"] += len(half(folder))
                    code = start(command, folder, words, None)
                    found["lost"] += len(before - finished(folder / "run"))
                # Of a command that was killed when all was in its place.
                done = command != "run" and code == 2 and "exists" in (top / "said").read_text()
                if code and not done:
                    found["stuck"] += 1
                    print(phase, number, (top / "said").read_text(), file=sys.stderr)
            got = outcome(folder)
            wrong = [name for name in got if got[name] != expected[name]]
            found["other"] += bool(wrong)
            found["left"] += len(left_over(folder))
            if wrong or left_over(folder):
                print(phase, number, wrong, left_over(folder), file=sys.stderr)
    return {
        "writes": counts,
        **{k: found[k] for k in ("kills", "half", "lost", "stuck", "other", "left")},
    }


def flips(options: argparse.Namespace, top: Path) -> dict[str, Any]:
    """Flip a bit in files of the cache, one at a time, and build again."""
    folder, draw = top / "flipped", random.Random(options.seed)
    folder.mkdir()
    words, found = prepare(folder)["build"], Counter[str]()
    assert start("build", folder, words, None) == 0
    right = (folder / "out" / "model.safetensors").read_bytes()
    for _ in range(options.flips):
        file = draw.choice(sorted((folder / "cache").glob("??/*.safetensors")))
        before = file.read_bytes()
        place = draw.randrange(len(before))
        flipped = bytes([before[place] ^ (1 << draw.randrange(8))])
        file.write_bytes(before[:place] + flipped + before[place + 1 :])
        shutil.rmtree(folder / "out")
        assert start("build", folder, words, None) == 0, (top / "said").read_text()
        found["flipped"] += 1
        found["found"] += file.read_bytes() == before
        found["same_weights"] += (folder / "out" / "model.safetensors").read_bytes() == right
    return dict(found)


def database(options: argparse.Namespace, top: Path) -> dict[str, Any]:
    """Change a byte of a finished run's database, and draw its report and run it again."""
    folder, draw, found = top / "whole", random.Random(options.seed), Counter[str]()
    folder.mkdir()
    commands = prepare(folder)
    for command in ("init", "run", "build"):
        assert start(command, folder, commands[command], None) == 0, (top / "said").read_text()
    expected, whole = outcome(folder), (folder / "run" / DATABASE).read_bytes()
    shutil.copytree(folder / "run", top / "run")
    for _ in range(options.flips):
        place = draw.randrange(len(whole))
        tried = {"report": ["report", str(folder / "run")], "run": commands["run"]}
        for name, words in tried.items():
            shutil.rmtree(folder / "run")
            shutil.copytree(top / "run", folder / "run")
            changed = whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1 :]
            (folder / "run" / DATABASE).write_bytes(changed)
            code, said = start(name, folder, words, None), (top / "said").read_text()
            same = code == 0 and outcome(folder)["winner"] == expected["winner"]
            found[f"{name}_{'same' if same else 'refused' if code == 2 else 'wrong'}"] += 1
            if not same and code != 2:
                print(name, place, code, said, file=sys.stderr)
    return {"changed": options.flips, **found}


EXPERIMENTS = {each.__name__: each for each in (kills, flips, database)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--flips", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for name in chosen.experiments:
        with tempfile.TemporaryDirectory() as made:
            line = EXPERIMENTS[name](chosen, Path(made))
        print(json.dumps({"experiment": name, **vars(chosen), **line}), flush=True)
