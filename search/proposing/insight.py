"""Posterior summaries of a search: best trial, chances of methods, parameter sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from search.proposing.edges import widen_to
from search.proposing.encoding import Candidates, RecipeEncoding
from search.proposing.gp import Posterior, TrainingData, fit_kernel
from search.proposing.gp_sampler import observations, training_set
from search.proposing.space import Space
from search.racing.race import Floats
from search.storing.trials import TrialRecord

DRAWS: Final = 4000  # of all trials' values, for the probability that a method is best
SAMPLES: Final = 2000  # of the search space, for the sensitivity
HALF_WIDTH: Final = 1.96  # of a 95 % interval, in standard deviations


class TrialPosterior(NamedTuple):
    """A trial's posterior mean and the half width of its 95 % interval, in per cent."""

    trial: TrialRecord
    mean: float
    side: float


class MethodChance(NamedTuple):
    """A method's best feasible trial, if any, and the probability that it has the best trial."""

    method: str
    best: TrialPosterior | None
    chance: float


class PosteriorView:
    """The posterior given the complete trials, thinned like the sampler's training set."""

    def __init__(self, space: Space, complete: Sequence[TrialRecord]) -> None:
        self.trials = training_set(complete)
        self.space = widen_to(space, [trial.point for trial in self.trials])
        self.encoding = RecipeEncoding(self.space)
        self.tried = self.encoding.candidates([trial.point for trial in self.trials])
        self._observed = observations(self.trials, self.tried, self.encoding)
        self._kernel = fit_kernel(self._observed)
        self.posterior = self.after(len(self.trials))
        self.of_trials = self.posterior.of_trials()
        ranked = self.of_trials.ranked([trial.violation for trial in self.trials])
        self.best = self.of_trial(ranked[0])

    def after(self, count: int) -> Posterior:
        """Return the posterior after the first ``count`` trials."""
        return Posterior(TrainingData.from_observations(self._observed[:count]), self._kernel)

    def values(self, some: Candidates) -> tuple[Floats, Floats]:
        """Return n candidates' posterior means and standard deviations in per cent, (n,) each."""
        means, deviations = self.posterior.values(self.encoding.encode(some), some.method)
        return 100 * means, 100 * deviations

    def of_trial(self, index: int) -> TrialPosterior:
        """Return the posterior of one of the trials."""
        deviation = float(self.of_trials.covariance[index, index]) ** 0.5
        mean = float(self.of_trials.means[index])
        return TrialPosterior(self.trials[index], 100 * mean, 100 * HALF_WIDTH * deviation)


def method_chances(view: PosteriorView) -> list[MethodChance]:
    """Estimate each method's probability of having the best trial, the likeliest first.

    By draws from the joint posterior of the trials that violate the constraints least.
    """
    violations = np.array([trial.violation for trial in view.trials])
    feasible = np.flatnonzero(violations == violations.min())
    posterior = view.of_trials[feasible.tolist()]
    draws = np.random.default_rng(0).multivariate_normal(
        posterior.means, posterior.covariance, DRAWS, check_valid="ignore", method="eigh"
    )
    method = view.tried.method[feasible]
    best = method[draws.argmax(axis=1)]
    found = []
    for number, name in enumerate(view.space.methods):
        own = feasible[method == number]
        index = own[np.argmax(view.of_trials.means[own])] if len(own) else None
        of_method = None if index is None else view.of_trial(int(index))
        found.append(MethodChance(name, of_method, float(np.mean(best == number))))
    return sorted(found, key=lambda one: -one.chance)


def sensitivity(view: PosteriorView) -> list[tuple[str, float]]:
    """Estimate total effects of method, scale, mixture, tuned weights and parameters on the mean.

    ``E[(f(a) - f(a'))^2] / (2 Var f)``, where a' is a with one parameter drawn anew: Jansen 1999,
    https://doi.org/10.1016/S0010-4655(98)00154-4.
    """
    generator = np.random.default_rng(0)
    a, b = (view.encoding.random(SAMPLES, generator) for _ in range(2))
    scales = [np.maximum(some.weights.mean(axis=2, keepdims=True), 1e-9) for some in (a, b)]
    redrawn = {
        "method": replace(a, method=b.method),
        "scale": replace(a, weights=a.weights / scales[0] * scales[1]),
        "mixture": replace(a, weights=b.weights / scales[1] * scales[0]),
        "tuned weights": replace(a, tuned=b.tuned),
    }
    for column, name in enumerate(view.encoding.searched):
        values = a.values.copy()
        values[:, column] = b.values[:, column]
        redrawn[name] = replace(a, values=values)
    before, _ = view.values(a)
    variance = before.var() or 1.0
    effects = [
        (name, float(np.mean((view.values(some)[0] - before) ** 2) / (2 * variance)))
        for name, some in redrawn.items()
    ]
    return sorted((one for one in effects if one[1] > 0), key=lambda one: -one[1])
