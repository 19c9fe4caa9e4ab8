"""A Gaussian process over recipes: the sampler ``gp``.

Values are modelled where recipes are (``search.proposing.encoding``), so equal recipes are one and
methods share what they have in common. Every trial has the noise of its own items: its attribute
``variance``, times one factor that is fitted, since all trials answer the same items and much of
their error is common to them.

    k(a, b) = s^2 Matern_5/2(|a - b| / lengths) (1 if the methods are equal, else KINSHIP)

Kinship is not fitted: recipes that break a model are alike in every method, so that it would come
out near 1, and where one method is best the others would never be looked for.

Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", eqs. 4.17, 5.9 and 2.25.
The next trial is where improvement upon the best posterior mean is expected (Jones et al. 1998,
https://doi.org/10.1023/A:1008306431147), times the chance that floors are met (Gardner et al. 2014,
https://proceedings.mlr.press/v32/gardner14.html).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dtrtri
from scipy.optimize import Bounds, minimize
from scipy.spatial.distance import cdist
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from search.proposing.encoding import Bits, Candidates, Ints, RecipeEncoding
from search.proposing.space import Point, Space
from search.racing.elimination import JointPosterior
from search.racing.race import Estimate, Floats
from search.storing.trials import TrialLog, TrialRecord

GAIN = "gain"  # a trial's attribute: what it was expected to improve upon the best
JITTER = 1e-6
KINSHIP = 0.4
MODELLED, STEP = 400, 50  # trials the process is made of, and how many more it takes at a time
AUGMENTATION = 0.05  # how much all goals count besides the one that is most behind

# The search for the highest acquisition: random candidates, good ones to step from, steps from
# each, and their widths.
RANDOM, GOOD, STEPS, WIDTHS = 300, 10, 10, (0.3, 0.1, 0.03)


class Observed(NamedTuple):
    """A finished trial: where its recipe is, what it scored and how sure that is."""

    method: int
    place: tuple[float, ...]
    value: float
    variance: float
    shortfall: float = 0.0


@dataclass(frozen=True)
class Kernel:
    """The process's hyper-parameters, all but ``lengths`` (d) in units of the values' spread.

    Args:
        signal: s^2.
        noise: Factor on the trials' variances.
        lengths: One per coordinate.
    """

    signal: float
    noise: float
    lengths: Floats

    @classmethod
    def of(cls, theta: Floats) -> Kernel:
        """From their logarithms."""
        signal, noise, *lengths = np.exp(theta)
        return cls(float(signal), float(noise), np.array(lengths))

    def __call__(self, a: Floats, of_a: Ints, b: Floats, of_b: Ints) -> Floats:
        """Covariances (n, m) of places (n, d) and (m, d) with their methods (n) and (m)."""
        distance = self.distance(a, b)
        matern = (1 + distance * (1 + distance / 3)) * np.exp(-distance)
        covariance: Floats = self.signal * matern * kinship(of_a, of_b)
        return covariance

    def distance(self, a: Floats, b: Floats) -> Floats:
        """sqrt(5) times the distance in lengths, (n, m)."""
        to_lengths = 5**0.5 / self.lengths
        distances: Floats = cdist(a * to_lengths, b * to_lengths)
        return distances


def kinship(of_a: Ints, of_b: Ints) -> Floats:
    """What the methods (n) and (m) leave of a covariance, (n, m)."""
    return np.where(of_a[:, None] == of_b, 1.0, KINSHIP)


# Means and widths of the normal priors on the logarithms of signal, noise and lengths.
PRIORS = ((0.0, 1.0), (-1.0, 1.0), (0.0, 0.7))


def _prior(count: int) -> tuple[Floats, Floats]:
    *shared, lengths = PRIORS
    mean, width = np.array([*shared, *[lengths] * count]).T
    return mean, width


def loss(
    theta: Floats, x: Floats, method: Ints, y: Floats, variance: Floats
) -> tuple[float, Floats]:
    """Minus the log posterior of hyper-parameters, and its gradient (eq. 5.9).

    Args:
        theta: As in ``Kernel.of``, (2 + d).
        x: Places, (n, d).
        method: (n).
        y: Values, standardised, (n).
        variance: Of the values, (n).
    """
    kernel = Kernel.of(theta)
    distance = kernel.distance(x, x)
    decay = np.exp(-distance)
    signal = kernel.signal * (1 + distance * (1 + distance / 3)) * decay
    kin = kinship(method, method)
    noise = kernel.noise * variance
    factor = cho_factor(signal * kin + np.diag(noise + JITTER), lower=True)
    alpha = cho_solve(factor, y)
    slope = cho_solve(factor, np.eye(len(y))) - np.outer(alpha, alpha)  # of the loss, in 2 K
    of_square = slope * kin * kernel.signal * (1 + distance) * decay * (5 / 3)
    scaled = x / kernel.lengths
    of_lengths = of_square.sum(axis=1) @ scaled**2 - ((of_square @ scaled) * scaled).sum(axis=0)
    gradient = np.array(
        [
            0.5 * (slope * signal * kin).sum(),
            0.5 * (np.diag(slope) * noise).sum(),
            *of_lengths,
        ]
    )
    value = 0.5 * y @ alpha + np.log(np.diag(factor[0])).sum()
    mean, width = _prior(x.shape[1])
    away = (theta - mean) / width
    return float(value + 0.5 * away @ away), gradient + away / width


@dataclass(frozen=True)
class Data:
    """What was observed, as arrays.

    Args:
        x: Places, (n, d).
        method: (n).
        targets: Values and margins to the floors, standardised, (n, 2).
        variance: Of the values, (n).
        enough: The margin that meets all floors.
        centre: What 0 is in units of the values.
        spread: What 1 is.
    """

    x: Floats
    method: Ints
    targets: Floats
    variance: Floats
    enough: float
    centre: float
    spread: float

    @classmethod
    def of(cls, observed: Sequence[Observed]) -> Data:
        """The trials' data."""
        targets = np.array([(one.value, -one.shortfall) for one in observed])
        mean, spread = targets.mean(axis=0), targets.std(axis=0)
        spread[spread == 0] = 1.0
        return cls(
            np.array([one.place for one in observed]),
            np.array([one.method for one in observed], dtype=np.int64),
            (targets - mean) / spread,
            np.array([one.variance for one in observed]) / spread[0] ** 2,
            float(-mean[1] / spread[1]),
            float(mean[0]),
            float(spread[0]),
        )

    @property
    def allowed(self) -> Bits:
        """Which trials meet the floors, (n)."""
        return self.targets[:, 1] >= self.enough


