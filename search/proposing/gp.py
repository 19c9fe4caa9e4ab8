"""A Gaussian process over recipes: kernel, fit of its hyper-parameters, posterior, improvement.

Notation, for n trials with d features each (``search.proposing.encoding``):

    X         (n, d)  features
    method    (n,)    index of each trial's method
    y         (n, 2)  standardised: value, and minus the constraint violation
    variance  (n,)    noise variance of each value, from the items the trial was evaluated on
    theta     (2 + d) log(signal), log(noise), log(lengths)

    k(a, b) = signal Matern_5/2(|a - b| / lengths) (1 if the methods are equal, else
                                                    METHOD_CORRELATION)
    K = k(X, X) + diag(noise variance + JITTER)

One factor ``noise`` on all variances is fitted, since all trials are evaluated on the same items
and share much of their error. METHOD_CORRELATION is not fitted: recipes that break a model are
alike in every method, so that it would come out near 1, and where one method is best the others
would never be tried.

Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", eqs. 4.17 (kernel), 5.9
(gradient), 2.25 and 2.26 (posterior). The acquisition is the expected improvement upon the best
posterior mean (Jones et al. 1998, https://doi.org/10.1023/A:1008306431147), times the probability
that constraints are met (Gardner et al. 2014, https://proceedings.mlr.press/v32/gardner14.html).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dtrtri
from scipy.optimize import Bounds, minimize
from scipy.spatial.distance import cdist
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from search.proposing.encoding import Bits, Ints, RecipeEncoding
from search.proposing.space import Point, Space
from search.racing.elimination import JointPosterior
from search.racing.race import Floats

JITTER: Final = 1e-6
METHOD_CORRELATION: Final = 0.4
# Means and widths of the normal priors on the logarithms of signal, noise and lengths.
PRIORS: Final = ((0.0, 1.0), (-1.0, 1.0), (0.0, 0.7))


class Observation(NamedTuple):
    """A complete trial as the process sees it: encoded recipe, estimate, and its variance."""

    method: int
    features: tuple[float, ...]
    value: float
    variance: float
    violation: float = 0.0


@dataclass(frozen=True)
class Kernel:
    """The process's hyper-parameters, all but ``lengths`` in units of the values' spread."""

    signal: float  # variance of the process
    noise: float  # factor on the trials' variances
    lengths: Floats  # one length scale per feature, (d,)

    @classmethod
    def from_theta(cls, theta: Floats) -> Kernel:
        """Return the kernel whose hyper-parameters have these logarithms, (2 + d,)."""
        signal, noise, *lengths = np.exp(theta)
        return cls(float(signal), float(noise), np.array(lengths))

    def __call__(self, a: Floats, method_a: Ints, b: Floats, method_b: Ints) -> Floats:
        """Return covariances (n, m) of recipes with features (n, d) and (m, d)."""
        distance = self.distance(a, b)
        matern = (1 + distance * (1 + distance / 3)) * np.exp(-distance)
        covariance: Floats = self.signal * matern * method_correlation(method_a, method_b)
        return covariance

    def distance(self, a: Floats, b: Floats) -> Floats:
        """Return sqrt(5) times the distance in length scales, (n, m)."""
        to_lengths = 5**0.5 / self.lengths
        distances: Floats = cdist(a * to_lengths, b * to_lengths)
        return distances


def method_correlation(a: Ints, b: Ints) -> Floats:
    """Return the kernel's factor between methods, (n, m): 1 if equal, else METHOD_CORRELATION."""
    return np.where(a[:, None] == b, 1.0, METHOD_CORRELATION)


def _prior(count: int) -> tuple[Floats, Floats]:
    """Return means and widths of the prior on theta, (2 + d,) each, for ``count`` features."""
    *shared, lengths = PRIORS
    mean, width = np.array([*shared, *[lengths] * count]).T
    return mean, width


