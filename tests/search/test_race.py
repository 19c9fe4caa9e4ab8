"""Races: what answers say, who is asked on, and who is elected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import ndtr

from landscape import planted
from search.proposing.recipes import to_recipe
from search.racing.elimination import JointPosterior, successive_elimination
from search.racing.item_scores import ItemScores
from search.racing.race import Race, Strata, prob_ahead

WEIGHTS = {"x": 1.0, "y": 3.0}
TASKS = ("x", "y") * 60
STRATA = Strata(TASKS, WEIGHTS)
ENDS = range(20, 121, 20)


def drawn(chances, seed=0):
    """Right answers with these chances; models answer alike where they can."""
    luck = np.random.default_rng(seed).random(len(TASKS))
    return [(luck < chance).astype(float) for chance in chances]


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


def test_of_candidates_stopped_without_hope_few_would_have_ended_ahead():
    """Over all looks, and whether they are better, as good or worse than the incumbent."""
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
    assert ended_ahead / stopped < 2 * race.stop_below  # variances are estimates, too


def test_the_first_candidate_and_whoever_is_level_is_asked_everything():
    race, (answers,) = Race(STRATA), drawn([0.6])
    for _ in range(2):
        assert all(race.should_continue(answers[:end]) for end in range(120))
        assert not race.should_continue(answers)
        race.record(answers)


def test_hopeless_candidate_is_stopped_after_a_block():
    race, (best, poor) = Race(STRATA), drawn([0.9, 0.2])
    race.record(best)
    assert not race.should_continue(poor[:20])


def test_chance_to_end_ahead_is_certain_when_all_is_asked():
    one, other = drawn([0.6, 0.5])
    assert prob_ahead(STRATA, one - other) == 1
    assert prob_ahead(STRATA, other - one) == 0


def test_in_a_race_for_the_front_who_leads_in_one_task_is_asked_on():
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


def test_task_without_an_item_so_far_is_worth_what_the_best_are_but_unsure():
    race, (best, poor) = Race(STRATA), drawn([0.7, 0.3])
    race.record(best)
    assert race.by_task(poor[:1])["y"].value == race.by_task(best)["y"].value
    assert race.by_task(poor[:1])["y"].variance > race.by_task(poor[:40])["y"].variance


def test_candidate_that_answers_as_the_best_is_worth_as_much():
    race, (best, poor) = Race(STRATA), drawn([0.7, 0.3])
    race.record(best)
    worth = STRATA.estimate(best).value
    assert race.record(best[:20]).value == pytest.approx(worth)
    assert race.record(poor[:20]).value < worth - 0.2
    assert race.record(poor[:20]).variance > race.record(poor[:60]).variance


def test_who_misses_a_floor_is_not_the_one_to_beat():
    race, (best, fair) = Race(STRATA), drawn([0.9, 0.6])
    race.record(fair)
    race.record(best, violation=0.1)
    assert race.should_continue(fair[:20])


def test_belief_weighs_what_was_known_and_what_is_new_by_their_certainty():
    before = JointPosterior(np.array([0.5, 0.6]), np.diag([0.02, 0.02]))
    after = before.update(np.array([0.7, 0.6]), np.diag([0.01, 0.01]))
    gap, expected = (
        after.means[0] - after.means[1],
        (-0.1 / 0.04 + 0.1 / 0.02) / (1 / 0.04 + 1 / 0.02),
    )
    assert gap == pytest.approx(expected, abs=1e-4)
    variance = np.array([1, -1]) @ after.covariance @ np.array([1, -1])
    assert variance == pytest.approx(1 / (1 / 0.04 + 1 / 0.02), rel=1e-3)


def test_how_difficult_new_items_are_moves_nobody():
    before = JointPosterior(np.array([0.5, 0.6]), np.diag([0.02, 0.01]))
    noise = np.diag([0.01, 0.01])
    easy, hard = (before.update(np.array([0.3, 0.5]) + ease, noise) for ease in (0.2, -0.2))
    assert np.diff(easy.means) == pytest.approx(np.diff(hard.means), abs=3e-3)


@given(st.floats(0.01, 1000), st.integers(0, 9))
def test_belief_and_its_chances_are_the_same_in_any_unit(unit, seed):
    generator = np.random.default_rng(seed)
    prior, noise = (a @ a.T + 0.01 * np.eye(4) for a in generator.random((2, 4, 4)))
    means, found = generator.random((2, 4))
    one = JointPosterior(means, prior).update(found, noise)
    other = JointPosterior(unit * means, unit**2 * prior).update(unit * found, unit**2 * noise)
    assert other.means == pytest.approx(unit * one.means)
    assert other.prob_better_than(2) == pytest.approx(one.prob_better_than(2), abs=1e-6)


def test_what_nothing_was_known_of_is_believed_as_it_was_found_in_any_unit():
    found, noise = np.array([20.0, 31.0, 29.0]), np.diag([4.0, 4.0, 9.0])
    after = JointPosterior.vague(3).update(found, noise)
    assert np.diff(after.means) == pytest.approx(np.diff(found), rel=1e-3)
    assert after.prob_better_than(1)[2] == pytest.approx(ndtr(-2 / 13**0.5), abs=1e-3)


def field(answers):
    """A way to ask, and how much each was asked."""
    asked = [0] * len(answers)

    def ask(some, end):
        for one in some:
            asked[one] = end
        return np.stack([answers[one][:end] for one in some])

    return ask, asked


def test_field_elects_the_best_and_asks_who_is_behind_less():
    ask, asked = field(drawn([0.2, 0.9, 0.6, 0.85]))
    assert successive_elimination(JointPosterior.vague(4), STRATA, ask, ENDS) == 1
    assert asked[0] < asked[1]
    assert asked[2] < asked[1]


def test_field_keeps_to_its_budget():
    ask, asked = field(drawn([0.8, 0.8, 0.8]))
    successive_elimination(JointPosterior.vague(3), STRATA, ask, ENDS, budget=130)
    assert asked == [40, 40, 40]


def test_nobody_is_asked_where_one_stands_alone():
    ask, asked = field(drawn([0.8]))
    assert successive_elimination(JointPosterior.vague(1), STRATA, ask, ENDS) == 0
    assert asked == [0]


def test_who_misses_a_floor_is_elected_only_if_all_do():
    ask, _ = field(drawn([0.9, 0.5]))
    missing = successive_elimination(
        JointPosterior.vague(2), STRATA, ask, ENDS, violation=lambda one, _: float(one == 0)
    )
    assert missing == 1
    assert (
        successive_elimination(JointPosterior.vague(2), STRATA, ask, ENDS, violation=lambda *_: 1.0)
        == 0
    )


def test_true_best_of_a_field_is_seldom_dropped_before_it_is_over():
    """Believed as it is: three within two points, before items that cannot tell them apart."""
    generator, dropped = np.random.default_rng(0), 0
    for seed in range(400):
        prior = JointPosterior(np.full(3, 0.6), np.eye(3) * 0.02**2)
        chances = generator.normal(prior.means, 0.02)
        ask, asked = field(drawn(chances, seed))
        successive_elimination(prior, STRATA, ask, ENDS)
        dropped += asked[int(np.argmax(chances))] < max(asked)
    assert dropped / 400 < 0.05
