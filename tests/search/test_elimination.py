"""Successive elimination: joint posteriors, and which of several candidates survives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from search.racing.elimination import JointPosterior, successive_elimination
from search.racing.race import Strata

TASKS = ("x", "y") * 60
STRATA = Strata(TASKS, {"x": 1.0, "y": 3.0})
ENDS = range(20, 121, 20)


def drawn(means, seed=0):
    """Draw the scores of candidates with these means, as correlated as they can be."""
    difficulty = np.random.default_rng(seed).random(len(TASKS))
    return [(difficulty < mean).astype(float) for mean in means]


def test_posterior_weighs_prior_and_fresh_items_by_their_precision():
    before = JointPosterior(np.array([0.5, 0.6]), np.diag([0.02, 0.02]))
    after = before.update(np.array([0.7, 0.6]), np.diag([0.01, 0.01]))
    gap, expected = (
        after.means[0] - after.means[1],
        (-0.1 / 0.04 + 0.1 / 0.02) / (1 / 0.04 + 1 / 0.02),
    )
    assert gap == pytest.approx(expected, abs=1e-4)
    variance = np.array([1, -1]) @ after.covariance @ np.array([1, -1])
    assert variance == pytest.approx(1 / (1 / 0.04 + 1 / 0.02), rel=1e-3)


def test_difficulty_of_fresh_items_leaves_differences_as_they_are():
    before = JointPosterior(np.array([0.5, 0.6]), np.diag([0.02, 0.01]))
    noise = np.diag([0.01, 0.01])
    easy, hard = (before.update(np.array([0.3, 0.5]) + ease, noise) for ease in (0.2, -0.2))
    assert np.diff(easy.means) == pytest.approx(np.diff(hard.means), abs=3e-3)


@given(st.floats(0.01, 1000), st.integers(0, 9))
def test_posterior_and_its_probabilities_are_the_same_in_any_unit(unit, seed):
    generator = np.random.default_rng(seed)
    prior, noise = (a @ a.T + 0.01 * np.eye(4) for a in generator.random((2, 4, 4)))
    means, found = generator.random((2, 4))
    one = JointPosterior(means, prior).update(found, noise)
    other = JointPosterior(unit * means, unit**2 * prior).update(unit * found, unit**2 * noise)
    assert other.means == pytest.approx(unit * one.means)
    assert other.prob_better_than(2) == pytest.approx(one.prob_better_than(2), abs=1e-6)


def test_vague_prior_leaves_the_fresh_estimates_in_any_unit():
    found, noise = np.array([20.0, 31.0, 29.0]), np.diag([4.0, 4.0, 9.0])
    after = JointPosterior.vague(3).update(found, noise)
    assert np.diff(after.means) == pytest.approx(np.diff(found), rel=1e-3)
    assert after.prob_better_than(1)[2] == pytest.approx(ndtr(-2 / 13**0.5), abs=1e-3)


def evaluator(scores):
    """Return a function that evaluates candidates, and how many items each was evaluated on."""
    counts = [0] * len(scores)

    def evaluate(some, end):
        for one in some:
            counts[one] = end
        return np.stack([scores[one][:end] for one in some])

    return evaluate, counts


def test_best_candidate_survives_and_those_behind_are_evaluated_on_fewer_items():
    evaluate, counts = evaluator(drawn([0.2, 0.9, 0.6, 0.85]))
    assert successive_elimination(JointPosterior.vague(4), STRATA, evaluate, ENDS) == 1
    assert counts[0] < counts[1]
    assert counts[2] < counts[1]


def test_elimination_keeps_to_its_budget():
    evaluate, counts = evaluator(drawn([0.8, 0.8, 0.8]))
    successive_elimination(JointPosterior.vague(3), STRATA, evaluate, ENDS, budget=130)
    assert counts == [40, 40, 40]


def test_single_candidate_survives_without_an_evaluation():
    evaluate, counts = evaluator(drawn([0.8]))
    assert successive_elimination(JointPosterior.vague(1), STRATA, evaluate, ENDS) == 0
    assert counts == [0]


def test_infeasible_candidate_survives_only_if_all_are():
    evaluate, _ = evaluator(drawn([0.9, 0.5]))

    def survivor(violation):
        prior = JointPosterior.vague(2)
        return successive_elimination(prior, STRATA, evaluate, ENDS, violation=violation)

    assert survivor(lambda one, _: float(one == 0)) == 1
    assert survivor(lambda *_: 1.0) == 0


def test_truly_best_candidate_is_seldom_dropped():
    """Three candidates within two points, on items that cannot tell them apart; a true prior."""
    generator, dropped = np.random.default_rng(0), 0
    for seed in range(400):
        prior = JointPosterior(np.full(3, 0.6), np.eye(3) * 0.02**2)
        means = generator.normal(prior.means, 0.02)
        evaluate, counts = evaluator(drawn(means, seed))
        successive_elimination(prior, STRATA, evaluate, ENDS)
        dropped += counts[int(np.argmax(means))] < max(counts)
    assert dropped / 400 < 0.05
