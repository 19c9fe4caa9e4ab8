"""The Gaussian process knows what a recipe is, learns from noisy trials and finds what is best."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from scipy.stats import norm

from landscape import planted
from replay import OptunaSampler
from search.proposing.encoding import RecipeEncoding
from search.proposing.gp import (
    MODELLED,
    STEP,
    Data,
    Kernel,
    Observed,
    Posterior,
    expected_improvement,
    loss,
    modelled,
    rung,
)
from search.proposing.recipes import to_recipe
from search.proposing.samplers import RANDOM_STARTUP
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.racing.race import Estimate
from search.storing.trials import TrialRecord

METHODS = (
    "task_arithmetic",
    "linear",
    "ties",
    "slerp",
    "nuslerp",
    "model_stock",
    "sce",
    "nearswap",
)
SPACE = Space("base", ("a", "b", "c"), METHODS, (0.0, 1.5), {"density": (0.1, 1.0)})
UNITS = Space("base", ("a", "b"), ("ties", "linear"), (0.2, 1.0), {}, (("mlp",), ()))


def some(count, dimensions=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.uniform(0, 1.5, (count, dimensions))
    values = np.sin(x.sum(axis=1)) + 0.05 * generator.standard_normal(count)
    methods = generator.integers(3, size=count)
    return [
        Observed(int(m), tuple(at), float(v), 0.05**2)
        for m, at, v in zip(methods, x, values, strict=True)
    ]


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_gradient_of_the_loss_is_its_differences(seed):
    data = Data.of(some(20, seed=seed))
    known = (data.x, data.method, data.targets[:, 0], data.variance)
    theta = np.random.default_rng(seed).normal(0, 0.5, 5)
    error = check_grad(lambda t: loss(t, *known)[0], lambda t: loss(t, *known)[1], theta)
    assert error < 1e-3 * (1 + np.linalg.norm(loss(theta, *known)[1]))


def test_exact_trials_are_believed_and_noisy_ones_less():
    kernel = Kernel(1.0, 1.0, np.ones(3))
    observed = some(30)
    errors = {}
    for variance in (0.0, 0.3):
        data = Data.of([one._replace(variance=variance) for one in observed])
        means = Posterior(data, kernel).means(data.x, data.method)
        errors[variance] = abs(means - data.targets)[:, 0].max()
    assert errors[0.0] < 1e-3
    assert errors[0.3] > 0.1


def test_expected_improvement_is_the_mean_of_what_is_above_the_best():
    mean, deviation, best = np.array([0.2, -1.0]), np.array([0.5, 0.8]), 0.4
    draws = norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    gained = np.maximum(mean[:, None] + deviation[:, None] * draws - best, 0).mean(axis=1)
    assert expected_improvement(mean, deviation, best) == pytest.approx(gained, rel=1e-3)


def test_what_is_believed_anywhere_is_at_the_trials_what_is_believed_of_them():
    data = Data.of(observed := some(12))
    known = Posterior(data, Kernel(1.0, 1.0, np.array([0.3, 0.5, 0.7])))
    means, deviations = known.values(data.x, data.method)
    belief = known.belief()
    assert means == pytest.approx(belief.means, abs=1e-5)
    assert deviations**2 == pytest.approx(np.diag(belief.covariance), abs=1e-5)
    values = np.array([one.value for one in observed])
    means, deviations = known.values(data.x + 100, data.method)
    assert means == pytest.approx(np.full(12, values.mean()))
    assert deviations == pytest.approx(np.full(12, values.std()))


NUMBERS = st.floats(0.1, 1.4).map(lambda number: round(number, 2))
POINTS = st.builds(
    lambda method, weights, density: SPACE.point(method, weights, density=min(density, 1.0)),
    st.sampled_from(METHODS),
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    NUMBERS,
)


@given(POINTS, POINTS)
def test_recipes_are_equal_where_places_are(one, other):
    places = RecipeEncoding(SPACE)
    both = places.population([one, other | {"method": one["method"]}])
    same = np.allclose(*places.of(both), atol=1e-5)
    keys = {to_recipe(SPACE, places.point(both[[i]])).key for i in range(2)}
    assert same == (len(keys) == 1)


@pytest.mark.parametrize("space", [SPACE, UNITS])
@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_candidates_are_points_of_the_space_and_back(space, seed):
    places, generator = RecipeEncoding(space), np.random.default_rng(seed)
    candidates = places.random(20, generator)
    candidates += places.near(candidates, 0.5, generator)
    points = [places.point(candidates[[i]]) for i in range(len(candidates))]
    assert all(space.contains(point) for point in points)
    assert places.population(points).weights == pytest.approx(candidates.weights, abs=2e-5)


def test_some_candidates_do_without_some_donors():
    candidates = RecipeEncoding(SPACE).random(100, np.random.default_rng(0))
    absent = (candidates.weights == 0).any(axis=(1, 2))
    assert 0.1 < absent.mean() < 0.6


@given(st.integers(20, 400))
def test_hyperparameters_are_fitted_seldom_and_of_the_trials_there_are(count):
    assert 20 <= rung(count, 20) <= count <= rung(count, 20) * 1.15 + 1


def proposals(count, floor=None):
    """Proposals after the start-up, where the value is the planted truth."""
    landscape = planted(1)
    sampler = OptunaSampler("gp", landscape.space, 0)
    points = []
    for _ in range(len(warm_starts(landscape.space)) + RANDOM_STARTUP + count):
        points.append(sampler.ask())
        recipe = to_recipe(landscape.space, points[-1])
        if floor:
            sampler.waiting[-1].set_constraint("floor", floor(points[-1]))
        sampler.tell(Estimate(landscape.truth(recipe), 1e-6))
    return landscape, points[-count:]


def test_exact_values_lead_to_the_best_recipe_without_trying_any_twice():
    landscape, points = proposals(30)
    recipes = {
        recipe.key: recipe for recipe in (to_recipe(landscape.space, point) for point in points)
    }
    assert len(recipes) == len(points)
    assert max(map(landscape.truth, recipes.values())) > landscape.best - 0.01


def test_recipes_that_miss_a_floor_are_avoided():
    _, points = proposals(15, floor=lambda point: point["scale"] - 0.5)
    assert sum(point["scale"] < 0.6 for point in points) > 8


def test_waiting_trials_are_not_proposed_again():
    landscape, _ = proposals(1)
    sampler = OptunaSampler("gp", landscape.space, 0)
    for _ in range(len(warm_starts(landscape.space)) + RANDOM_STARTUP):
        recipe = to_recipe(landscape.space, sampler.ask())
        sampler.tell(Estimate(landscape.truth(recipe), 1e-4))
    keys = {to_recipe(landscape.space, sampler.ask()).key for _ in range(6)}
    assert len(keys) == 6


def test_few_trials_are_all_modelled_and_of_many_the_best_and_the_latest():
    values = np.random.default_rng(0).permutation(1000) / 1000
    trials = [
        TrialRecord(number, "complete", estimate=Estimate(float(value), 0.001))
        for number, value in enumerate(values)
    ]
    few = trials[: MODELLED + STEP - 1]
    assert list(modelled(few)) == few
    many = modelled(trials)
    assert len(many) == MODELLED
    assert list(many[-MODELLED // 2 :]) == trials[-MODELLED // 2 :]
    earlier = sorted(values[: -MODELLED // 2])
    best = [trial.value for trial in many[: MODELLED // 2]]
    assert sorted(best) == earlier[-MODELLED // 2 :]
    assert list(modelled(trials + trials[:30])[:MODELLED]) == list(many)
