"""Charts of very many trials."""

import numpy as np

from search.racing.race import Estimate
from search.showing.charts import thinned
from search.storing.trials import TrialRecord


def test_best_of_many_trials_and_some_others_are_drawn_in_their_order():
    values = np.random.default_rng(0).permutation(60) / 60
    trials = [
        TrialRecord(number, "complete", estimate=Estimate(float(value), 1e-4))
        for number, value in enumerate(values)
    ]
    some = thinned(trials, 20)
    assert 15 <= len(some) <= 20
    assert [trial.number for trial in some] == sorted(trial.number for trial in some)
    assert {*sorted(values)[-10:]} <= {trial.value for trial in some}
    assert min(trial.value for trial in some) < np.median(values)
