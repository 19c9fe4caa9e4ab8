"""The sampler learns from noisy trials, finds what is best, and avoids infeasible recipes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from landscape import planted
from proposals import StudySampler
from search.proposing.gp_sampler import MAX_TRIALS, REFRESH, propose, refit_size, training_set
from search.proposing.proposal import RANDOM_STARTUP, ProposalRequest
from search.proposing.recipes import to_recipe
from search.proposing.space import STAGE, Space, coarse_to_fine
from search.proposing.starts import warm_starts
from search.racing.race import Estimate
from search.storing.trials import TrialRecord


@given(st.integers(20, 400))
def test_hyperparameters_are_refitted_on_a_geometric_schedule(count):
    assert 20 <= refit_size(count, 20) <= count <= refit_size(count, 20) * 1.15 + 1


def proposals(count, constraint=None):
    """Points after the start-up, where estimates are the planted truth."""
    landscape = planted(1)
    sampler = StudySampler("gp", landscape.space, 0)
    points = []
    for _ in range(len(warm_starts(landscape.space)) + RANDOM_STARTUP + count):
        points.append(sampler.ask())
        recipe = to_recipe(landscape.space, points[-1])
        violation = constraint(points[-1]) if constraint else None
        sampler.tell(Estimate(landscape.truth(recipe), 1e-6), violation=violation)
    return landscape, points[-count:]


def test_exact_values_lead_to_the_best_recipe_without_trying_any_twice():
    landscape, points = proposals(30)
    recipes = {
        recipe.key: recipe for recipe in (to_recipe(landscape.space, point) for point in points)
    }
    assert len(recipes) == len(points)
    assert max(map(landscape.truth, recipes.values())) > landscape.best - 0.01


def test_infeasible_recipes_are_avoided():
    _, points = proposals(15, constraint=lambda point: point["scale"] - 0.5)
    assert sum(point["scale"] < 0.6 for point in points) > 8


def test_running_trials_are_not_proposed_again():
    landscape, _ = proposals(1)
    sampler = StudySampler("gp", landscape.space, 0)
    for _ in range(len(warm_starts(landscape.space)) + RANDOM_STARTUP):
        recipe = to_recipe(landscape.space, sampler.ask())
        sampler.tell(Estimate(landscape.truth(recipe), 1e-4))
    keys = {to_recipe(landscape.space, sampler.ask()).key for _ in range(6)}
    assert len(keys) == 6


def test_training_set_is_all_of_few_trials_and_of_many_the_best_and_the_latest():
    values = np.random.default_rng(0).permutation(1000) / 1000
    trials = [
        TrialRecord(number, "complete", estimate=Estimate(float(value), 0.001))
        for number, value in enumerate(values)
    ]
    few = trials[: MAX_TRIALS + REFRESH - 1]
    assert list(training_set(few)) == few
    many = training_set(trials)
    assert len(many) == MAX_TRIALS
    assert list(many[-MAX_TRIALS // 2 :]) == trials[-MAX_TRIALS // 2 :]
    earlier = sorted(values[: -MAX_TRIALS // 2])
    best = [trial.value for trial in many[: MAX_TRIALS // 2]]
    assert sorted(best) == earlier[-MAX_TRIALS // 2 :]
    assert list(training_set(trials + trials[:30])[:MAX_TRIALS]) == list(many)


def test_depths_get_weights_of_their_own_stage_after_stage():
    units = (("0.",), ("1.",), ("2.",), ())
    stages = coarse_to_fine(4, 0)
    deep = Space("b", ("x", "y"), ("task_arithmetic",), (0, 1), {}, units, stages=stages)
    top = np.array([[0.1, 0.9], [0.3, 0.7], [0.7, 0.3], [0.9, 0.1]])
    trials = []
    for number in range(RANDOM_STARTUP + 2 * STAGE + 20):
        point, improvement = propose(ProposalRequest(deep, 0, number, 0, trials))
        value = -float(np.square(deep.weights([point])[0] - top).sum())
        estimate = Estimate(value, 1e-6)
        trials.append(
            TrialRecord(
                number, "complete", point, estimate=estimate, expected_improvement=improvement
            )
        )
    own = [trial.expected_improvement is not None for trial in trials]
    assert own == [False] * (RANDOM_STARTUP + 2 * STAGE) + [True] * 20
    weights = deep.weights([trial.point for trial in trials])
    first, second, third = np.split(weights, [RANDOM_STARTUP + STAGE, RANDOM_STARTUP + 2 * STAGE])
    assert (first == first[:, :1]).all()
    assert (second[:, 0] == second[:, 1]).all()
    assert (second[:, 2] == second[:, 3]).all()
    errors = [np.square(some - top).sum(axis=(1, 2)).min() for some in (first, second, third)]
    assert errors[0] == pytest.approx(0.8, abs=0.02)  # what one weight for all can reach
    assert errors[1] == pytest.approx(0.08, abs=0.02)
    assert errors[2] < 0.05
