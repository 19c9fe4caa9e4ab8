"""Silence lm-eval's log and progress bars."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import datasets  # type: ignore[import-untyped]  # published without types

_WITH_PROGRESS_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")


@contextmanager
def quiet(level: int) -> Iterator[None]:
    """Set lm-eval's log to ``level`` and turn all progress bars off, until the block ends."""
    log = logging.getLogger("lm_eval")
    modules: list[Any] = [sys.modules[name] for name in _WITH_PROGRESS_BARS if name in sys.modules]
    with ExitStack() as restore:
        restore.callback(log.setLevel, log.level)
        log.setLevel(level)
        if not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        for module in modules:  # some of lm-eval's bars have no switch
            restore.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = functools.partial(module.tqdm, disable=True)
        yield
