"""The command line: its commands, parsed to typed options. Imports nothing heavy for ``--help``."""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn

from search.options import (
    BuildOptions,
    CheckOptions,
    DemoOptions,
    ExportOptions,
    InitOptions,
    Options,
    PushOptions,
    ReportOptions,
    RunOptions,
    SampleOptions,
    ScoreOptions,
)


class Command(NamedTuple):
    """A command of mergesearch."""

    module: str  # of its function, in `search.commands`
    options: type[Options]  # type of its options
    summary: str  # what it does
    usage: str  # its arguments in short
    example: str  # arguments that work


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "demo": Command(
            "files",
            DemoOptions,
            "train a small family, search it, show the result",
            "[options]",
            "--seed 1",
        ),
        "run": Command(
            "files",
            RunOptions,
            "run a study, or go on with it",
            "STUDY --out RUN [options]",
            "study.yaml --out runs/mine",
        ),
        "init": Command(
            "files",
            InitOptions,
            "write a study to begin with; asks for what is missing",
            "--base B --models M ... --tasks T ... [options]",
            "--base base --models a b --tasks my.jsonl",
        ),
        "build": Command(
            "files",
            BuildOptions,
            "merge a recipe into a checkpoint",
            "RECIPE OUT [options]",
            "recipe.yaml merged",
        ),
        "score": Command(
            "files",
            ScoreOptions,
            "score a model as a study does",
            "MODEL STUDY [options]",
            "merged study.yaml",
        ),
        "check": Command(
            "files",
            CheckOptions,
            "validate a file and print its plan",
            "FILE [options]",
            "study.yaml",
        ),
        "export": Command(
            "runs",
            ExportOptions,
            "save another trial of a run",
            "RUN OUT [options]",
            "runs/mine out --trial 7",
        ),
        "sample": Command(
            "runs",
            SampleOptions,
            "show what the models write",
            "RUN [options]",
            "runs/mine --prompt 'Sort: d a c'",
        ),
        "report": Command(
            "runs",
            ReportOptions,
            "draw a run's page, finished or not",
            "RUN [options]",
            "runs/mine",
        ),
        "push": Command(
            "runs",
            PushOptions,
            "upload a run's winner to the Hub",
            "RUN ORG/NAME [options]",
            "runs/mine org/name",
        ),
    }
)


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
            argument_default=argparse.SUPPRESS,  # the dataclass has the defaults
        )
        group = made.add_argument_group()  # one, so that --help fits a screen
        group.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        _add_arguments(group, command.options)
    return parser


def _add_arguments(group: argparse._ArgumentGroup, options: type[Options]) -> None:
    """Add an argument for each field that has one, a command's own fields before inherited ones."""
    known = options.__dataclass_fields__
    for name in dict.fromkeys(name for c in options.__mro__ for name in inspect.get_annotations(c)):
        if added := dict[str, Any](known[name].metadata):
            flags = added.pop("flags")
            if flags:
                added["dest"] = name
            group.add_argument(*(flags or [name]), **added)
