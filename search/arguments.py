"""The commands and what they take. Nothing heavy is imported here: ``--help`` is quick."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Add = Callable[..., Any]


class UsageError(ValueError):
    """The command line is none of ours: the message says what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """Of all commands; ``command`` is then the name of the one that was given.

    What is no command line raises ``UsageError``.
    """
    parser = _Parser(
        prog="mergesearch",
        usage="mergesearch COMMAND ...",
        description="Finds the model-merge recipe that is really better, and says how sure it is.",
        epilog="example: mergesearch run study.yaml --out runs/mine",
    )
    version = importlib.metadata.version("mergesearch")
    parser.add_argument("--version", action="version", version=f"mergesearch {version}")
    commands = parser.add_subparsers(
        title="commands", prog=parser.prog, required=True, dest="command", metavar="COMMAND"
    )

    def command(name: str, what: str, usage: str, example: str) -> Add:
        """Add a command; all it takes is one block of its help, which is to fit a screen."""
        made = commands.add_parser(
            name,
            help=what,
            description=what,
            usage=f"mergesearch {name} {usage}",
            epilog=f"example: mergesearch {name} {example}",
            add_help=False,
        )
        add = made.add_argument_group().add_argument
        add("-h", "--help", action="help", help=argparse.SUPPRESS)
        return add

    _running(command)
    _without_a_run(command)
    _afterwards(command)
    _published(command)
    return parser


def _running(command: Add) -> None:
    """What searches."""
    what = "train a small family, search it, show the result"
    demo = command("demo", what, "[options]", "--seed 1")
    demo("--out", metavar="RUN", type=Path, default=Path("runs/demo"), help="run folder")
    what = "run a study, or go on with it"
    run = command("run", what, "STUDY --out RUN [options]", "study.yaml --out runs/mine")
    run("study", metavar="STUDY", type=Path, help="the study's YAML file")
    run("--out", metavar="RUN", type=Path, required=True, help="run folder, made or resumed")
    for add in (demo, run):
        add("--trials", metavar="N", type=_count, help="instead of the study's number")
        add("--seed", metavar="S", type=_seed, help="instead of the study's seed")
        add("--timeout", metavar="T", type=_seconds, help="search no longer than, like 90m or 8h")
        add("--force-new", action="store_true", help="set the folder's study aside, begin another")
        _storage(add)
        _machine(add)
        _common(add)


def _without_a_run(command: Add) -> None:
    """What is done with files alone."""
    what = "write a study to begin with; asks for what is missing"
    usage = "--base B --models M ... --tasks T ... [options]"
    init = command("init", what, usage, "--base base --models a b --tasks my.jsonl")
    init("--base", metavar="B", help="what the models were fine-tuned from: a folder or hub id")
    init("--models", metavar="M", nargs="+", help="to merge; BASE+ADAPTER is a LoRA adapter")
    what = "names that lm-eval knows, or .yaml or .jsonl files"
    init("--tasks", metavar="T", nargs="+", help=what)
    what = "to write (default: study.yaml)"
    init("--out", metavar="FILE", type=Path, default=Path("study.yaml"), help=what)
    init("--trials", metavar="N", type=_count, help="recipes to try at most")
    _common(init)
    what = "merge a recipe into a checkpoint"
    build = command("build", what, "RECIPE OUT [options]", "recipe.yaml merged")
    build("recipe", metavar="RECIPE", type=Path, help="a mergekit recipe")
    build("out", metavar="OUT", type=Path, help="the folder to make")
    _common(build)
    what = "score a model as a study does"
    score = command("score", what, "MODEL STUDY [options]", "merged study.yaml")
    score("model", metavar="MODEL", help="a checkpoint folder, a hub id or a recipe's YAML file")
    score("study", metavar="STUDY", type=Path, help="the study's YAML file")
    splits = ("search", "select", "test")
    what = "search, select (the default) or test"
    score("--split", metavar="S", choices=splits, default="select", help=what)
    _common(score)
    check = command("check", "validate a file and print its plan", "FILE [options]", "study.yaml")
    check("file", metavar="FILE", type=Path, help="a study or a recipe")
    _common(check)


def _afterwards(command: Add) -> None:
    """What has a run's models work again."""
    what = "save another trial of a run"
    export = command("export", what, "RUN OUT [options]", "runs/mine out --trial 7")
    export("run", metavar="RUN", type=Path, help="run folder")
    export("out", metavar="OUT", type=Path, help="the folder to make")
    export("--trial", metavar="N", type=int, help="its number (default: the winner)")
    _storage(export)
    _machine(export)
    _common(export)
    example = "runs/mine --prompt 'Sort: d a c'"
    sample = command("sample", "show what the models write", "RUN [options]", example)
    sample("run", metavar="RUN", type=Path, help="run folder")
    what = "to be continued; may be given again (default: test items the winner gained and lost)"
    sample("--prompt", metavar="TEXT", action="append", type=_text, help=what)
    sample("--max-tokens", metavar="N", type=_count, default=128, help="to write (default: 128)")
    sample("--items", metavar="N", type=_count, default=6, help="of each at most (default: 6)")
    _storage(sample)
    _machine(sample)
    _common(sample)


def _published(command: Add) -> None:
    """What needs no model."""
    what = "draw a run's page, finished or not"
    report = command("report", what, "RUN [options]", "runs/mine")
    report("run", metavar="RUN", type=Path, help="run folder")
    report("--out", metavar="FILE", type=Path, help="to write (default: RUN/report.html)")
    _storage(report)
    _common(report)
    what = "upload a run's winner to the Hub"
    push = command("push", what, "RUN ORG/NAME [options]", "runs/mine org/name")
    push("run", metavar="RUN", type=Path, help="run folder")
    push("repo", metavar="ORG/NAME", help="the repository, made if there is none")
    push("--private", action="store_true", help="if it is made, for its owners alone")
    _common(push)


def _storage(add: Add) -> None:
    add("--storage", metavar="URL", help="database (default: a file in the folder)")


def _machine(add: Add) -> None:
    add("--memory", metavar="SIZE", type=_size, help="use no more than this, like 24GB")
    add("--no-compile", action="store_true", help="merge in chunks instead")
    add("--workers", metavar="N", type=_count, help="so many processes, each with a model")
    what = "2: a model over two GPUs; 0.5: two models on one"
    add("--gpus-per-worker", metavar="N", type=_gpus, help=what)
    what = "the cluster they are on (default: this machine)"
    add("--ray-address", metavar="URL", help=what)


def _common(add: Add) -> None:
    add("--device", metavar="D", help="where the model lives (default: a GPU, else cpu)")
    add("--json", action="store_true", help="print one JSON object a line for each event")
    add("-v", "--verbose", action="store_true", help="let libraries print what they like")


def _gpus(text: str) -> float:
    try:
        gpus = float(text)
    except ValueError:
        gpus = -1.0
    if not (0 <= gpus <= 1 or gpus.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs like 1, 2 or 0.5")
    return gpus


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _seconds(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time like 45s, 90m or 8h")
    return seconds


def _size(text: str) -> int:
    from merge_engine.models.memory_plan import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
