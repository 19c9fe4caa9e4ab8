import numpy as np
import pytest

from objectives.scores import Interval
from search.racing.item_scores import ItemScores, constraint_violation
from search.racing.verdict import items_to_decide, verdict

WEIGHTS = {"x": 1.0, "y": 3.0}


def sheet(*answers):
    return ItemScores(tuple(answers), ("x", "x", "y", "y")[: len(answers)], WEIGHTS)


def test_mean_weighs_tasks_not_items():
    assert sheet(1, 0, 1, 1).mean == pytest.approx((0.5 + 3 * 1.0) / 4)


def test_scores_add_up_item_by_item():
    both = sheet(1, 0, 1, 1) + sheet(0, 0, 0, 0)
    assert both.by_task == {"x": 0.25, "y": 0.5}


def test_violation_counts_the_tasks_that_have_items():
    assert constraint_violation(sheet(0, 0, 1, 1), {"x": 0.5}) == 0.5
    assert constraint_violation(sheet(0, 1), {"x": 0.5, "y": 0.9}) == 0


def test_items_to_decide_would_decide():
    """With so many items, four tests in five of a true difference of that size succeed."""
    generator = np.random.default_rng(0)

    def answers(count):
        luck = generator.random(count)
        pair = luck < 0.55, np.where(generator.random(count) < 0.1, luck > 0.5, luck < 0.5)
        return [ItemScores(tuple(a.astype(float)), ("x",) * count, {"x": 1.0}) for a in pair]

    undecided = [items_to_decide(*answers(100)) for _ in range(200)]
    assert None in undecided
    needed = items_to_decide(*answers(100_000))
    assert needed is None
    one, other = (np.array(s.values) for s in answers(100_000))
    gap, spread = (one - other).mean(), (one - other).var()
    wanted = int(7.85 * spread / gap**2)
    shown = [items_to_decide(*answers(wanted)) is None for _ in range(300)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.08)


def test_verdict_needs_every_interval_above_zero():
    ahead, level = Interval(0.1, 0.02, 0.2), Interval(0.1, -0.01, 0.2)
    assert verdict([ahead, ahead]) == "better"
    assert verdict([ahead, level]) == "not better"
    assert verdict([]) == "not better"


def test_two_equal_models_are_called_better_at_the_nominal_rate_at_most():
    generator = np.random.default_rng(0)
    tasks = ("x",) * 100 + ("y",) * 100
    called = 0
    for seed in range(300):
        one, other = (generator.random((2, 200)) < 0.6).astype(float)
        mine, theirs = (ItemScores(tuple(a), tasks, WEIGHTS) for a in (one, other))
        called += verdict([mine.minus(theirs, seed)]) == "better"
    assert called / 300 < 0.025 + 3 * (0.025 * 0.975 / 300) ** 0.5


def test_tokens_beyond_the_limit_violate_it_by_their_share_and_items_not_written_do_not_count():
    some = ItemScores((1.0, 0.0, 0.0), ("x", "x", "y"), WEIGHTS, (30, 60, None))
    assert some.mean_tokens == 45
    assert constraint_violation(some, {}, 30) == 0.5
    assert constraint_violation(some, {"x": 0.75}, 50) == 0.25
    assert constraint_violation(sheet(0, 0, 1, 1), {}, 30) == 0
