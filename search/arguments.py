"""The command line: its commands, parsed to typed options. Imports nothing heavy for ``--help``."""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
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
    options: type[Options]  # type of its options, whose docstring says what it does
    example: str  # arguments that work

    @property
    def summary(self) -> str:
        """What the command does, as a phrase."""
        text = inspect.getdoc(self.options) or ""
        return text[:1].lower() + text[1:].rstrip(".")

    @property
    def usage(self) -> str:
        """Arguments in short."""
        required = [one.metadata for one in fields(self.options) if one.default is MISSING]
        words = [word for one in required for word in (*one["flags"], one["metavar"])]
        return self.options.usage or " ".join([*words, "[options]"])


COMMANDS: Final[Mapping[str, Command]] = {
    "demo": Command("files", DemoOptions, "--seed 1"),
    "run": Command("files", RunOptions, "study.yaml --out runs/mine"),
    "init": Command("files", InitOptions, "--base base --models a b --tasks my.jsonl"),
    "build": Command("files", BuildOptions, "recipe.yaml merged"),
    "score": Command("files", ScoreOptions, "merged study.yaml"),
    "check": Command("files", CheckOptions, "study.yaml"),
    "export": Command("runs", ExportOptions, "runs/mine out --trial 7"),
    "sample": Command("runs", SampleOptions, "runs/mine --prompt 'Sort: d a c'"),
    "report": Command("runs", ReportOptions, "runs/mine"),
    "push": Command("runs", PushOptions, "runs/mine org/name"),
}


class UsageError(ValueError):
    """A command line that cannot be parsed; the message says what to do."""


def parse(argv: Sequence[str]) -> tuple[str, Options]:
    """Return a command's name and its options."""
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
