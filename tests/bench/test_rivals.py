"""Rivals propose as the tools that they stand for."""

from functools import partial

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape import planted
from replay import LuckyMaximum, System, replay
from rivals import Started, Stock, WeightsGa
from search.proposing.starts import warm_starts

SPACE = planted(0).space
TPE = partial(Stock, lambda seed: optuna.samplers.TPESampler(seed=seed), ())


def ga(seed=0):
    return WeightsGa(7, "task_arithmetic", SPACE, seed)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_children_of_a_crossover_lie_within_bounds_and_around_their_parents(seed):
    rival = ga(seed)
    pair = rival.generator.random((2, 3))
    children = rival.crossed(pair)
    assert ((children >= 0) & (children <= 1)).all()
    draws = np.array([rival.crossed(np.array([[0.4], [0.6]])) for _ in range(2000)])
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert 0.05 < draws.std() < 0.15


def test_a_mutation_is_small_and_hits_one_weight_of_three():
    rival = ga()
    moves = rival.mutated(np.full((5000, 3), 0.5)) - 0.5
    assert (moves != 0).mean() == pytest.approx(0.9 / 3, abs=0.02)
    assert abs(moves).max() <= 0.5
    assert abs(moves[moves != 0]).mean() < 0.1


def test_genetic_rival_begins_with_tenths_and_improves_its_population():
    landscape = planted(0)
    system = System(lambda space, seed: ga(seed), LuckyMaximum(), raced=False, baselines=False)
    ends = replay(system, landscape, 0, [240 * 7, 240 * 40])
    first, last = (landscape.truth(end.export.recipe) for end in ends)
    assert last > first
    weights = SPACE.weights([ga().ask()])
    assert np.allclose(weights * 10, (weights * 10).round(), atol=1e-4)


def test_a_started_rival_tries_the_warm_starts_first_and_then_what_it_would_have():
    started, alone = Started(TPE, SPACE, 4), TPE(SPACE, 4)
    points = [started.ask() for _ in range(len(warm_starts(SPACE)) + 3)]
    assert points[:-3] == [point for _, point in warm_starts(SPACE)]
    assert points[-3:] == [alone.ask() for _ in range(3)]
