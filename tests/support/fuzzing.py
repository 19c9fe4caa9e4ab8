"""Fuzzing of the command line: random changes of valid input, each run in a fork with limits.

An input is handled correctly if the command exits with 0 and prints nothing on stderr; or exits
with 2, prints one sentence that names what was changed, and leaves no new file or folder. Anything
else is a finding.
"""

import contextlib
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import datasets
import psutil
import transformers

from fuzzing_borders import BORDERS
from fuzzing_example import make_example
from mistakes import tree
from search.cli import main

# Limits of an input; that on wall-clock time is for commands that wait, on a busy machine too.
SECONDS, CPU_SECONDS = 240, 30
MEMORY, DISK = 3 << 30, 1 << 28  # bytes, of memory beyond the parent's


class Finding(NamedTuple):
    """An input that was handled incorrectly."""

    border: str
    number: int  # of the input
    kind: str  # what is wrong, in a word or two
    command: list[str]
    said: str  # on stderr


class Fuzzer:
    """Runs inputs in a folder of its own; input ``n`` of a border and a seed is always the same.

    Args:
        folder: Working folder; stored runs contain its path.
        zoo: Folder with the models base, a and b.
        seed: Seed of all inputs.
    """

    def __init__(self, folder: Path, zoo: Path, seed: int = 0) -> None:
        self.seed = seed
        self.exits = Counter[int | None]()  # statuses of the inputs that have been run
        self.longest = 0.0  # in seconds
        self.whole, self.place = folder / "whole", folder / "place"
        self.said = folder / "said"
        self.place.mkdir()
        make_example(self.place, zoo)
        self.place.rename(self.whole)

    def change(self, border: str, number: int) -> tuple[list[str], bool]:
        """Create the folder of an input; return its command, and whether that must be refused."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.whole, self.place, symlinks=True)
        with contextlib.chdir(self.place):
            return BORDERS[border].make(Random(f"{border} {self.seed} {number}"))

    def run(self, border: str, number: int) -> Finding | None:
        """Run an input; return a finding, or None if it is handled correctly."""
        command, bad = self.change(border, number)
        before, start = tree(self.place).keys(), time.monotonic()
        status = _run_in_fork(lambda: _command(command, self.place, self.said))
        seconds = time.monotonic() - start
        self.exits[status] += 1
        self.longest = max(self.longest, seconds)
        said = self.said.read_text(encoding="utf-8", errors="replace")
        if status == 0 and "-v" in command:
            said = ""  # libraries may speak
        kind = _shortcoming(status, said, BORDERS[border].names, bad=bad)
        if kind is None and status and (left := tree(self.place).keys() - before):
            kind = f"leaves {min(path.name for path in left)}"
        return Finding(border, number, kind, command, said) if kind else None


def _shortcoming(status: int | None, said: str, names: tuple[str, ...], *, bad: bool) -> str | None:
    """Return what is wrong with an exit status (None: timed out) and stderr; None: nothing."""
    if status in (None, -signal.SIGXCPU):
        return "hangs"
    if status < 0:
        return f"ends by {signal.Signals(-status).name}"
    if "Traceback" in said:
        return "traceback"
    if status == 2:
        return _shortcoming_of_refusal(said, names)
    if status:
        return f"exit {status}"
    return "accepted" if bad else "prints on stderr" if said else None


def _shortcoming_of_refusal(said: str, names: tuple[str, ...]) -> str | None:
    if not said.startswith("mergesearch: ") or said.count("\n") != 1:
        return "no single line"
    return None if any(name in said for name in names) else "names nothing"


def _run_in_fork(work: Callable[[], int]) -> int | None:
    """Run work in a fork with limits; return its exit status (-N: signal N), None on timeout."""
    limit = psutil.Process().memory_info().vms + MEMORY
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))
            status = work()
        finally:
            os._exit(status)
    ends = time.monotonic() + SECONDS
    try:
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
    finally:
        _kill_group(child)  # with what it may have started
    os.waitpid(child, 0)
    return None


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _command(command: list[str], folder: Path, said: Path) -> int:
    """Run a command in this process, with its output redirected to files."""
    os.chdir(folder)
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # as the command does before imports
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    tempfile.tempdir = str(folder)  # a log of a fault is a file left
    for number, path in enumerate((os.devnull, os.devnull, said)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
    try:
        status = main(command)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status
