"""Ranges that the study does not give are widened where the best lies at their edge."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from landscape import planted
from proposals import StudySampler
from search.proposing.edges import edges, widen_at_edges, widen_to, widest
from search.proposing.recipes import to_recipe
from search.proposing.starts import warm_starts
from search.racing.race import Estimate
from search.running.conclusion import conclude
from search.running.search_loop import search
from search.showing.tables import print_result
from simulated import simulated_context, simulated_run
from spaces import small_space

ALL = frozenset({"scale", "density"})


def at(scale: float, density: float = 0.5, method: str = "ties"):
    return {"method": method, "scale": scale, "mix_1": 0.3, "mix_2": 0.5, "density": density}


@pytest.mark.parametrize(
    ("point", "found"),
    [
        (at(0.7), {}),
        (at(1.48), {"scale": (0.0, 2.25)}),
        (at(0.0), {}),  # no weight is below zero
        (at(0.7, 1.0), {}),  # nor a density above one
        (at(0.7, 0.12), {"density": (0.05, 1.0)}),
        (at(0.7, 0.12, "task_arithmetic"), {}),  # it has no density
        (at(1.5, method="linear"), {}),  # its result does not depend on the scale
    ],
)
def test_edges_are_those_of_parameters_that_matter_with_legal_values_beyond(point, found):
    assert {edge.name: edge.wider for edge in edges(small_space(), point)} == found


def test_a_range_that_is_given_stays():
    space, point = small_space(), at(1.5, 0.1)
    assert widen_at_edges(space, point) == widen_to(space, [at(3.0)]) == widest(space) == space
    half = small_space(widenable=frozenset({"scale"}))
    assert widen_at_edges(half, point) == small_space(widenable=half.widenable, scale=(0.0, 2.25))


@given(st.lists(st.floats(0, 1), max_size=30))
def test_no_limit_is_crossed_however_often_a_range_is_widened(shares):
    space = small_space(widenable=ALL)
    limit = widest(space)
    for share in shares:
        low, high = space.ranges["density"]
        space = widen_at_edges(space, at(space.scale[1] * share, low + (high - low) * share))
        assert 0 < space.ranges["density"][0] <= space.ranges["density"][1] == 1
        assert space.scale[0] == 0
        assert limit.contains(at(min(space.scale[1], 100), low))


@pytest.mark.parametrize("defaults", [frozenset(), frozenset({"scale"})])
def test_the_best_beyond_a_default_range_is_found_and_only_there(defaults):
    landscape = planted(1)
    space = small_space(
        donors=landscape.space.donors,
        methods=landscape.space.methods,
        scale=(0.0, 0.3),
        widenable=defaults,
    )
    sampler, scales, values = StudySampler("gp", space, 0), [], []
    for _ in range(len(warm_starts(space)) + 25):
        point = sampler.ask()
        values.append(landscape.truth(to_recipe(space, point)))
        scales.append(point["scale"])
        sampler.tell(Estimate(values[-1], 1e-6))
    assert (max(scales) > 0.5) == (max(values) > landscape.best - 0.02) == bool(defaults)


def test_a_winner_at_the_edge_of_a_given_range_is_told_with_what_to_write(tmp_path):
    landscape = planted(1)
    context = simulated_context(
        landscape, 0, {"search": 60, "select": 60, "test": 60}, search={"trials": 12}
    )
    narrow = small_space(
        donors=landscape.space.donors, methods=landscape.space.methods, scale=(0.0, 0.2)
    )
    run = simulated_run(tmp_path / "run", replace(context, space=narrow))
    search(run)
    result, _ = conclude(run)
    (edge,) = [each for each in result.edges if each.name == "scale"]
    assert edge.wider == (0.0, pytest.approx(0.3))
    with io.StringIO() as file:
        print_result(Console(file=file, width=200), result, tmp_path)
        text = " ".join(file.getvalue().split())
    assert "Write `scale: [0, 0.3]` under `search` in study.yaml" in text
