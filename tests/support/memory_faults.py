"""Let memory run out in one phase of a command.

While one call of a function runs, the address space is limited to a little more than what is in
use, so allocations in it really fail.
"""

import importlib
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from search.cli import main

PHASES: Final = {  # the function that is limited, and in which of its calls
    "load": ("search.preparing.context:load_model", 1),
    "lay": ("merge_engine.models.placement:Placement.packed", 1),
    "measure": ("merge_engine.models.measurements:Measurements.magnitudes", 1),
    "build": ("merge_engine.building.builder:Builder.build", 8),
    "score": ("objectives.harness.harness:Harness.score", 8),
    "differentiate": ("merge_engine.building.recipe_gradient:RecipeGradient.values_and_grad", 2),
    "export": ("search.running.workers:write_checkpoint", 1),
}
HOLES: Final = (1 << 24, 1 << 20, 1 << 16, 1 << 12)  # bytes


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    said: str
    failure: str  # what the limited call raised; empty if it had enough


def run_limited(words: Sequence[str], folder: Path, phase: str | None, kilobytes: int = 0) -> Ended:
    """Run a command in a child process, with little free memory in one of its phases."""
    said, failure = folder / "said", folder / "failure"
    failure.write_text("")
    if not (child := os.fork()):
        code = 70
        try:
            if phase:
                limit(phase, kilobytes, failure)
            with said.open("w") as file, redirect_stderr(file), redirect_stdout(file):
                code = main([*words])
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, said.read_text(), failure.read_text())


@contextmanager
def limited(more: int) -> Iterator[None]:
    """Limit this process to a few bytes more than it uses, and fill the holes of its heap."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken, most))
    held = []
    for size in HOLES:
        with suppress(MemoryError):
            while True:
                held.append(bytearray(size))
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit(phase: str, kilobytes: int, failure: Path) -> None:
    """Limit the memory of one call of a phase's function, and record what it raises."""
    path, chosen = PHASES[phase]
    module, _, names = path.partition(":")
    *owners, name = names.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), iter(range(1, sys.maxsize))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != chosen:
            return function(*args, **kwargs)
        try:
            with limited(kilobytes << 10):
                return function(*args, **kwargs)
        except BaseException as error:
            failure.write_text(repr(error))
            raise

    setattr(owner, name, call)
