"""Who proposes the next point: one table.

A sampler is made anew for every trial from (seed, trial number) and sees only what the study
holds. Its proposals therefore depend on the finished trials alone, not on the process that asks:
a killed run goes on exactly as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler


def _tpe(seed: int, startup: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=False)


def _random(seed: int, startup: int) -> BaseSampler:  # noqa: ARG001  one signature for all
    return RandomSampler(seed=seed)


SAMPLERS: Final[Mapping[str, Callable[[int, int], BaseSampler]]] = MappingProxyType(
    {"auto": _tpe, "tpe": _tpe, "random": _random}
)


def make_sampler(name: str, seed: int, trial: int, startup: int) -> BaseSampler:
    """The sampler for one trial.

    Args:
        name: A key of SAMPLERS.
        seed: The study's.
        trial: Number of the trial it is to propose.
        startup: Trials before a model of them is trusted.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return SAMPLERS[name]((seed * 1_000_003 + trial) % 2**32, startup)
