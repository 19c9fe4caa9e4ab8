"""What libraries print: kept from the user, but for the warnings of our own modules."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

OWN: Final = ("merge_engine", "objectives", "search")
_THREADS: Final = {  # that do not spin while they wait
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_SILENT: Final = {
    "DATASETS_VERBOSITY": "critical",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "critical",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
}


class _Notes(logging.Handler):
    """Hands on each warning once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note, self._said = note, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            self._note(text)


@contextmanager
def quiet(note: Callable[[str], None], *, verbose: bool = False) -> Iterator[None]:
    """Keep libraries quiet, best before they are imported.

    Args:
        note: Is told what our own modules warn of.
        verbose: Let libraries speak.
    """
    for name, value in (_THREADS if verbose else _THREADS | _SILENT).items():
        os.environ.setdefault(name, value)
    handlers: list[tuple[str | None, logging.Handler]] = [(name, _Notes(note)) for name in OWN]
    if not verbose:
        handlers.append((None, logging.NullHandler()))  # else the root's prints on stderr
    for logger, handler in handlers:
        logging.getLogger(logger).addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger, handler in handlers:
            logging.getLogger(logger).removeHandler(handler)
