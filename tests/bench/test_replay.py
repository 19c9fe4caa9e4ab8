"""Replays: budgets, shares and what selectors report."""

import numpy as np
import pytest

from landscape import null_flat, planted
from replay import FreshItems, LuckyMaximum, System, replay, select, watch


def test_same_seed_replays_the_same_run():
    first, again = (replay(System(), planted(1), 1, [3000]) for _ in range(2))
    assert first == again


def test_racing_tries_more_recipes_within_the_same_budget():
    raced, fixed = (
        replay(System("random", LuckyMaximum(), raced=raced), planted(1), 1, [4000])[0].recipes
        for raced in (True, False)
    )
    assert raced > 1.5 * fixed


def test_conclusion_keeps_to_its_share_and_is_no_part_of_the_search():
    ends = replay(System(), planted(1), 1, [2500, 3500])
    (alone,) = replay(System(), planted(1), 1, [3500])
    assert ends[-1] == alone
    assert all(end.export.evaluations <= 0.2 * end.evaluations for end in ends)


def test_highest_mean_seen_overstates_and_fresh_items_do_not():
    claims = {LuckyMaximum(): [], FreshItems(): []}

    def goes_on(run):
        if len(run.log.complete()) < 16:
            return True
        for selector, means in claims.items():
            means.append(select(selector, run).reported.mean - 0.6)
        return False

    for seed in range(4):
        watch(System("random", raced=False), null_flat(seed), seed, goes_on)
    lucky, fresh = (float(np.mean(means)) for means in claims.values())
    assert lucky > fresh + 0.01
    assert fresh == pytest.approx(0.0, abs=0.03)


class OneWeight:
    """A rival that proposes one weight for all donors, larger each time."""

    def __init__(self, space, seed):
        self.space, self.asked, self.told = space, [], []

    def ask(self):
        weight = 0.1 + 0.01 * len(self.asked)
        point = self.space.point("task_arithmetic", (weight,) * len(self.space.donors))
        self.asked.append(point)
        return point

    def tell(self, trial):
        self.told.append(trial)


@pytest.mark.parametrize("raced", [True, False])
def test_a_rival_proposes_every_trial_and_is_told_its_own(raced):
    made, trials = [], []

    def make(space, seed):
        made.append(OneWeight(space, seed))
        return made[0]

    def goes_on(run):
        trials[:] = run.log.complete()
        return len(trials) < 5

    watch(System(make, LuckyMaximum(), raced=raced, baselines=False), planted(0), 0, goes_on)
    (rival,) = made
    assert [trial.start for trial in trials] == [None] * 5
    assert [trial.point for trial in trials] == rival.asked[:5]
    assert [trial.point for trial in rival.told] == rival.asked[: len(rival.told)]
    assert len(rival.told) >= 4
