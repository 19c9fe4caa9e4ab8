"""Pareto fronts of several tasks, and the search for one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from proposals import StudySampler
from search.proposing.gp import posterior_of
from search.proposing.space import Space
from search.racing.elimination import JointPosterior
from search.racing.pareto import (
    confirmed,
    largest_hypervolume,
    leading,
    nondominated,
    posterior_front,
)
from search.racing.race import Estimate, Strata

SPACE = Space("base", ("a", "b"), ("task_arithmetic",), (0.0, 1.0), {})


@given(arrays(float, (12, 3), elements=st.integers(0, 4)))
def test_front_is_the_nondominated_rows(values):
    front = nondominated(values)
    for index, row in enumerate(values):
        dominated = any((o >= row).all() and (o > row).any() for o in values)
        assert (index in front) != dominated


def test_widest_rows_cover_nearly_the_hypervolume_of_all():
    x = np.linspace(0, 1, 60)
    arc = np.stack([np.cos(x * np.pi / 2), np.sin(x * np.pi / 2)], axis=1)
    kept = largest_hypervolume(arc, 12)
    assert len(kept) == len(set(kept)) == 12
    points = np.random.default_rng(0).random((2000, 2))
    covered, whole = (
        (points[:, None] <= some[None]).all(axis=2).any(axis=1).mean() for some in (arc[kept], arc)
    )
    assert covered > 0.93 * whole
    assert largest_hypervolume(arc[:5], 9) == [0, 1, 2, 3, 4]


@given(arrays(float, (12, 3), elements=st.integers(0, 4)), st.integers(3, 15))
def test_leading_rows_include_the_best_of_each_task(values, most):
    kept = leading(values, most)
    assert kept == sorted(set(kept))
    assert len(kept) == min(most, 12)
    assert (values[kept].max(axis=0) == values.max(axis=0)).all()


def values_at(scale):
    """Return the scores of a point on two tasks, best at either end."""
    return {"x": [1 - (scale - 0.2) ** 2, 1e-6], "y": [1 - (scale - 0.8) ** 2, 1e-6]}


def searched(front, count=40):
    """List the scales that a study proposes after its warm starts."""
    sampler, scales = StudySampler("gp", SPACE, 0, front=front), []
    for _ in range(count):
        scales.append(sampler.ask()["scale"])
        tasks = {task: Estimate(*pair) for task, pair in values_at(scales[-1]).items()}
        sampler.tell(Estimate((tasks["x"].value + tasks["y"].value) / 2, 1e-6), tasks)
    return np.array(scales[-20:])


def test_search_for_the_front_proposes_all_along_it_and_for_the_mean_near_one_point():
    along, at_once = searched(front=True), searched(front=False)
    inside = along[(along > 0.15) & (along < 0.85)]
    assert len(inside) > 14
    assert np.ptp(inside) > 0.4
    assert len({int(10 * scale) for scale in inside}) >= 4
    assert np.median(np.abs(at_once - 0.5)) < 0.1


def test_front_is_that_of_posterior_means_and_fresh_items_correct_it():
    scales = np.linspace(0, 1, 11)
    points = [SPACE.point("task_arithmetic", (scale, scale)) for scale in scales]
    estimates = {t: np.array([values_at(scale)[t] for scale in scales]) for t in ("x", "y")}
    posteriors = {task: posterior_of(SPACE, points, *of.T) for task, of in estimates.items()}
    front = posterior_front(posteriors, most=20)
    of_front = {task: posterior[front] for task, posterior in posteriors.items()}
    assert scales[front] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    unsure = {task: JointPosterior(one.means, np.eye(len(front))) for task, one in of_front.items()}
    strata = Strata(("x", "y") * 50, {"x": 1.0, "y": 1.0})
    answers = np.zeros((len(front), 100))
    answers[2] = 1.0  # the third is right wherever the others are wrong
    assert confirmed(unsure, strata, answers) == [2]