@lru_cache(maxsize=8)
def fitted(observed: tuple[Observed, ...]) -> Kernel:
    """The most probable hyper-parameters."""
    data = Data.of(observed)
    start, width = _prior(data.x.shape[1])
    known = (data.x, data.method, data.targets[:, 0], data.variance)
    found = minimize(
        loss,
        start,
        known,
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(start - 5 * width, start + 5 * width),  # a line search may leap far out
        options={"maxiter": 50},
    )
    return Kernel.of(found.x)


class Posterior:
    """The process given its trials (eqs. 2.25 and 2.26)."""

    def __init__(self, data: Data, kernel: Kernel) -> None:
        self.data, self.kernel = data, kernel
        covariance = kernel(data.x, data.method, data.x, data.method)
        noise = np.diag(kernel.noise * data.variance + JITTER)
        # Its inverse, because a product with many candidates is faster than solving for them.
        self._whitening, _ = dtrtri(np.linalg.cholesky(covariance + noise), lower=1)
        self._alpha = self._whitening.T @ (self._whitening @ data.targets)
        self._at_trials = covariance @ self._alpha

    def means(self, x: Floats, method: Ints) -> Floats:
        """Targets without noise (m, 2) to expect at places (m, d)."""
        means: Floats = self.kernel(x, method, self.data.x, self.data.method) @ self._alpha
        return means

    def values(self, x: Floats, method: Ints) -> tuple[Floats, Floats]:
        """Values without noise to expect at places (m, d), and their deviations: (m) each."""
        across = self.kernel(x, method, self.data.x, self.data.method)
        means = self.data.centre + self.data.spread * (across @ self._alpha[:, 0])
        return means, self.data.spread * self._deviations(across)

    def _deviations(self, across: Floats) -> Floats:
        """Of a target at places whose covariances with the trials are these (m, n): (m)."""
        white = across @ self._whitening.T
        known = np.einsum("mn,mn->m", white, white)
        deviations: Floats = np.sqrt(np.maximum(self.kernel.signal - known, 1e-12))
        return deviations

    def belief(self) -> JointPosterior:
        """Of the trials' own values, noise taken away."""
        data, kernel = self.data, self.kernel
        prior = kernel(data.x, data.method, data.x, data.method)
        noise = np.diag(kernel.noise * data.variance + JITTER)
        gain = np.linalg.solve(prior + noise, prior).T
        return JointPosterior(
            data.centre + data.spread * gain @ data.targets[:, 0],
            data.spread**2 * (prior - gain @ prior),
        )

    def joined(self, x: Floats, method: Ints) -> Posterior:
        """As if trials at these places had given what is expected of them."""
        data = self.data
        return Posterior(
            replace(
                data,
                x=np.vstack([data.x, x]),
                method=np.concatenate([data.method, method]),
                targets=np.vstack([data.targets, self.means(x, method)]),
                variance=np.concatenate([data.variance, np.full(len(x), data.variance.mean())]),
            ),
            self.kernel,
        )

    @cached_property
    def at_trials(self) -> Floats:
        """Means at the trials' own places, (n); of those that miss a floor, minus infinity."""
        return np.where(self.data.allowed, self._at_trials[:, 0], -np.inf)

    def acquisition(self, x: Floats, method: Ints) -> Floats:
        """The expected improvement of a trial at each place (m, d), if it meets the floors.

        Minus one where there was a trial already.
        """
        across = self.kernel(x, method, self.data.x, self.data.method)
        deviation = self._deviations(across)
        means = across @ self._alpha
        allowed = self.data.allowed
        gain = np.ones(len(x))
        if allowed.any():
            gain = expected_improvement(means[:, 0], deviation, self.at_trials.max())
        if not allowed.all():
            gain *= ndtr((means[:, 1] - self.data.enough) / deviation)
        return np.where(across.max(axis=1) < self.kernel.signal * (1 - 1e-6), gain, -1.0)


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """``E[max(f - best, 0)]`` of normal f with these means and deviations."""
    z = (mean - best) / deviation
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    expected: Floats = deviation * (z * ndtr(z) + density)
    return expected


