"""Who proposes the next point: one table.

A sampler is made anew for every trial from (seed, trial number) and sees only what the study
holds. Its proposals therefore depend on the finished trials alone, not on the process that asks:
a killed run goes on exactly as it would have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.proposing.gp import GaussianSampler
from search.proposing.starts import warm_starts
from search.storing.trials import TrialRecord

if TYPE_CHECKING:
    from search.proposing.space import Space

RANDOM_STARTUP = 5  # random points after the warm starts, before a model of them is trusted
POPULATION = 20  # of the genetic samplers


@dataclass(frozen=True)
class Turn:
    """Whose turn it is: one trial of a study.

    Args:
        space: The study's.
        seed: The study's.
        trial: Number of the trial to propose.
        front: Whether every task is a goal of its own.
    """

    space: Space
    seed: int
    trial: int
    front: bool = False

    @property
    def own_seed(self) -> int:
        """A seed for this trial alone."""
        return (self.seed * 1_000_003 + self.trial) % 2**32

    @property
    def startup(self) -> int:
        """Trials before a model of them is trusted."""
        return self.starts + RANDOM_STARTUP

    @property
    def after_starts(self) -> int:
        """How many trials there were after the warm starts."""
        return max(0, self.trial - self.starts)

    @cached_property
    def starts(self) -> int:
        """How many warm starts there are."""
        return len(warm_starts(self.space))


class _Told(BaseSampler):
    """Is told what is searched: a new one of Optuna's would look through all trials to find out."""

    _known: Mapping[str, BaseDistribution]

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        return {**self._known}


