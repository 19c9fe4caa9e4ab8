"""A search stops when nothing is left to gain that could be told, and goes on while there is."""

import optuna

from landscape import planted
from search.proposing.recipes import to_recipe
from search.proposing.samplers import RANDOM_STARTUP, make_sampler
from search.proposing.starts import warm_starts
from search.proposing.stopping import LAST, exhausted
from search.storing.trials import TrialLog

LANDSCAPE = planted(1)
STARTS = warm_starts(LANDSCAPE.space)
ITEMS = 240
MOST = 100


def stopped(share):
    """True values of the recipes of a search that is told that share of their differences.

    It is told that these are of 240 items, which tell recipes apart by 2 points.
    """
    space, values = LANDSCAPE.space, []
    study = optuna.create_study(direction="maximize")
    for _, point in STARTS:
        study.enqueue_trial(point)
    while len(values) < MOST and not exhausted(TrialLog(study).complete(), ITEMS):
        study.sampler = make_sampler("gp", space, 0, len(values))
        trial = study.ask(space.distributions)
        trial.set_user_attr("variance", 0.02**2)
        trial.set_user_attr("items", ITEMS)
        values.append(LANDSCAPE.truth(to_recipe(space, trial.params)))
        study.tell(trial, share * values[-1])
    return values


def test_search_goes_on_until_the_best_is_found():
    values = stopped(1.0)
    assert len(values) < MOST
    assert max(values) > LANDSCAPE.best - 0.005


def test_search_for_gains_that_nobody_could_tell_stops_at_once():
    assert len(stopped(0.01)) == len(STARTS) + RANDOM_STARTUP + LAST
