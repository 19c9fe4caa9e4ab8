"""Who proposes the next point: one table.

A sampler is made anew for every trial from (seed, trial number) and sees only what the study
holds. Its proposals therefore depend on the finished trials alone, not on the process that asks:
a killed run goes on exactly as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from search.gaussian import GaussianSampler

if TYPE_CHECKING:
    from search.space import Space

RANDOM_STARTUP = 10  # random points after the warm starts, before a model of them is trusted


@dataclass(frozen=True)
class Turn:
    """Whose turn it is: one trial of a study.

    Args:
        space: The study's.
        seed: The study's.
        trial: Number of the trial to propose.
    """

    space: Space
    seed: int
    trial: int

    @property
    def own_seed(self) -> int:
        """A seed for this trial alone."""
        return (self.seed * 1_000_003 + self.trial) % 2**32

    @property
    def startup(self) -> int:
        """Trials before a model of them is trusted."""
        return len(self.space.warm_starts()) + RANDOM_STARTUP


class _Tpe(TPESampler):
    """Optuna's, told what is searched: a new one would look through all trials to find out."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(
            seed=turn.own_seed,
            n_startup_trials=turn.startup,
            multivariate=True,
            constant_liar=False,
        )
        self._known = turn.space.distributions()

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        return {name: it for name, it in sorted(self._known.items()) if not it.single()}


def _random(turn: Turn) -> BaseSampler:
    return RandomSampler(seed=turn.own_seed)


def _gp(turn: Turn) -> BaseSampler:
    return GaussianSampler(turn.space, turn.own_seed, turn.startup)


SAMPLERS: Final[Mapping[str, Callable[[Turn], BaseSampler]]] = MappingProxyType(
    {"auto": _Tpe, "gp": _gp, "tpe": _Tpe, "random": _random}
)


def make_sampler(name: str, space: Space, seed: int, trial: int) -> BaseSampler:
    """The sampler for one trial.

    Args:
        name: A key of SAMPLERS.
        space: What is searched.
        seed: The study's.
        trial: Number of the trial it is to propose.
    """
    if optuna.logging.get_verbosity() != optuna.logging.ERROR:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    return SAMPLERS[name](Turn(space, seed, trial))