def negative_log_posterior(
    theta: Floats, x: Floats, method: Ints, y: Floats, variance: Floats
) -> tuple[float, Floats]:
    """Compute minus the log posterior density of theta, up to a constant, and its gradient.

    The likelihood's gradient is eq. 5.9.

    Args:
        theta: Log hyper-parameters, (2 + d,).
        x: Features, (n, d).
        method: (n,).
        y: Standardised values, (n,).
        variance: Of the values, (n,).
    """
    kernel = Kernel.from_theta(theta)
    distance = kernel.distance(x, x)
    decay = np.exp(-distance)
    signal = kernel.signal * (1 + distance * (1 + distance / 3)) * decay
    correlation = method_correlation(method, method)
    noise = kernel.noise * variance
    factor = cho_factor(signal * correlation + np.diag(noise + JITTER), lower=True)
    alpha = cho_solve(factor, y)
    slope = cho_solve(factor, np.eye(len(y))) - np.outer(alpha, alpha)  # of the value, in 2 K
    of_square = slope * correlation * kernel.signal * (1 + distance) * decay * (5 / 3)
    scaled = x / kernel.lengths
    of_lengths = of_square.sum(axis=1) @ scaled**2 - ((of_square @ scaled) * scaled).sum(axis=0)
    gradient = np.array(
        [
            0.5 * (slope * signal * correlation).sum(),
            0.5 * (np.diag(slope) * noise).sum(),
            *of_lengths,
        ]
    )
    value = 0.5 * y @ alpha + np.log(np.diag(factor[0])).sum()
    mean, width = _prior(x.shape[1])
    away = (theta - mean) / width
    return float(value + 0.5 * away @ away), gradient + away / width


@dataclass(frozen=True)
class TrainingData:
    """Observations as standardised arrays."""

    x: Floats  # features, (n, d)
    method: Ints  # (n,)
    y: Floats  # values and minus constraint violations, standardised, (n, 2)
    variance: Floats  # of the standardised values, (n,)
    feasible_from: float  # the least y[:, 1] that meets all constraints
    centre: float  # value that is 0 in y
    spread: float  # value that is 1 in y, above `centre`

    @classmethod
    def from_observations(cls, observations: Sequence[Observation]) -> TrainingData:
        """Return n observations, standardised."""
        y = np.array([(one.value, -one.violation) for one in observations])
        mean, spread = y.mean(axis=0), y.std(axis=0)
        spread[spread == 0] = 1.0
        return cls(
            np.array([one.features for one in observations]),
            np.array([one.method for one in observations], dtype=np.int64),
            (y - mean) / spread,
            np.array([one.variance for one in observations]) / spread[0] ** 2,
            float(-mean[1] / spread[1]),
            float(mean[0]),
            float(spread[0]),
        )

    @property
    def feasible(self) -> Bits:
        """Which trials meet the constraints, (n,)."""
        return self.y[:, 1] >= self.feasible_from


@lru_cache(maxsize=8)
def fit_kernel(observations: tuple[Observation, ...]) -> Kernel:
    """Return the hyper-parameters of the highest posterior density (MAP)."""
    data = TrainingData.from_observations(observations)
    start, width = _prior(data.x.shape[1])
    found = minimize(
        negative_log_posterior,
        start,
        (data.x, data.method, data.y[:, 0], data.variance),
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(start - 5 * width, start + 5 * width),  # a line search may leap far out
        options={"maxiter": 50},
    )
    return Kernel.from_theta(found.x)


