"""Races: estimates from per-item scores, and which candidates are evaluated further."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from landscape import planted
from search.proposing.recipes import to_recipe
from search.racing.item_scores import ItemScores
from search.racing.race import STOP_BELOW, Race, Strata, prob_ahead

WEIGHTS = {"x": 1.0, "y": 3.0}
TASKS = ("x", "y") * 60
STRATA = Strata(TASKS, WEIGHTS)
ENDS = range(20, 121, 20)


def drawn(means, seed=0):
    """Draw the scores of candidates with these means, as correlated as they can be."""
    difficulty = np.random.default_rng(seed).random(len(TASKS))
    return [(difficulty < mean).astype(float) for mean in means]


@given(arrays(float, st.integers(1, 120), elements=st.floats(0, 1)))
def test_estimate_is_the_weighted_task_mean(answers):
    tasks = TASKS[: len(answers)]
    seen = {task: WEIGHTS[task] for task in set(tasks)}
    expected = ItemScores(tuple(answers), tasks, seen).mean
    assert STRATA.estimate(answers).value == pytest.approx(expected)


@given(arrays(float, (3, 60), elements=st.floats(0, 1)))
def test_moments_of_models_give_those_of_their_differences(answers):
    means, covariance = STRATA.moments(answers)
    difference = STRATA.estimate(answers[0] - answers[1])
    assert means[0] - means[1] == pytest.approx(difference.value)
    contrast = np.array([1, -1, 0])
    smoothing = STRATA.estimate(np.zeros(60)).variance
    found = contrast @ covariance @ contrast
    assert found == pytest.approx(difference.variance + smoothing)


def test_estimate_of_a_stopped_candidate_is_right_on_average():
    landscape = planted(0)
    one, other = (
        to_recipe(landscape.space, landscape.space.point(method, weights, density=0.7))
        for method, weights in (("ties", (0.9, 0.4, 1.2)), ("dare_ties", (0.3, 1.1, 0.6)))
    )
    errors, claimed = [], []
    for seed in range(200):
        items = landscape.draw(240, np.random.default_rng(seed))
        strata = Strata(items.tasks, landscape.weights)
        race, values = Race(strata), items.answers(one).astype(float)
        race.record(items.answers(other).astype(float))
        estimate = race.record(values[:60])
        errors.append(estimate.value - strata.estimate(values).value)
        claimed.append(estimate.variance * (1 - 60 / 240))
    assert abs(np.mean(errors)) < 3 * (np.mean(claimed) / 200) ** 0.5
    assert np.mean(np.square(errors)) == pytest.approx(np.mean(claimed), rel=0.35)


def test_variance_is_the_spread_of_estimates():
    values, claimed = [], []
    generator = np.random.default_rng(0)
    for _ in range(2000):
        estimate = STRATA.estimate((generator.random(40) < 0.7).astype(float))
        values.append(estimate.value)
        claimed.append(estimate.variance)
    assert np.mean(claimed) == pytest.approx(np.var(values), rel=0.1)


def test_task_without_an_item_so_far_is_left_out():
    assert STRATA.estimate(np.array([0.25])).value == 0.25


def test_few_of_the_stopped_candidates_would_have_ended_ahead():
    """Over all looks, of candidates that are better, as good or worse than the incumbent."""
    generator = np.random.default_rng(0)
    stopped = ended_ahead = 0
    for _ in range(1000):
        both = generator.random((2, 120)) < generator.uniform(0.5, 0.7, (2, 1))
        race = Race(STRATA)
        race.record(both[0].astype(float))
        mine = both[1].astype(float)
        if any(not race.should_continue(mine[:end]) for end in ENDS if end < 120):
            stopped += 1
            ended_ahead += STRATA.estimate(mine - both[0]).value > 0
    assert stopped > 250
    assert ended_ahead / stopped < 2 * STOP_BELOW  # variances are estimates, too


def test_first_candidate_and_one_level_with_the_incumbent_are_evaluated_on_all_items():
    race, (scores,) = Race(STRATA), drawn([0.6])
    for _ in range(2):
        assert all(race.should_continue(scores[:end]) for end in range(120))
        assert not race.should_continue(scores)
        race.record(scores)


def test_candidate_far_behind_the_incumbent_is_stopped_after_a_block():
    race, (best, poor) = Race(STRATA), drawn([0.9, 0.2])
    race.record(best)
    assert not race.should_continue(poor[:20])


def test_probability_of_ending_ahead_is_0_or_1_after_all_items():
    one, other = drawn([0.6, 0.5])
    assert prob_ahead(STRATA, one - other) == 1
    assert prob_ahead(STRATA, other - one) == 0


def test_in_a_race_for_the_front_a_candidate_that_leads_in_one_task_goes_on():
    race, (best, other, poor) = Race(STRATA, front=True), drawn([0.95, 0.5, 0.05])
    of_x = np.array(TASKS) == "x"
    race.record(np.where(of_x, other, best))
    specialist = np.where(of_x, best, other)
    assert all(race.should_continue(specialist[:end]) for end in ENDS if end < 120)
    assert not race.should_continue(poor[:40]), "behind in both"
    mean_alone = Race(STRATA)
    mean_alone.record(np.where(of_x, other, best))
    assert not mean_alone.should_continue(specialist[:40]), "y weighs three times as much"
    assert race.should_continue(np.where(of_x, best, poor)[:40])
    race.record(specialist)
    assert not race.should_continue(np.where(of_x, 0.5 * best, poor)[:60]), "behind the specialist"


def test_estimates_by_task_add_up_to_the_estimate():
    race, (best, poor) = Race(STRATA), drawn([0.7, 0.3])
    race.record(best)
    whole, parts = race.record(poor[:40]), race.by_task(poor[:40])
    weights = {task: weight / 4 for task, weight in WEIGHTS.items()}
    assert whole.value == pytest.approx(sum(weights[t] * one.value for t, one in parts.items()))
    variance = sum(weights[t] ** 2 * one.variance for t, one in parts.items())
    assert whole.variance == pytest.approx(variance)


def test_task_without_an_item_so_far_has_the_panels_mean_and_a_large_variance():
    race, (best, poor) = Race(STRATA), drawn([0.7, 0.3])
    race.record(best)
    assert race.by_task(poor[:1])["y"].value == race.by_task(best)["y"].value
    assert race.by_task(poor[:1])["y"].variance > race.by_task(poor[:40])["y"].variance


def test_candidate_with_the_incumbents_scores_has_its_estimate():
    race, (best, poor) = Race(STRATA), drawn([0.7, 0.3])
    race.record(best)
    value = STRATA.estimate(best).value
    assert race.record(best[:20]).value == pytest.approx(value)
    assert race.record(poor[:20]).value < value - 0.2
    assert race.record(poor[:20]).variance > race.record(poor[:60]).variance


def test_infeasible_candidate_is_not_the_incumbent():
    race, (best, fair) = Race(STRATA), drawn([0.9, 0.6])
    race.record(fair)
    race.record(best, violation=0.1)
    assert race.should_continue(fair[:20])
