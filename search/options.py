"""Options of the commands, as the command line gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command.

    Attributes:
        device: Of the live model; None: the first GPU, else the CPU.
        json: Print events as JSON lines.
        verbose: Let libraries print.
    """

    device: str | None = None
    json: bool = False
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class SessionOptions(Options):
    """Options of every command that evaluates recipes of a run.

    Attributes:
        storage: URL of the database; None: a file in the run folder.
        force_new: Set the folder's study aside and begin another.
        memory: Limit in bytes; None: what is free.
        compiled: Merge kernels may be compiled, where that pays.
        workers: Number of worker processes; None: this process.
        gpus_per_worker: A share of one, or several; None: one if there are any.
        ray_address: The workers' cluster; None: this machine.
    """

    storage: str | None = None
    force_new: bool = False
    memory: int | None = None
    compiled: bool = True
    workers: int | None = None
    gpus_per_worker: float | None = None
    ray_address: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(SessionOptions):
    """Options of ``run`` and ``demo``; ``timeout`` in seconds, None for the study's own values."""

    study: Path
    out: Path
    trials: int | None = None
    seed: int | None = None
    timeout: float | None = None


@dataclass(frozen=True, kw_only=True)
class InitOptions(Options):
    """Options of ``init``; what is None is asked for where somebody can answer."""

    base: str | None
    models: list[str] | None
    tasks: list[str] | None
    out: Path
    trials: int | None


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Options):
    """Options of ``build``."""

    recipe: Path
    out: Path


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """Options of ``score``; ``model`` is a folder, a hub id or a recipe file."""

    model: str
    study: Path
    split: Literal["search", "select", "test"]


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """Options of ``check``; ``file`` is a study or a recipe."""

    file: Path


@dataclass(frozen=True, kw_only=True)
class ExportOptions(SessionOptions):
    """Options of ``export``; ``trial`` None exports the winner."""

    run: Path
    out: Path
    trial: int | None


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SessionOptions):
    """Options of ``sample``; ``prompt`` None shows ``items`` test items gained and lost."""

    run: Path
    prompt: list[str] | None
    max_tokens: int
    items: int


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Options of ``report``; ``out`` None writes report.html in the run folder."""

    run: Path
    storage: str | None
    out: Path | None


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Options of ``push``."""

    run: Path
    repo: str
    private: bool