class _Whole(_Told):
    """Proposes all of a point at once."""

    def sample_independent(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        raise AssertionError(f"{param_name} is not of this study's space")


class _Tpe(_Told, TPESampler):
    """Optuna's."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(
            seed=turn.own_seed,
            n_startup_trials=turn.startup,
            multivariate=True,
            constant_liar=False,
        )
        known = turn.space.distributions
        self._known = {name: of for name, of in sorted(known.items()) if not of.single()}


class _CmaEs(_Told, CmaEsSampler):
    """Optuna's, of the numbers alone; the method is drawn by TPE, from those that score well.

    It begins in the middle of the space: the warm starts teach TPE alone.
    """

    def __init__(self, turn: Turn) -> None:
        super().__init__(
            seed=turn.own_seed,
            independent_sampler=TPESampler(seed=turn.own_seed, n_startup_trials=turn.startup),
            warn_independent_sampling=False,
        )
        self._known = _numbers(turn.space)


class _CatCma(_Whole):
    """CatCMA with margin: one distribution of numbers and method, learned generation by generation.

    It is made anew from the complete trials it proposed, in their order; a generation that is not
    whole waits. Hamano et al. 2025, https://arxiv.org/abs/2504.07884.
    """

    DRAWN = "catcma"  # a trial's attribute: its numbers as they were drawn, some beyond their range

    def __init__(self, turn: Turn) -> None:
        self._known, self._methods = turn.space.distributions, turn.space.methods
        self._numbers, self._seed = _numbers(turn.space), turn.own_seed

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        from cmaes import CatCMAwM  # an extra

        methods = self._methods
        strategy = CatCMAwM(
            x_space=[[of.low, of.high] for of in self._numbers.values()] or None,
            c_space=[len(methods)] if len(methods) > 1 else None,
            seed=self._seed,
        )
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        proposed = [known for known in complete if self.DRAWN in known.system_attrs]
        size = strategy.population_size
        for end in range(size, len(proposed) + 1, size):
            generation = proposed[end - size : end]
            ranked = sorted(generation, key=lambda one: TrialRecord.from_optuna(one).sort_key)
            # It learns from ranks alone; equal values would leave it without a spread.
            strategy.tell([(self._solution(known), rank) for rank, known in enumerate(ranked)])
        drawn = strategy.ask()
        raw = [] if drawn.x is None else drawn._v_raw.tolist()
        study._storage.set_trial_system_attr(trial._trial_id, self.DRAWN, raw)
        method = methods[0 if drawn.c is None else int(drawn.c.argmax())]
        numbers = [] if drawn.x is None else drawn.x.tolist()
        return {"method": method, **dict(zip(self._numbers, numbers, strict=True))}

    def _solution(self, trial: FrozenTrial) -> Any:
        """What was drawn for a trial, as the strategy wants it told."""
        from cmaes import CatCMAwM

        raw = np.array(trial.system_attrs[self.DRAWN])
        chosen = [[method == trial.params["method"] for method in self._methods]]
        return CatCMAwM.Solution(x=raw, c=np.array(chosen), _v_raw=raw)


def _numbers(space: Space) -> dict[str, FloatDistribution]:
    """What is searched besides the method."""
    known = space.distributions
    return {name: of for name, of in known.items() if isinstance(of, FloatDistribution)}


class _Given(_Whole):
    """Proposes one point."""

    def __init__(self, turn: Turn, point: dict[str, Any]) -> None:
        self._known, self._point = turn.space.distributions, point

    def sample_relative(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        return self._point


def _random(turn: Turn) -> BaseSampler:
    return RandomSampler(seed=turn.own_seed)


def _sobol(turn: Turn) -> BaseSampler:
    """Spread evenly: one scrambled Sobol' sequence for all trials."""
    from scipy.stats.qmc import Sobol  # slow to import

    known = turn.space.distributions
    sequence = Sobol(len(known), rng=turn.seed)
    if turn.after_starts:  # forward by none is an error
        sequence.fast_forward(turn.after_starts)
    shares = dict(zip(known, sequence.random()[0].tolist(), strict=True))
    return _Given(turn, {name: _part(of, shares[name]) for name, of in known.items()})


def _part(distribution: BaseDistribution, share: float) -> Any:
    """What stands at a share of a distribution, in [0, 1)."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution)
    return distribution.low + share * (distribution.high - distribution.low)


def _grid(turn: Turn) -> BaseSampler:
    """The curve over the scale, of the uniform mixture, for each method in turn.

    Both ends first, then the middle of what is widest: after ``2^n + 1`` scales they are even.
    """
    space = turn.space
    row, column = divmod(turn.after_starts, len(space.methods))
    low, high = space.scale
    scale = low + (high - low) * (row if row < 2 else van_der_corput(row - 1))
    return _Given(turn, space.point(space.methods[column], (scale,) * len(space.donors)))


def van_der_corput(number: int) -> float:
    """The number's binary digits behind the point, in reverse: 1/2, 1/4, 3/4, 1/8, 5/8, ..."""
    return float(int(f"{number:b}"[::-1], 2) / 2 ** number.bit_length())


def _gp(turn: Turn) -> BaseSampler:
    return GaussianSampler(turn.space, turn.own_seed, turn.startup, front=turn.front)


def _nsga2(turn: Turn) -> BaseSampler:
    return NSGAIISampler(seed=turn.own_seed, population_size=POPULATION)


def _nsga3(turn: Turn) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # since 2023
        return NSGAIIISampler(seed=turn.own_seed, population_size=POPULATION)


_MAKERS: Final[Mapping[str, Callable[[Turn], BaseSampler]]] = MappingProxyType(
    {
        "auto": _gp,
        "gp": _gp,
        "tpe": _Tpe,
        "cmaes": _CmaEs,
        "catcma": _CatCma,
        "nsga2": _nsga2,
        "nsga3": _nsga3,
        "sobol": _sobol,
        "random": _random,
        "grid": _grid,
    }
)


def make_sampler(
    name: str, space: Space, seed: int, trial: int, *, front: bool = False
) -> BaseSampler:
    """The sampler for one trial.

    Args:
        name: One of the study's SAMPLERS.
        space: What is searched.
        seed: The study's.
        trial: Number of the trial it is to propose.
        front: Whether every task is a goal of its own; for its FRONT_SAMPLERS.
    """
    if optuna.logging.get_verbosity() != optuna.logging.ERROR:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    return _MAKERS[name](Turn(space, seed, trial, front))
