"""Find the processes of a run's Ray workers, for tests that kill them."""

import contextlib
import subprocess

import psutil


def ray_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """List the worker processes of a run."""
    named = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "ray::_Actor" in " ".join(child.cmdline()[:1]):
                named[child.pid] = (child, child.ppid())
    # what a worker starts has its name
    return [child for child, parent in named.values() if parent not in named]
