"""The command line: its grammar, parsed to typed options. Imports nothing heavy for ``--help``."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn

from search.options import (
    BuildOptions,
    CheckOptions,
    ExportOptions,
    InitOptions,
    Options,
    PushOptions,
    ReportOptions,
    RunOptions,
    SampleOptions,
    ScoreOptions,
)

DEMO: Final = Path(__file__).parent.parent / "studies" / "demo"
Add = Callable[..., Any]  # argparse's add_argument


class UsageError(ValueError):
    """A command line that cannot be parsed; the message says what to do."""


def parse(argv: Sequence[str]) -> tuple[str, Options]:
    """Return a command's name and its options.

    Raises:
        UsageError: The command line cannot be parsed.
    """
    values = vars(_make_parser().parse_args(argv))
    command = values.pop("command")
    return command, COMMANDS[command].options(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _make_parser() -> argparse.ArgumentParser:
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
    for name, command in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            usage=f"mergesearch {name} {command.usage}",
            epilog=f"example: mergesearch {name} {command.example}",
            add_help=False,
        )
        add = made.add_argument_group().add_argument  # one group, so that --help fits a screen
        add("-h", "--help", action="help", help=argparse.SUPPRESS)
        command.add_arguments(add)
        _add_common(add)
        made.set_defaults(**command.defaults)
    return parser


def _add_demo(add: Add) -> None:
    add("--out", metavar="RUN", type=Path, default=Path("runs/demo"), help="run folder")
    _add_search(add)


def _add_run(add: Add) -> None:
    add("study", metavar="STUDY", type=Path, help="the study's YAML file")
    add("--out", metavar="RUN", type=Path, required=True, help="run folder, made or resumed")
    _add_search(add)


def _add_search(add: Add) -> None:
    add("--trials", metavar="N", type=_count, help="instead of the study's number")
    add("--seed", metavar="S", type=_seed, help="instead of the study's seed")
    add("--timeout", metavar="T", type=_seconds, help="search no longer than, like 90m or 8h")
    add("--force-new", action="store_true", help="set the folder's study aside, begin another")
    _add_storage(add)
    _add_hardware(add)


def _add_init(add: Add) -> None:
    add("--base", metavar="B", help="what the models were fine-tuned from: a folder or hub id")
    add("--models", metavar="M", nargs="+", help="to merge; BASE+ADAPTER is a LoRA adapter")
    what = "names that lm-eval knows, or .yaml or .jsonl files"
    add("--tasks", metavar="T", nargs="+", help=what)
    what = "to write (default: study.yaml)"
    add("--out", metavar="FILE", type=Path, default=Path("study.yaml"), help=what)
    add("--trials", metavar="N", type=_count, help="recipes to evaluate at most")


def _add_build(add: Add) -> None:
    add("recipe", metavar="RECIPE", type=Path, help="a mergekit recipe")
    add("out", metavar="OUT", type=Path, help="the folder to make")


def _add_score(add: Add) -> None:
    add("model", metavar="MODEL", help="a checkpoint folder, a hub id or a recipe's YAML file")
    add("study", metavar="STUDY", type=Path, help="the study's YAML file")
    splits = ("search", "select", "test")
    what = "search, select (the default) or test"
    add("--split", metavar="S", choices=splits, default="select", help=what)


def _add_check(add: Add) -> None:
    add("file", metavar="FILE", type=Path, help="a study or a recipe")


def _add_export(add: Add) -> None:
    add("run", metavar="RUN", type=Path, help="run folder")
    add("out", metavar="OUT", type=Path, help="the folder to make")
    add("--trial", metavar="N", type=int, help="its number (default: the winner)")
    _add_storage(add)
    _add_hardware(add)


def _add_sample(add: Add) -> None:
    add("run", metavar="RUN", type=Path, help="run folder")
    what = "to be continued; may be given again (default: test items the winner gained and lost)"
    add("--prompt", metavar="TEXT", action="append", type=_text, help=what)
    add("--max-tokens", metavar="N", type=_count, default=128, help="to write (default: 128)")
    add("--items", metavar="N", type=_count, default=6, help="of each at most (default: 6)")
    _add_storage(add)
    _add_hardware(add)


def _add_report(add: Add) -> None:
    add("run", metavar="RUN", type=Path, help="run folder")
    add("--out", metavar="FILE", type=Path, help="to write (default: RUN/report.html)")
    _add_storage(add)


def _add_push(add: Add) -> None:
    add("run", metavar="RUN", type=Path, help="run folder")
    what = "the repository, made if there is none"
    add("repo", metavar="ORG/NAME", type=_repository, help=what)
    add("--private", action="store_true", help="if it is made, for its owners alone")


def _add_storage(add: Add) -> None:
    add("--storage", metavar="URL", help="database (default: a file in the folder)")


def _add_hardware(add: Add) -> None:
    add("--memory", metavar="SIZE", type=_size, help="use no more than this, like 24GB")
    add("--no-compile", dest="compiled", action="store_false", help="merge in chunks instead")
    add("--workers", metavar="N", type=_count, help="so many processes, each with a model")
    what = "2: a model over two GPUs; 0.5: two models on one"
    add("--gpus-per-worker", metavar="N", type=_gpus, help=what)
    what = "the cluster they are on (default: this machine)"
    add("--ray-address", metavar="URL", help=what)


def _add_common(add: Add) -> None:
    add("--device", metavar="D", help="where the model lives (default: a GPU, else cpu)")
    add("--json", action="store_true", help="print one JSON object a line for each event")
    add("-v", "--verbose", action="store_true", help="let libraries print what they like")


class Command(NamedTuple):
    """A command of mergesearch.

    Attributes:
        options: Type of its options, whose fields are the arguments' names.
        add_arguments: Adds its own arguments; those of ``Options`` follow.
        summary: Says in its help what it does.
        usage: Its arguments in short.
        example: Arguments that work.
        defaults: Options that are no arguments of it.
    """

    options: type[Options]
    add_arguments: Callable[[Add], None]
    summary: str
    usage: str
    example: str
    defaults: Mapping[str, Any] = MappingProxyType({})


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "demo": Command(
            RunOptions,
            _add_demo,
            "train a small family, search it, show the result",
            "[options]",
            "--seed 1",
            MappingProxyType({"study": DEMO / "study.yaml"}),
        ),
        "run": Command(
            RunOptions,
            _add_run,
            "run a study, or go on with it",
            "STUDY --out RUN [options]",
            "study.yaml --out runs/mine",
        ),
        "init": Command(
            InitOptions,
            _add_init,
            "write a study to begin with; asks for what is missing",
            "--base B --models M ... --tasks T ... [options]",
            "--base base --models a b --tasks my.jsonl",
        ),
        "build": Command(
            BuildOptions,
            _add_build,
            "merge a recipe into a checkpoint",
            "RECIPE OUT [options]",
            "recipe.yaml merged",
        ),
        "score": Command(
            ScoreOptions,
            _add_score,
            "score a model as a study does",
            "MODEL STUDY [options]",
            "merged study.yaml",
        ),
        "check": Command(
            CheckOptions,
            _add_check,
            "validate a file and print its plan",
            "FILE [options]",
            "study.yaml",
        ),
        "export": Command(
            ExportOptions,
            _add_export,
            "save another trial of a run",
            "RUN OUT [options]",
            "runs/mine out --trial 7",
        ),
        "sample": Command(
            SampleOptions,
            _add_sample,
            "show what the models write",
            "RUN [options]",
            "runs/mine --prompt 'Sort: d a c'",
        ),
        "report": Command(
            ReportOptions,
            _add_report,
            "draw a run's page, finished or not",
            "RUN [options]",
            "runs/mine",
        ),
        "push": Command(
            PushOptions,
            _add_push,
            "upload a run's winner to the Hub",
            "RUN ORG/NAME [options]",
            "runs/mine org/name",
        ),
    }
)


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


def _repository(text: str) -> str:
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no repository's id like org/name")
    return text


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
