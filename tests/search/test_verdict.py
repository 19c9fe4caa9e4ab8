"""The verdict on paired differences, and how many items one takes."""

import numpy as np
import pytest

from objectives.scores import Interval
from search.racing.item_scores import ItemScores
from search.racing.verdict import items_to_decide, verdict


def test_so_many_items_decide_at_80_percent_power():
    """With so many items, four tests in five of a true difference of that size succeed."""
    generator = np.random.default_rng(0)

    def draw(count):
        u = generator.random(count)
        pair = u < 0.55, np.where(generator.random(count) < 0.1, u > 0.5, u < 0.5)
        return [ItemScores(tuple(a.astype(float)), ("x",) * count, {"x": 1.0}) for a in pair]

    undecided = [items_to_decide(*draw(100)) for _ in range(200)]
    assert None in undecided
    needed = items_to_decide(*draw(100_000))
    assert needed is None
    one, other = (np.array(s.values) for s in draw(100_000))
    gap, spread = (one - other).mean(), (one - other).var()
    wanted = int(7.85 * spread / gap**2)
    shown = [items_to_decide(*draw(wanted)) is None for _ in range(300)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.08)


def test_verdict_needs_every_interval_above_zero():
    ahead, level = Interval(0.1, 0.02, 0.2), Interval(0.1, -0.01, 0.2)
    assert verdict([ahead, ahead]) == "better"
    assert verdict([ahead, level]) == "not better"
    assert verdict([]) == "not better"


def test_two_equal_models_are_called_better_at_the_nominal_rate_at_most():
    generator = np.random.default_rng(0)
    tasks = ("x",) * 100 + ("y",) * 100
    better = 0
    for seed in range(300):
        one, other = (generator.random((2, 200)) < 0.6).astype(float)
        mine, theirs = (ItemScores(tuple(a), tasks, {"x": 1.0, "y": 3.0}) for a in (one, other))
        better += verdict([mine.minus(theirs, seed)]) == "better"
    assert better / 300 < 0.025 + 3 * (0.025 * 0.975 / 300) ** 0.5
