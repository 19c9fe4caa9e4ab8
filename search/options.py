"""Options of the commands: a dataclass for each, whose docstring is the command's help.

Its fields define the arguments.
"""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

DEMO: Final = Path(__file__).parent.parent / "studies" / "demo"
_DIGITS: Final = 18  # of a whole number
_STORAGE: Final = ("--storage URL", "database (default: a file in the folder)")


def _argument(
    spelling: str,
    meaning: str,
    parse: Callable[[str], Any] = str,
    default: Any = MISSING,
    **more: Any,
) -> Any:
    """Return a dataclass field that an argument sets.

    ``spelling`` is ``--out RUN``, or ``RUN`` for a positional argument; without a ``default`` the
    argument is required; ``more`` goes to argparse's ``add_argument``.
    """
    *flags, metavar = spelling.split()
    if flags and default is MISSING:
        more["required"] = True
    added = {"flags": flags, "metavar": metavar, "help": meaning, "type": parse, **more}
    return field(default=default, metadata=added)


def _flag(spelling: str, meaning: str, *, default: bool = False) -> Any:
    """Return a dataclass field that is ``default`` unless a flag is given."""
    action = "store_false" if default else "store_true"
    added = {"flags": spelling.split(), "help": meaning, "action": action}
    return field(default=default, metadata=added)


def _gpus(text: str) -> float:
    try:
        gpus = float(text)
    except ValueError:
        gpus = -1.0
    if not (0 <= gpus <= 1 or gpus.is_integer()):
        raise ArgumentTypeError(f"{text!r} is not a number of GPUs like 1, 2 or 0.5")
    return gpus


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > _DIGITS or not int(text):
        raise ArgumentTypeError(f"{text[:40]!r} is not a whole number above 0")
    return int(text)


def _repository(text: str) -> str:
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", text):
        raise ArgumentTypeError(f"{text!r} is not a repository id like org/name")
    return text


def _text(text: str) -> str:
    if not text.strip():
        raise ArgumentTypeError("it is empty")
    return text


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > _DIGITS:
        raise ArgumentTypeError(f"{text[:40]!r} is not a whole number of up to {_DIGITS} digits")
    return int(text)


