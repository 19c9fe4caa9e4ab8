"""Early stopping: a search ends when no gain is left that the select split could resolve."""

from landscape import planted
from proposals import StudySampler
from search.proposing.proposal import RANDOM_STARTUP
from search.proposing.recipes import to_recipe
from search.proposing.starts import warm_starts
from search.proposing.stopping import PATIENCE, WINDOW, has_stalled, should_stop
from search.racing.race import Estimate
from search.storing.trials import TrialRecord

LANDSCAPE = planted(1)
STARTS = warm_starts(LANDSCAPE.space)
ITEMS = 240
MOST = 100


def true_values(share):
    """True values of the recipes of a search whose estimates are that share of them.

    Their variance is that of 240 items, on which recipes 2 points apart can be told from noise.
    """
    sampler, values = StudySampler("gp", LANDSCAPE.space, 0), []
    while len(values) < MOST and not should_stop(sampler.log.complete(), ITEMS):
        values.append(LANDSCAPE.truth(to_recipe(LANDSCAPE.space, sampler.ask())))
        sampler.tell(Estimate(share * values[-1], 0.02**2), items=ITEMS)
    return values


def test_search_goes_on_until_the_best_is_found():
    values = true_values(1.0)
    assert len(values) < MOST
    assert max(values) > LANDSCAPE.best - 0.005


def test_search_for_gains_below_the_noise_stops_at_once():
    assert len(true_values(0.01)) == len(STARTS) + RANDOM_STARTUP + WINDOW


def finished(*values):
    """Complete trials with these values, the first a point of a path, the others proposed."""
    return [
        TrialRecord(
            number,
            "complete",
            estimate=Estimate(value, 0.02**2),
            items=ITEMS,
            expected_improvement=0.01 if number else None,
        )
        for number, value in enumerate(values)
    ]


def test_search_around_tuned_weights_stops_when_no_proposal_gains():
    worse = [0.6] * PATIENCE
    assert has_stalled(finished(0.8, *worse), ITEMS, since=0)
    assert not has_stalled(finished(0.8, *worse[1:]), ITEMS, since=0)
    assert not has_stalled(finished(0.8, *worse[1:], 0.85), ITEMS, since=0)
    assert not has_stalled(finished(0.8, *worse), ITEMS, since=2)  # a path has ended since
