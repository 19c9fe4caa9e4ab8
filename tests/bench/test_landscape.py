"""The landscapes that searches are measured on are true, and replayed searches are as real ones."""

import numpy as np
import pytest

from landscape import LANDSCAPES, Tabulated, coordinates, demo, null_flat, planted
from replay import (
    COUNTS,
    Elected,
    FixedItems,
    FreshItems,
    LuckyMaximum,
    Raced,
    Replay,
    StudySampler,
    System,
    run,
)
from search.proposing.recipes import to_recipe
from search.proposing.starts import baselines
from search.racing.race import Race


def auto(space, seed):
    return StudySampler("auto", space, seed)


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


def test_near_recipes_answer_more_alike_than_far_ones():
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


def test_table_answers_what_was_tabulated(table):
    for recipe, answers in list(zip(table.recipes, table.table, strict=True))[::20]:
        assert (table.answers(recipe) == answers).all()
    assert {r.key for r in baselines(table.space).values()} <= {r.key for r in table.recipes}


def test_surrogate_is_right_about_good_recipes_it_has_not_seen(table):
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


def test_estimate_of_a_stopped_candidate_is_right_on_average():
    landscape = planted(0)
    one, other = some_recipes(landscape, 2)
    errors, claimed = [], []
    for seed in range(200):
        replay = Replay(landscape, seed)
        race = Race(replay.strata["search"])
        race.record(replay.evaluate(replay.candidate(other), COUNTS["search"]))
        everything = replay.estimate(replay.answers(replay.candidate(one), "search"))
        estimate = race.record(replay.evaluate(replay.candidate(one), 60))
        errors.append(estimate.value - everything.value)
        claimed.append(estimate.variance * (1 - 60 / COUNTS["search"]))
    assert abs(np.mean(errors)) < 3 * (np.mean(claimed) / 200) ** 0.5
    assert np.mean(np.square(errors)) == pytest.approx(np.mean(claimed), rel=0.35)


def test_items_are_paid_for_once():
    landscape = planted(0)
    replay = Replay(landscape, 0)
    candidate = replay.candidate(some_recipes(landscape, 1)[0])
    replay.evaluate(candidate, 60)
    replay.evaluate(candidate, 40)
    replay.evaluate(replay.candidate(candidate.recipe), 100)
    assert replay.evaluations == 100


def test_same_seed_replays_the_same_run():
    system = System(auto, Raced, Elected())
    first, again = (run(system, planted(1), 1, [6000])[0] for _ in range(2))
    assert first == again


def test_racing_tries_more_recipes_within_the_same_budget():
    raced, fixed = (
        run(System(auto, racer, LuckyMaximum()), planted(1), 1, [10_000])[0].recipes
        for racer in (Raced, FixedItems)
    )
    assert raced > 1.5 * fixed


def test_election_keeps_to_its_share_and_is_no_part_of_the_search():
    ends = run(System(auto, Raced, Elected()), planted(1), 1, [3000, 6000])
    (alone,) = run(System(auto, Raced, Elected()), planted(1), 1, [6000])
    assert ends[-1] == alone
    assert all(end.export.evaluations <= 0.2 * end.evaluations for end in ends)


def test_lucky_maximum_claims_more_than_fresh_items_do():
    claims = {}
    for selector in (LuckyMaximum(), FreshItems()):
        system = System(auto, FixedItems, selector)
        ends = [run(system, null_flat(seed), seed, [8000])[0] for seed in range(8)]
        claims[selector] = np.mean([end.export.reported.mean for end in ends]) - 0.6
    lucky, fresh = claims.values()
    assert lucky > fresh + 0.01
