"""Steps of tuning: which items each sees, and how weights are updated."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.proposing.tuning import DECAY, first_state, items_of_job, minibatch, update


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 5.0), min_size=4, max_size=4),
    size=st.integers(1, 12),
    steps=st.integers(1, 12),
)
def test_tasks_have_items_in_proportion_to_their_weights(sizes, weights, size, steps):
    by_task = {str(t): [100 * t + n for n in range(count)] for t, count in enumerate(sizes)}
    known = dict(zip(by_task, weights, strict=False))
    drawn = [n for step in range(steps) for n in minibatch(by_task, known, size, step, (0,))]
    assert len(drawn) == size * steps
    for task, items in by_task.items():
        share = known[task] / sum(known.values()) * len(drawn)
        own = [n for n in drawn if n in items]
        assert abs(len(own) - share) <= len(by_task)
        # each of a task's items comes once before any comes again
        counts = Counter(own)
        assert max(counts.values(), default=0) - min(counts[n] for n in items) <= 1


def test_step_has_the_same_items_whatever_was_drawn_before():
    by_task, weights = {"a": [*range(7)], "b": [*range(10, 15)]}, {"a": 1.0, "b": 2.0}
    steps = [minibatch(by_task, weights, 4, step, (3, 1)) for step in range(9)]
    assert minibatch(by_task, weights, 4, 8, (3, 1)) == steps[8]
    assert minibatch(by_task, weights, 4, 8, (4, 1)) != steps[8]


@given(items=st.integers(1, 60), most=st.integers(1, 9), workers=st.integers(1, 9))
def test_workers_share_a_step_in_as_few_rounds_as_its_jobs_allow(items, most, workers):
    size = items_of_job(items, most, workers)
    assert 1 <= size <= most
    rounds = math.ceil(items / most / workers)
    assert math.ceil(items / size) <= rounds * workers
    if size > 1:  # smaller jobs would be too many
        assert math.ceil(items / (size - 1)) > rounds * workers


def test_update_of_one_unit_is_adams_and_averages_the_path():
    generator = np.random.default_rng(0)
    weights = torch.tensor(generator.standard_normal((1, 3)), requires_grad=True)
    first = weights.detach().numpy().copy()
    state, path = first_state(first), []
    adam = torch.optim.Adam([weights], lr=0.1)
    for step in range(1, 9):
        gradient = generator.standard_normal((1, 3))
        weights.grad = torch.tensor(gradient)
        adam.step()
        state = update(state, gradient, step, 0.1)
        path.append(state[0])
    assert state[0] == pytest.approx(weights.detach().numpy(), rel=1e-6)
    lowest, highest = np.min(path, axis=0), np.max([*path, first], axis=0)
    assert (np.minimum(lowest, first) <= state[3]).all()
    assert (state[3] <= highest).all()
    assert not np.allclose(state[3], state[0])


def test_weights_decay_towards_their_donors_mean():
    weights = np.array([[0.0, 1.0], [1.0, 3.0]])
    after = update(first_state(weights), np.zeros((2, 2)), 1, 0.1)[0]
    assert after.mean(axis=0) == pytest.approx(weights.mean(axis=0))
    assert np.ptp(after, axis=0) == pytest.approx(np.ptp(weights, axis=0) * (1 - 0.1 * DECAY))
