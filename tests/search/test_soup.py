"""A greedy soup adds the donors that improve it, one trial each, and goes on after a kill."""

import optuna
import pytest

from search.proposing.recipes import to_recipe
from search.proposing.samplers import Proposer
from search.proposing.soup import SOUP_PREFIX
from search.proposing.starts import warm_starts
from search.racing.race import Estimate
from search.storing.trials import TrialLog
from spaces import small_space

# Values of uniform averages: b alone, then with c worse, then with a better, with d worse again.
VALUES = {"b": 0.5, "bc": 0.4, "ab": 0.6, "abd": 0.55}
RANKING = [1, 2, 0, 3]
SPACE = small_space(donors=("a", "b", "c", "d"), methods=("task_arithmetic",), ranges={})


def soup_of(space, *, killed=False, trials=12):
    """Tell so many trials; return the donors of each step of the soup, as letters."""
    log, steps = TrialLog(optuna.create_study(direction="maximize")), []
    for number in range(trials):
        proposer = Proposer("random", space, 0, ranking=RANKING)
        trial = proposer.ask(log)
        if killed:  # after the trial was opened
            trial = Proposer("random", space, 0, ranking=RANKING).ask(log)
        recipe = to_recipe(space, trial.point)
        trial.set_recipe(recipe.key)
        weights = space.weights([trial.point])[0, 0]
        used = "".join(donor for donor, weight in zip(space.donors, weights, strict=True) if weight)
        label = log.records()[trial.number].start
        if label and label.startswith(SOUP_PREFIX):
            steps.append(used)
        value = VALUES.get(used, 0.0)
        trial.tell(Estimate(value, 1e-4), {}, items=20, order=number)
    return steps


def test_a_donor_stays_in_the_soup_where_the_average_is_no_worse():
    assert soup_of(SPACE) == ["b", "bc", "ab"]


@pytest.mark.parametrize("trials", [2, 3, 12])
def test_a_killed_soup_goes_on_with_the_same_step(trials):
    assert soup_of(SPACE, killed=True, trials=trials) == soup_of(SPACE, trials=trials)


def test_a_soup_has_no_more_donors_than_a_recipe_may_use_and_no_more_steps_than_its_share():
    assert soup_of(small_space(**vars_of(SPACE), at_most=1)) == ["b"]
    assert soup_of(small_space(**vars_of(SPACE), most_starts=6)) == ["b", "bc"]


def vars_of(space):
    return {"donors": space.donors, "methods": space.methods, "ranges": space.ranges}


def test_donors_and_averages_that_were_tried_are_not_tried_again():
    log = TrialLog(optuna.create_study(direction="maximize"))
    for label, point in warm_starts(SPACE, RANKING):
        log.enqueue(point, start=label)
    steps = []
    for number in range(25):
        trial = Proposer("random", SPACE, 0, ranking=RANKING).ask(log)
        key = to_recipe(SPACE, trial.point).key
        label = log.records()[trial.number].start or ""
        if label.startswith(SOUP_PREFIX):
            assert key not in {record.recipe for record in log.records()}
            steps.append(label)
        trial.set_recipe(key)
        weights = SPACE.weights([trial.point])[0, 0]
        used = "".join(d for d, weight in zip(SPACE.donors, weights, strict=True) if weight)
        trial.tell(Estimate(VALUES.get(used, 0.0), 1e-4), {}, items=20, order=number)
    assert steps == ["soup + c", "soup + a"]  # abd is an average that leaves one donor out
