"""Global random states of a task's own code."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class TaskRandomState:
    """States of the global random generators for one task's code, kept between its calls.

    Task files draw from these generators, numpy's legacy one too. Their first state is that of
    ``simple_evaluate``'s default seeds.
    """

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run a task's code with its own random states, and restore everyone else's."""
        others = _get_states()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if self._states is None:
                random.seed(0)
                np.random.seed(1234)  # noqa: NPY002
                torch.manual_seed(1234)
            else:
                _set_states(self._states)
            try:
                yield
            finally:
                self._states = _get_states()
                _set_states(others)


def _get_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _set_states(states: tuple[Any, ...]) -> None:
    of_python, of_numpy, of_torch = states
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002
    torch.set_rng_state(of_torch)
