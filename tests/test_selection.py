import numpy as np
import pytest

from objectives.scores import Interval
from search.selection import Sheet, ranked, shortfall, verdict

WEIGHTS = {"x": 1.0, "y": 3.0}


def sheet(*answers):
    return Sheet(tuple(answers), ("x", "x", "y", "y")[: len(answers)], WEIGHTS)


def test_mean_weighs_tasks_not_items():
    assert sheet(1, 0, 1, 1).mean == pytest.approx((0.5 + 3 * 1.0) / 4)


def test_sheets_add_up_item_by_item():
    both = sheet(1, 0, 1, 1) + sheet(0, 0, 0, 0)
    assert both.by_task == {"x": 0.25, "y": 0.5}


def test_candidate_below_a_floor_ranks_behind_all_that_meet_it():
    sheets = {"good": sheet(0, 0, 1, 1), "fair": sheet(1, 1, 0, 1)}
    assert ranked(sheets, {}) == ["good", "fair"]
    assert ranked(sheets, {"x": 0.5}) == ["fair", "good"]
    assert shortfall(sheets["good"], {"x": 0.5}) == 0.5


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
        mine, theirs = (Sheet(tuple(a), tasks, WEIGHTS) for a in (one, other))
        called += verdict([mine.minus(theirs, seed)]) == "better"
    assert called / 300 < 0.025 + 3 * (0.025 * 0.975 / 300) ** 0.5
