"""The landscapes that searches are measured on: truths, items and the surrogate of a table."""

import numpy as np
import pytest

from landscape import LANDSCAPES, Tabulated, coordinates, demo, planted
from search.proposing.recipes import to_recipe
from search.proposing.starts import baselines


def some_recipes(landscape, count):
    generator = np.random.default_rng(0)
    space = landscape.space
    return [
        to_recipe(
            space,
            space.point(
                generator.choice(space.methods), tuple(generator.uniform(0.2, 1.5, 3)), density=0.7
            ),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def table() -> Tabulated:
    return demo(0)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_truth_is_the_mean_over_items_that_are_drawn(name):
    landscape = LANDSCAPES[name](3)
    items = landscape.draw(20_000, np.random.default_rng(0))
    for recipe in some_recipes(landscape, 4):
        assert items.answers(recipe).mean() == pytest.approx(landscape.truth(recipe), abs=0.015)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_no_recipe_is_better_than_the_best(name):
    landscape = LANDSCAPES[name](3)
    values = [landscape.truth(recipe) for recipe in some_recipes(landscape, 60)]
    assert max(values) <= landscape.best


def test_best_recipe_of_a_planted_landscape_is_in_its_space():
    for seed in range(20):
        landscape = planted(seed)
        method = max(landscape.heights, key=landscape.heights.get)
        *weights, density = (*landscape.centres[method], 1.0)[:4]
        point = landscape.space.point(method, weights, density=density)
        assert landscape.space.contains(point)
        assert landscape.truth(to_recipe(landscape.space, point)) == pytest.approx(landscape.best)


def test_near_recipes_correlate_more_than_far_ones():
    landscape = planted(0)
    items = landscape.draw(20_000, np.random.default_rng(0))

    def answers(*weights):
        return items.answers(to_recipe(landscape.space, landscape.space.point("ties", weights)))

    here, near, far = answers(0.7, 0.7, 0.7), answers(0.71, 0.7, 0.7), answers(1.2, 0.2, 0.7)
    assert np.corrcoef(here, near)[0, 1] > np.corrcoef(here, far)[0, 1] > 0.5


@pytest.mark.parametrize("seed", range(5))
def test_nothing_beats_the_best_donor_of_a_null_landscape(seed):
    for name in ("null_donor", "null_flat"):
        landscape = LANDSCAPES[name](seed)
        donors = [landscape.truth(recipe) for recipe in baselines(landscape.space).values()]
        assert max(donors) == pytest.approx(landscape.best)


def test_recipes_of_the_table_have_their_tabulated_scores(table):
    for recipe, answers in list(zip(table.recipes, table.table, strict=True))[::20]:
        assert (table.answers(recipe) == answers).all()
    assert {r.key for r in baselines(table.space).values()} <= {r.key for r in table.recipes}


def test_surrogate_predicts_good_recipes_that_it_was_not_fitted_to(table):
    values, held_out = table.table @ table.item_weights, table.held_out() @ table.item_weights
    good = values >= np.sort(values)[-50]
    error = held_out[good] - values[good]
    assert abs(error.mean()) < 0.01
    assert (error**2).mean() ** 0.5 < 0.04
    assert np.corrcoef(values, held_out)[0, 1] > 0.95


def test_recipes_that_merge_alike_have_equal_coordinates(table):
    space = table.space
    average = to_recipe(space, space.point("linear", (1.0, 1.0, 1.0)))
    sums = to_recipe(space, space.point("task_arithmetic", (1 / 3, 1 / 3, 1 / 3)))
    assert coordinates(space, average) == pytest.approx(coordinates(space, sums), abs=1e-5)


def test_items_are_dealt_to_the_tasks_by_weight_in_every_part_of_their_order(table):
    tasks = np.array(table.draw(240, np.random.default_rng(0)).tasks)
    for task in table.weights:
        for start in range(0, 200, 40):
            assert 8 <= (tasks[start : start + 40] == task).sum() <= 12