def _seconds(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a duration like 45s, 90m or 8h")
    return seconds


def _size(text: str) -> int:
    from merge_engine.models.free_memory import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command."""

    usage: ClassVar[str] = ""  # arguments in short, where it is not the required ones alone
    json: bool = _flag("--json", "print events as JSON, one per line")
    verbose: bool = _flag("-v --verbose", "do not silence libraries")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Options of every command that computes on a device, or plans for one."""

    device: str | None = _argument(
        "--device D", "device of the model (default: a GPU, else cpu)", default=None
    )


@dataclass(frozen=True, kw_only=True)
class SessionOptions(DeviceOptions):
    """Options of every command that evaluates recipes of a run, in this process or by workers."""

    storage: str | None = _argument(*_STORAGE, _text, default=None)
    memory: int | None = _argument("--memory SIZE", "memory limit, like 24GB", _size, default=None)
    compiled: bool = _flag("--no-compile", "do not compile merge kernels", default=True)
    offload: bool = _flag("--offload", "keep the model in host memory: slow, but it fits")
    workers: int | None = _argument(
        "--workers N", "number of processes, each with a model", _count, default=None
    )
    gpus_per_worker: float | None = _argument(
        "--gpus-per-worker N", "2: a model over two GPUs; 0.5: two models on one", _gpus, None
    )
    ray_address: str | None = _argument(
        "--ray-address URL", "their Ray cluster (default: this machine)", default=None
    )
    force_new: bool = False


@dataclass(frozen=True, kw_only=True)
class RunOptions(SessionOptions):
    """Run or resume a study."""

    study: Path = _argument("STUDY", "the study's YAML file", Path)
    out: Path = _argument("--out RUN", "run folder, new or to resume", Path)
    trials: int | None = _argument(
        "--trials N", "maximum number of trials (default: the study's)", _count, None
    )
    seed: int | None = _argument("--seed S", "seed (default: the study's)", _seed, None)
    timeout: float | None = _argument(
        "--timeout T", "time limit of the search, like 90m or 8h", _seconds, default=None
    )
    force_new: bool = _flag("--force-new", "set the folder's run aside and start over")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(RunOptions):
    """Train a small model family and run its study."""

    study: Path = DEMO / "study.yaml"
    out: Path = _argument("--out RUN", "run folder", Path, Path("runs/demo"))


@dataclass(frozen=True, kw_only=True)
class InitOptions(Options):
    """Write a first study; asks for what is missing."""

    usage: ClassVar[str] = "--base B --models M ... --tasks T ... [options]"
    base: str | None = _argument(
        "--base B", "the base of the fine-tunes: a folder or hub id", default=None
    )
    models: list[str] | None = _argument(
        "--models M", "models to merge; BASE+ADAPTER is a LoRA adapter", default=None, nargs="+"
    )
    tasks: list[str] | None = _argument(
        "--tasks T", "lm-eval task names, or .yaml or .jsonl files", default=None, nargs="+"
    )
    out: Path = _argument(
        "--out FILE", "study to write (default: study.yaml)", Path, default=Path("study.yaml")
    )
    trials: int | None = _argument("--trials N", "maximum number of trials", _count, None)
    trust_task_code: bool = _flag("--trust-task-code", "run Python code in .yaml tasks")


@dataclass(frozen=True, kw_only=True)
class BuildOptions(DeviceOptions):
    """Merge a recipe into a checkpoint."""

    recipe: Path = _argument("RECIPE", "a mergekit recipe, or several that use one another", Path)
    out: Path = _argument("OUT", "the folder to make", Path)
    intermediate_dir: Path | None = _argument(
        "--intermediate-dir DIR",
        "keep the results that other recipes of the file use, and use those that are there",
        Path,
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(DeviceOptions):
    """Score a model as a study scores its candidates."""

    model: str = _argument("MODEL", "a folder, a hub id, BASE+ADAPTER or a recipe's YAML file")
    study: Path = _argument("STUDY", "the study's YAML file", Path)
    split: Literal["search", "select", "test"] = _argument(
        "--split S",
        "search, select (the default) or test",
        default="select",
        choices=("search", "select", "test"),
    )
    offload: bool = _flag("--offload", "keep the model in host memory: slow, but it fits")


@dataclass(frozen=True, kw_only=True)
class CheckOptions(DeviceOptions):
    """Validate a study or a recipe and print its plan."""

    file: Path = _argument("FILE", "a study or a recipe", Path)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(SessionOptions):
    """Save the checkpoint of a run's winner, or of another trial."""

    run: Path = _argument("RUN", "run folder", Path)
    out: Path = _argument("OUT", "the folder to make", Path)
    trial: int | None = _argument("--trial N", "its number (default: the winner)", int, None)


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SessionOptions):
    """Show the models' responses to prompts or test items."""

    run: Path = _argument("RUN", "run folder", Path)
    prompt: list[str] | None = _argument(
        "--prompt TEXT",
        "prompt; may be repeated (default: test items the winner gained or lost)",
        _text,
        default=None,
        action="append",
    )
    max_tokens: int = _argument(
        "--max-tokens N", "maximum length of a response (default: 128)", _count, 128
    )
    items: int = _argument("--items N", "items gained, and as many lost (default: 6)", _count, 6)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Write a run's report, finished or not."""

    run: Path = _argument("RUN", "run folder", Path)
    out: Path | None = _argument(
        "--out FILE", "file to write (default: RUN/report.html)", Path, default=None
    )
    storage: str | None = _argument(*_STORAGE, _text, default=None)


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Upload a run's winner to the Hub."""

    run: Path = _argument("RUN", "run folder", Path)
    repo: str = _argument("ORG/NAME", "the repository, created if it does not exist", _repository)
    private: bool = _flag("--private", "create it as a private repository")
