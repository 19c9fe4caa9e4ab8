"""Run code that may hang or take all memory in a separate process, with limits.

A regular expression or a tokenizer can run forever in C code that no signal interrupts.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

_FORK = multiprocessing.get_context("fork")  # a task's functions cannot always be pickled


def start(work: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Start ``work(sender, *arguments)`` in a fork; return the process and the receiver."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=work, args=(sender, *arguments))
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads' locks, which stay locked; the child uses none
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    return process, receiver


def attempt(work: Callable[[], object], seconds: float, memory: int) -> str | None:
    """Try work in a fork; return why it fails, or None if it succeeds.

    Args:
        work: Its result and side effects are lost.
        seconds: Limit of its time.
        memory: Limit in bytes, beyond what this process has.
    """
    process, receiver = start(_try, work, seconds, memory)
    try:
        if not receiver.poll(seconds):
            return f"takes longer than {seconds:g} s"
        found: str | None = receiver.recv()
    except EOFError:
        return f"takes more than {memory >> 20} MiB of memory, or ends the process"
    else:
        return found
    finally:
        process.kill()
        process.join()
        receiver.close()


def _try(sender: Connection, work: Callable[[], object], seconds: float, memory: int) -> None:
    isolate(sender.fileno(), seconds, memory)
    try:
        work()
    except MemoryError:
        return  # there may be none left for a message
    except Exception as error:
        text = " ".join(str(error).split())
        sender.send(f"raises {type(error).__name__}: {text[:300]}")
    else:
        sender.send(None)


def isolate(pipe: int, seconds: float, memory: int) -> None:
    """Close every file but the pipe, the run's lock among them, and limit time and memory."""
    os.closerange(0, pipe)
    os.closerange(pipe + 1, 1 << 16)
    nowhere = Path(os.devnull).open("r+", encoding="utf-8")  # noqa: SIM115  # until the process ends
    for standard in (0, 1, 2):
        os.dup2(nowhere.fileno(), standard)
    sys.stdin = sys.stdout = sys.stderr = nowhere
    _limit(resource.RLIMIT_CPU, math.ceil(seconds) + 1)
    _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + memory)
    torch.set_num_threads(1)  # a fork has none of the other threads


def _limit(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (soft, hard))
