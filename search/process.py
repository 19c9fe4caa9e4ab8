"""Settings of the whole process: environment variables, signals, warnings, library output."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Final

OWN: Final = ("merge_engine", "objectives", "search")
# Read by libraries when they are imported; what the user has set stays.
THREADS: Final = {  # that do not spin while they wait
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
SILENT: Final = {
    "DATASETS_VERBOSITY": "critical",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "critical",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
}


def open_streams() -> None:
    """Open closed standard streams, and let all write what their encoding lacks as escapes.

    Closed ones are opened on os.devnull, else the next file opened would take their number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null := os.open(os.devnull, os.O_RDWR), number)
            if null != number:
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        if isinstance(stream := getattr(sys, name), TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector while millions of long-lived objects are created.

    Repeated collections would make imports and loading a quarter slower.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send, like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Notes(logging.Handler):
    """Forwards each distinct warning once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note, self._noted = note, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)


@contextmanager
def quiet_libraries(note: Callable[[str], None], *, verbose: bool = False) -> Iterator[None]:
    """Silence libraries, best before they are imported; all settings are restored afterwards.

    Args:
        note: Receives the warnings of our own packages.
        verbose: Let libraries print.
    """
    with _environment(THREADS if verbose else THREADS | SILENT), warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
            if "transformers" in sys.modules:  # imported before the environment was set
                from transformers.utils import logging as transformers_logging

                transformers_logging.disable_progress_bar()
        with _handlers(note, verbose=verbose):
            yield


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _handlers(note: Callable[[str], None], *, verbose: bool) -> Iterator[None]:
    handlers: list[tuple[str | None, logging.Handler]] = [(name, _Notes(note)) for name in OWN]
    if not verbose:
        handlers.append((None, logging.NullHandler()))  # else the root's prints on stderr
    for logger, handler in handlers:
        logging.getLogger(logger).addHandler(handler)
    try:
        yield
    finally:
        for logger, handler in handlers:
            logging.getLogger(logger).removeHandler(handler)