class Posterior:
    """The process given its training data (eqs. 2.25 and 2.26), of values without noise."""

    def __init__(self, data: TrainingData, kernel: Kernel) -> None:
        self.data, self.kernel = data, kernel
        self._prior = kernel(data.x, data.method, data.x, data.method)
        self._covariance = self._prior + np.diag(kernel.noise * data.variance + JITTER)
        # Its inverse, because a product with many candidates is faster than solving for them.
        self._whitening, _ = dtrtri(np.linalg.cholesky(self._covariance), lower=1)
        self._alpha = self._whitening.T @ (self._whitening @ data.y)
        # Standardised means of the trials themselves, (n,); minus infinity where infeasible.
        self.feasible_means = np.where(data.feasible, (self._prior @ self._alpha)[:, 0], -np.inf)

    def means(self, x: Floats, method: Ints) -> Floats:
        """Return standardised posterior means of y, (m, 2), at features (m, d)."""
        means: Floats = self.kernel(x, method, self.data.x, self.data.method) @ self._alpha
        return means

    def values(self, x: Floats, method: Ints) -> tuple[Floats, Floats]:
        """Return posterior means and standard deviations of values, (m,) each, at (m, d)."""
        across = self.kernel(x, method, self.data.x, self.data.method)
        means = self.data.centre + self.data.spread * (across @ self._alpha[:, 0])
        return means, self.data.spread * self._deviations(across)

    def _deviations(self, across: Floats) -> Floats:
        """Return standard deviations (m,) given covariances (m, n) with the trials."""
        white = across @ self._whitening.T
        known = np.einsum("mn,mn->m", white, white)
        deviations: Floats = np.sqrt(np.maximum(self.kernel.signal - known, 1e-12))
        return deviations

    def of_trials(self) -> JointPosterior:
        """Return the joint posterior of the n trials' values."""
        data, prior = self.data, self._prior
        gain = np.linalg.solve(self._covariance, prior).T
        return JointPosterior(
            data.centre + data.spread * gain @ data.y[:, 0],
            data.spread**2 * (prior - gain @ prior),
        )

    def condition_on_pending(self, x: Floats, method: Ints) -> Posterior:
        """Return the posterior with pending trials imputed at their posterior means.

        The kriging believer of Ginsbourger et al. 2010,
        https://doi.org/10.1007/978-3-642-10701-6_6.

        Args:
            x: Features of the m pending trials, (m, d).
            method: (m,).
        """
        data = self.data
        return Posterior(
            replace(
                data,
                x=np.vstack([data.x, x]),
                method=np.concatenate([data.method, method]),
                y=np.vstack([data.y, self.means(x, method)]),
                variance=np.concatenate([data.variance, np.full(len(x), data.variance.mean())]),
            ),
            self.kernel,
        )

    def acquisition(self, x: Floats, method: Ints) -> Floats:
        """Compute expected improvement times the probability of feasibility, (m,), at (m, d).

        Standardised; -1 where there was a trial already. Without a feasible trial it is the
        probability alone.
        """
        across = self.kernel(x, method, self.data.x, self.data.method)
        deviation = self._deviations(across)
        means = across @ self._alpha
        feasible = self.data.feasible
        gain = np.ones(len(x))
        if feasible.any():
            gain = expected_improvement(means[:, 0], deviation, self.feasible_means.max())
        if not feasible.all():
            gain *= ndtr((means[:, 1] - self.data.feasible_from) / deviation)
        return np.where(across.max(axis=1) < self.kernel.signal * (1 - 1e-6), gain, -1.0)


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """Compute ``E[max(f - best, 0)]`` for normal f with these means and standard deviations."""
    z = (mean - best) / deviation
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    expected: Floats = deviation * (z * ndtr(z) + density)
    return expected


def posterior_of(
    space: Space, points: Sequence[Point], values: Floats, variances: Floats
) -> JointPosterior:
    """Return the joint posterior of the values, without noise, of evaluated points.

    Estimates and their variances are (n,), for n points.
    """
    encoding = RecipeEncoding(space)
    tried = encoding.candidates(points)
    features = encoding.encode(tried)
    known = zip(tried.method.tolist(), features.tolist(), values, variances, strict=True)
    observed = tuple(Observation(method, tuple(row), *score) for method, row, *score in known)
    with one_thread():
        return Posterior(TrainingData.from_observations(observed), fit_kernel(observed)).of_trials()


@cache
def _thread_pools() -> ThreadpoolController:
    """Return the libraries with threads of their own; finding them takes longer than a proposal."""
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Limit BLAS to one thread: on small matrices threads would wait for one another."""
    limited: AbstractContextManager[Any] = _thread_pools().limit(limits=1, user_api="blas")
    return limited
