"""Samplers: which point a study evaluates next.

A sampler is created for every trial from (seed, trial number) and sees only what is in the study's
database. Its proposals therefore depend on the finished trials alone and not on the process: a
killed run continues exactly as it would have.

``search.study.sampler_table`` names a source for each: a function that takes a ``ProposalRequest``
and returns a ``Proposal``, or an Optuna sampler that makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from typing_extensions import override

from search.proposing.edges import widest
from search.proposing.proposal import Proposal, ProposalRequest
from search.proposing.soup import SOUP_PREFIX, next_step
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.storing.trials import OpenTrial, TrialLog, TrialRecord
from search.study.sampler_table import SAMPLERS
from search.study.spec import StudyError

POPULATION = 20  # of the genetic sampler

Source = Callable[[ProposalRequest], Proposal | BaseSampler]


class Proposer:
    """Opens one trial after another, with points from the study's sampler.

    Args:
        name: A key of ``SAMPLERS``, or ``package.module:Class``, a sampler of Optuna's interface.
        front: Whether every task is an objective of its own (``search.front``).
        ranking: Indices of the donors, the best first, for a greedy soup; empty: there is none.

    Raises:
        StudyError: There is no such class.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        seed: int,
        *,
        front: bool = False,
        ranking: Sequence[int] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.seed, self.front, self.ranking = space, seed, front, ranking
        self._source, self._starts = load_sampler(name), len(warm_starts(space))

    def ask(
        self, log: TrialLog, open_now: Collection[int] = (), space: Space | None = None
    ) -> OpenTrial:
        """Open a trial that an earlier session left running, else a waiting one, else a new one.

        ``space`` includes the weights tuned so far; None: the study's space without any.
        """
        space = space or self.space
        trials = log.records()
        left, queued = _queued(trials, open_now)
        if queued is None and (step := next_step(space, self.ranking, trials)):
            log.enqueue(step[1], start=step[0])
            trials = log.records()
            left, queued = _queued(trials, open_now)
        number = queued.number if queued else len(trials)
        others = [one for one in trials if one.number != number]
        starts = self._starts + sum((trial.start or "").startswith(SOUP_PREFIX) for trial in others)
        made = self._source(ProposalRequest(space, self.seed, number, starts, others, self.front))
        if isinstance(made, BaseSampler):
            return log.open(space.distributions, left=left, sampler=made)
        if queued is None:
            log.enqueue(made.point, expected_improvement=made.expected_improvement)
        return log.open(widest(space).distributions, left=left)


def _queued(
    trials: Sequence[TrialRecord], open_now: Collection[int]
) -> tuple[TrialRecord | None, TrialRecord | None]:
    """Return the trial that an earlier session left running, and the one to open next, if any."""
    left = next((t for t in trials if t.state == "running" and t.number not in open_now), None)
    return left, left or next((t for t in trials if t.state == "waiting"), None)


def load_sampler(name: str) -> Source:
    """Return the source of a study's samplers.

    Raises:
        StudyError: There is no such class, or it is no sampler of Optuna's interface.
    """
    if name in SAMPLERS:
        module, _, attribute = SAMPLERS[name].source.partition(":")
        source: Source = getattr(import_module(module), attribute)
        return source
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise StudyError(
            f"search.sampler: {name}: {type(error).__name__}: {error}; install it, or put its "
            "folder on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise StudyError(f"search.sampler: {name} is not a subclass of optuna.samplers.BaseSampler")
    made: Callable[..., BaseSampler] = found
    return lambda request: made(seed=request.trial_seed)


def random(request: ProposalRequest) -> BaseSampler:
    """Return Optuna's sampler of uniform points."""
    return RandomSampler(request.trial_seed)


def grid(request: ProposalRequest) -> Proposal:
    """Propose points of the uniform mixture along the scale, for each method alternately.

    Both ends first, then the middle of the widest gap: ``2^n + 1`` scales are evenly spaced.
    """
    space = request.space
    row, column = divmod(request.after_starts, len(space.methods))
    low, high = space.scale
    scale = low + (high - low) * (row if row < 2 else van_der_corput(row - 1))
    return Proposal(space.point(space.methods[column], (scale,) * len(space.donors)))


def van_der_corput(number: int) -> float:
    """Return the number's binary digits behind the point, reversed: 1/2, 1/4, 3/4, 1/8, ..."""
    return float(int(f"{number:b}"[::-1], 2) / 2 ** number.bit_length())


class _FixedSpace(BaseSampler):
    """A sampler that is given its space; Optuna's own would read all trials to infer it."""

    fixed_space: Mapping[str, BaseDistribution]

    @override
    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self.fixed_space)


class Tpe(_FixedSpace, TPESampler):
    """Optuna's multivariate TPE."""

    def __init__(self, request: ProposalRequest) -> None:
        super().__init__(
            seed=request.trial_seed,
            n_startup_trials=request.startup,
            multivariate=True,
            constant_liar=False,
        )
        known = request.space.distributions
        self.fixed_space = {name: of for name, of in sorted(known.items()) if not of.single()}


class CmaEs(_FixedSpace, CmaEsSampler):
    """Optuna's CMA-ES for the numbers; TPE chooses the method.

    It starts in the middle of the space: only TPE learns from the warm starts.
    """

    def __init__(self, request: ProposalRequest) -> None:
        seed = request.trial_seed
        super().__init__(
            seed=seed,
            independent_sampler=TPESampler(seed=seed, n_startup_trials=request.startup),
            warn_independent_sampling=False,
        )
        known = request.space.distributions
        self.fixed_space = {n: of for n, of in known.items() if isinstance(of, FloatDistribution)}


def nsga2(request: ProposalRequest) -> BaseSampler:
    """Return Optuna's NSGA-II, which prefers feasible trials."""
    return NSGAIISampler(seed=request.trial_seed, population_size=POPULATION)