def modelled(trials: Sequence[TrialRecord]) -> Sequence[TrialRecord]:
    """All complete trials while they are few; else the best, the latest and who came since.

    The process costs the cube of their number. Who is best and latest changes once in STEP trials,
    so that hyper-parameters need not be fitted for every proposal.
    """
    if len(trials) <= MODELLED:
        return trials
    settled = len(trials) - (len(trials) - MODELLED) % STEP
    latest = settled - MODELLED // 2
    best = sorted(range(latest), key=lambda place: trials[place].sort_key)[: MODELLED // 2]
    return [*(trials[place] for place in sorted(best)), *trials[latest:]]


def rung(count: int, first: int) -> int:
    """The last number of trials up to ``count`` at which hyper-parameters are fitted."""
    step = first
    while (higher := step + max(1, step // 8)) <= count:
        step = higher
    return step


@cache
def _libraries() -> ThreadpoolController:
    """Those with threads of their own; to find them takes longer than a proposal's sums."""
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """For small matrices: threads would wait for one another."""
    limited: AbstractContextManager[Any] = _libraries().limit(limits=1, user_api="blas")
    return limited


class GaussianSampler(BaseSampler):
    """Proposes the recipe of the highest expected improvement.

    Parts of the model share weights at first, and get their own stage after stage.

    Args:
        space: What is searched.
        seed: Of this proposal.
        startup: Trials before; random points until then.
        front: Whether each proposal has a goal of its own, between the tasks.
    """

    def __init__(self, space: Space, seed: int, startup: int, *, front: bool = False) -> None:
        self.space, self.seed, self.startup, self.front = space, seed, startup, front
        self._random = RandomSampler(seed=seed)

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """All of it."""
        return dict(self.space.distributions)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Before the model is trusted."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """The next point."""
        trials = TrialLog(study).records()  # at once: a database takes its time
        complete = [known for known in trials if known.state == "complete"]
        self.places = RecipeEncoding(
            self.space, self.space.shared_units(len(complete) - self.startup)
        )
        if len(complete) < self.startup:
            return self._shared() if self.places.groups else {}
        running = [known for known in trials if known.state == "running"]
        others = [other for other in running if other.number != trial.number]
        with one_thread():
            point, gain = self._proposal(complete, others)
        if not self.front and not self.places.groups:  # units of their own may gain more
            study._storage.set_trial_system_attr(trial._trial_id, GAIN, gain)
        return point

    def _shared(self) -> dict[str, Any]:
        """A random point whose units share their weights."""
        return self.places.point(self.places.random(1, np.random.default_rng(self.seed)))

    def _proposal(
        self, complete: Sequence[TrialRecord], running: Sequence[TrialRecord]
    ) -> tuple[dict[str, Any], float]:
        """The point to score after trials that are complete, and beside trials that run.

        Returns:
            The point, and its acquisition in units of the values.
        """
        complete = modelled(complete)
        tried = self.places.population([known.point for known in complete])
        x = self.places.of(tried)
        observed = tuple(map(observation, complete, tried.method.tolist(), x.tolist()))
        kernel = fitted(observed[: rung(len(observed), self.startup)])
        if self.front:
            goal = scalarised([trial.tasks for trial in complete], self.seed)
            observed = tuple(
                one._replace(value=value, variance=variance)
                for one, (value, variance) in zip(observed, goal, strict=True)
            )
        known = Posterior(Data.of(observed), kernel)
        if running:
            others = self.places.population([other.point for other in running])
            known = known.joined(self.places.of(others), others.method)
            tried += others
        best, worth = self._best(known, tried)
        return self.places.point(best), worth * known.data.spread

    def _best(self, known: Posterior, tried: Candidates) -> tuple[Candidates, float]:
        """The highest acquisition among random candidates and steps, ever smaller, from the best.

        Args:
            known: Of the trials tried.
            tried: n candidates.

        Returns:
            One candidate, and its acquisition.
        """
        places, generator = self.places, np.random.default_rng(self.seed)

        def steps(start: Candidates, width: float) -> Candidates:
            return places.near(start[np.tile(np.arange(len(start)), STEPS)], width, generator)

        good = tried[np.argsort(-known.at_trials, kind="stable")[:GOOD]]
        found = places.random(RANDOM, generator)
        for width in WIDTHS:
            found += steps(good, width)
        for width in WIDTHS:
            worth = known.acquisition(places.of(found), found.method)
            found = found[np.argsort(-worth, kind="stable")[:GOOD]]
            found += steps(found, width)
        worth = known.acquisition(places.of(found), found.method)
        best = int(np.argmax(worth))
        return found[[best]], float(worth[best])


def observation(trial: TrialRecord, method: int, place: Sequence[float]) -> Observed:
    """A complete trial, as the process is told it."""
    if trial.estimate is None:
        raise ValueError(f"trial {trial.number} is {trial.state} and has no estimate")
    value, variance = trial.estimate
    return Observed(method, tuple(place), value, variance, trial.violation)


def scalarised(estimates: Sequence[Mapping[str, Estimate]], seed: int) -> list[tuple[float, float]]:
    """One goal out of several, between which the seed draws weights: near the best in each.

    The augmented Chebyshev function of ParEGO: Knowles 2006, eq. 2,
    https://doi.org/10.1109/TEVC.2005.851274.

    Args:
        estimates: Of n trials: each task's value and its variance.
        seed: Of the weights.

    Returns:
        A value and its variance for each trial.
    """
    values, variances = np.array([list(one.values()) for one in estimates]).transpose(2, 0, 1)
    spread = np.ptp(values, axis=0)
    spread[spread == 0] = 1.0
    weights = np.random.default_rng(seed).dirichlet(np.ones(values.shape[1])) / spread
    behind = weights * (values.max(axis=0) - values)  # (n, tasks)
    goal = -(behind.max(axis=1) + AUGMENTATION * behind.sum(axis=1))
    worst = behind.argmax(axis=1)
    variance = weights[worst] ** 2 * variances[np.arange(len(values)), worst]
    return list(zip(goal.tolist(), variance.tolist(), strict=True))


def believed(
    space: Space, points: Sequence[Point], values: Floats, variances: Floats
) -> JointPosterior:
    """What the process believes of the points' own values, noise taken away.

    Args:
        space: That is searched.
        points: n.
        values: Estimates, (n).
        variances: Of the estimates, (n).
    """
    places = RecipeEncoding(space)
    tried = places.population(points)
    x = places.of(tried)
    known = zip(tried.method.tolist(), map(tuple, x.tolist()), values, variances, strict=True)
    observed = tuple(Observed(*one) for one in known)
    with one_thread():
        return Posterior(Data.of(observed), fitted(observed)).belief()
