"""Every sampler proposes what the finished trials say, whoever asks, and keeps its own promise."""

import numpy as np
import optuna
import pytest
from optuna.trial import Trial

from search.proposing.samplers import RANDOM_STARTUP, make_sampler
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.storing.store import Store
from search.study.sampler_table import SAMPLERS

SPACE = Space("base", ("a", "b"), ("task_arithmetic", "ties"), (0.0, 1.0), {"density": (0.1, 1.0)})
STARTS = len(warm_starts(SPACE))


def asked(name, count, killed=False, database=None):
    """Params of ``count`` trials.

    Args:
        name: Of the sampler.
        count: Of trials.
        killed: Each trial was at work when its process died.
        database: Where the study is; for the last four trials it is opened again.
    """
    study = optuna.create_study(direction="maximize") if database is None else opened(database)
    for _, point in warm_starts(SPACE):
        study.enqueue_trial(point)
    for number in range(count):
        if database and number == count - 4:
            study = opened(database)
        study.sampler = make_sampler(name, SPACE, 3, number)
        trial = study.ask()
        if killed:
            study.sampler = make_sampler(name, SPACE, 3, number)
            trial = Trial(study, trial._trial_id)
        for parameter, distribution in SPACE.distributions.items():
            trial._suggest(parameter, distribution)
        study.tell(trial, trial.params["scale"] - trial.params["mix_1"] ** 2)
    return [trial.params for trial in study.trials]


def opened(database):
    return Store(database).study()


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {"auto"}))
def test_killed_trial_is_proposed_again(name):
    count = STARTS + RANDOM_STARTUP + 12
    points = asked(name, count)
    assert points == asked(name, count, killed=True)
    assert all(SPACE.contains(point) for point in points)


@pytest.mark.parametrize("name", ["cmaes"])
def test_what_a_strategy_has_learned_is_in_the_database(name, tmp_path):
    count = STARTS + 14
    assert asked(name, count, database=tmp_path / "study.db") == asked(name, count)


@pytest.mark.parametrize("name", ["gp", "tpe", "cmaes", "catcma", "nsga2", "nsga3"])
def test_models_of_the_trials_beat_chance(name):
    late = {
        name: np.mean([p["scale"] - p["mix_1"] ** 2 for p in asked(name, STARTS + 80)[-20:]])
        for name in (name, "random")
    }
    assert late[name] > late["random"] + 0.2


def test_grid_is_an_even_curve_of_each_method():
    points = asked("grid", STARTS + 18)[STARTS:]
    for method in SPACE.methods:
        scales = sorted(point["scale"] for point in points if point["method"] == method)
        assert scales == pytest.approx(np.linspace(0, 1, 9))
    assert {(w[0] - w[1]) for [w] in SPACE.weights(points).tolist()} == {0.0}


def test_sobol_spreads_evenly_where_random_does_not():
    def cells(name):
        points = asked(name, STARTS + 64)[STARTS:]
        return {(p["method"], int(p["scale"] * 4), int(p["mix_1"] * 4)) for p in points}

    assert len(cells("random")) < len(cells("sobol")) == 32
