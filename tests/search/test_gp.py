"""The Gaussian process has the right gradient, weighs trials by their noise, and is consistent."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from scipy.stats import norm

from search.proposing.gp import (
    Kernel,
    Observation,
    Posterior,
    TrainingData,
    expected_improvement,
    negative_log_posterior,
)


def some(count, dimensions=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.uniform(0, 1.5, (count, dimensions))
    values = np.sin(x.sum(axis=1)) + 0.05 * generator.standard_normal(count)
    methods = generator.integers(3, size=count)
    return [
        Observation(int(m), tuple(at), float(v), 0.05**2)
        for m, at, v in zip(methods, x, values, strict=True)
    ]


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_gradient_of_the_log_posterior_is_its_finite_difference(seed):
    data = TrainingData.from_observations(some(20, seed=seed))
    known = (data.x, data.method, data.y[:, 0], data.variance)
    theta = np.random.default_rng(seed).normal(0, 0.5, 5)

    def value(theta):
        return negative_log_posterior(theta, *known)[0]

    def gradient(theta):
        return negative_log_posterior(theta, *known)[1]

    error = check_grad(value, gradient, theta)
    assert error < 1e-3 * (1 + np.linalg.norm(gradient(theta)))


def test_posterior_means_are_at_exact_values_and_shrink_noisy_ones():
    kernel = Kernel(1.0, 1.0, np.ones(3))
    observed = some(30)
    errors = {}
    for variance in (0.0, 0.3):
        data = TrainingData.from_observations([one._replace(variance=variance) for one in observed])
        means = Posterior(data, kernel).means(data.x, data.method)
        errors[variance] = abs(means - data.y)[:, 0].max()
    assert errors[0.0] < 1e-3
    assert errors[0.3] > 0.1


def test_expected_improvement_is_the_mean_of_what_is_above_the_best():
    mean, deviation, best = np.array([0.2, -1.0]), np.array([0.5, 0.8]), 0.4
    draws = norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    gained = np.maximum(mean[:, None] + deviation[:, None] * draws - best, 0).mean(axis=1)
    assert expected_improvement(mean, deviation, best) == pytest.approx(gained, rel=1e-3)


def test_posterior_at_the_trials_features_is_the_joint_posterior_of_the_trials():
    data = TrainingData.from_observations(observed := some(12))
    known = Posterior(data, Kernel(1.0, 1.0, np.array([0.3, 0.5, 0.7])))
    means, deviations = known.values(data.x, data.method)
    joint = known.of_trials()
    assert means == pytest.approx(joint.means, abs=1e-5)
    assert deviations**2 == pytest.approx(np.diag(joint.covariance), abs=1e-5)
    values = np.array([one.value for one in observed])
    means, deviations = known.values(data.x + 100, data.method)
    assert means == pytest.approx(np.full(12, values.mean()))
    assert deviations == pytest.approx(np.full(12, values.std()))
