"""Means are the study's means, and intervals have their nominal coverage."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.base import ObjectiveError
from objectives.scores import (
    bootstrap,
    paired_bootstrap,
    score_interval,
    task_means,
    weighted_mean,
)

VALUES = st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1, 1)), min_size=1, max_size=40)


def test_weighted_mean_by_hand():
    means = task_means([1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])
    assert means == {"a": 0.5, "b": 1.0}
    assert weighted_mean(means, {"a": 3.0, "b": 1.0}) == pytest.approx(0.625)


@given(VALUES, st.floats(0.01, 100))
def test_only_ratios_of_weights_matter(pairs, scale):
    tasks, values = zip(*pairs, strict=True)
    means = task_means(values, tasks)
    weights = {task: index + 1.0 for index, task in enumerate(means)}
    scaled = {task: weight * scale for task, weight in weights.items()}
    assert weighted_mean(means, scaled) == pytest.approx(weighted_mean(means, weights))


@given(VALUES, st.integers(0, 99))
def test_interval_contains_its_mean_within_the_range_of_values(pairs, seed):
    tasks, values = zip(*pairs, strict=True)
    weights = dict.fromkeys(tasks, 1.0)
    interval = bootstrap(values, tasks, weights, resamples=200, seed=seed)
    assert interval.mean == pytest.approx(weighted_mean(task_means(values, tasks), weights))
    assert min(values) - 1e-12 <= interval.low <= interval.high <= max(values) + 1e-12


@given(VALUES, st.floats(-1, 1))
def test_a_constant_difference_has_no_width(pairs, shift):
    tasks, values = zip(*pairs, strict=True)
    moved = [value + shift for value in values]
    interval = paired_bootstrap(moved, values, tasks, dict.fromkeys(tasks, 1.0), resamples=50)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((shift,) * 3, abs=1e-9)


def test_interval_covers_the_true_difference_at_its_nominal_rate():
    generator = np.random.default_rng(0)
    tasks = ["a"] * 60 + ["b"] * 120
    weights = {"a": 2.0, "b": 1.0}
    truth = (2 * 0.1 + 0.0) / 3
    covered = 0
    for repeat in range(400):
        second = generator.random(180) < 0.5
        gains = np.repeat([0.2, 0.0], [60, 120])  # of those that were wrong: 0.1 of all in task a
        first = second | (generator.random(180) < gains)
        interval = paired_bootstrap(first, second, tasks, weights, resamples=500, seed=repeat)
        covered += interval.low <= truth <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


@given(st.integers(1, 200), st.data())
def test_interval_of_correct_and_wrong_answers_is_wilsons(n, data):
    correct = data.draw(st.integers(0, n))
    values = [1.0] * correct + [0.0] * (n - correct)
    interval = score_interval(values, ["a"] * n, {"a": 3.0})
    p, z = correct / n, 1.959964
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert interval.low == pytest.approx(middle - half, abs=1e-6)
    assert interval.high == pytest.approx(middle + half, abs=1e-6)


def test_interval_of_scores_near_the_edge_covers_them_at_its_nominal_rate():
    generator = np.random.default_rng(0)
    tasks, weights = ["a"] * 90 + ["b"] * 45, {"a": 1.0, "b": 2.0}
    truth = (0.98 + 2 * 0.6) / 3
    covered = 0
    for _ in range(1000):
        values = generator.random(135) < np.repeat([0.98, 0.6], [90, 45])
        interval = score_interval(values, tasks, weights)
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / 1000 <= 0.975


def test_interval_of_values_that_are_no_proportions_is_the_bootstraps():
    values = np.random.default_rng(1).random(50).tolist()
    tasks, weights = ["a"] * 50, {"a": 1.0}
    found, expected = (make(values, tasks, weights) for make in (score_interval, bootstrap))
    assert found.low == pytest.approx(expected.low)
    assert found.high == pytest.approx(expected.high)


def test_same_seed_same_interval_whatever_the_chunks(monkeypatch):
    values = np.random.default_rng(1).random(50)
    interval = bootstrap(values, ["a"] * 50, {"a": 1.0}, seed=7)
    assert bootstrap(values, ["a"] * 50, {"a": 1.0}, seed=7) == interval
    monkeypatch.setattr("objectives.scores._CHUNK", 50 * 1000)
    chunked = bootstrap(values, ["a"] * 50, {"a": 1.0}, seed=7)
    assert chunked.low == pytest.approx(interval.low, abs=0.01)


def test_four_hundred_items_take_well_under_a_second():
    values = np.random.default_rng(1).random(400)
    tasks = ["a"] * 100 + ["b"] * 300
    start = time.process_time()
    bootstrap(values, tasks, {"a": 1.0, "b": 1.0})
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_mean({"a": 1.0}, {"a": 1.0, "b": 1.0}), r"\['a', 'b'\].*\['a'\]"),
        (lambda: weighted_mean({"a": 1.0}, {"a": 0.0}), "sum to 0.0; make one larger"),
        (lambda: task_means([1.0, 2.0], ["a"]), "2 values for 1 items"),
        (lambda: bootstrap([], [], {}), "at least one"),
        (lambda: paired_bootstrap([1.0], [], ["a"], {"a": 1.0}), "got 1 and 0"),
    ],
)
def test_values_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call()
