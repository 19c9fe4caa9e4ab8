"""Per-item scores: means by task, and constraint violation."""

import pytest

from search.racing.item_scores import ItemScores, constraint_violation

WEIGHTS = {"x": 1.0, "y": 3.0}


def scores(*values):
    return ItemScores(tuple(values), ("x", "x", "y", "y")[: len(values)], WEIGHTS)


def test_mean_weighs_tasks_not_items():
    assert scores(1, 0, 1, 1).mean == pytest.approx((0.5 + 3 * 1.0) / 4)


def test_scores_add_up_item_by_item():
    both = scores(1, 0, 1, 1) + scores(0, 0, 0, 0)
    assert both.by_task == {"x": 0.25, "y": 0.5}


def test_violation_counts_the_tasks_that_have_items():
    assert constraint_violation(scores(0, 0, 1, 1), {"x": 0.5}) == 0.5
    assert constraint_violation(scores(0, 1), {"x": 0.5, "y": 0.9}) == 0


def test_violation_of_the_token_limit_is_a_share_over_generated_items():
    some = ItemScores((1.0, 0.0, 0.0), ("x", "x", "y"), WEIGHTS, (30, 60, None))
    assert some.mean_tokens == 45
    assert constraint_violation(some, {}, 30) == 0.5
    assert constraint_violation(some, {"x": 0.75}, 50) == 0.25
    assert constraint_violation(scores(0, 0, 1, 1), {}, 30) == 0
