"""Every sampler's proposals depend on the finished trials alone, and keep its own promise."""

import numpy as np
import optuna
import pytest

from proposals import StudySampler
from search.proposing.proposal import RANDOM_STARTUP
from search.proposing.recipes import to_recipe
from search.proposing.samplers import Proposer, load_sampler
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.racing.race import Estimate
from search.storing.store import Store
from search.storing.trials import TrialLog
from search.study.sampler_table import SAMPLERS
from search.study.spec import StudyError

SPACE = Space("base", ("a", "b"), ("task_arithmetic", "ties"), (0.0, 1.0), {"density": (0.1, 1.0)})
STARTS = len(warm_starts(SPACE))


def proposed(name, count, killed=False, database=None):
    """Points of ``count`` trials.

    Args:
        name: Of the sampler.
        count: Of trials.
        killed: The process dies as every trial opens, and another one takes it up.
        database: Where the study is; for the last four trials it is opened again.
    """
    study = Store(database).study() if database else optuna.create_study(direction="maximize")
    log = TrialLog(study)
    for label, point in warm_starts(SPACE):
        log.enqueue(point, start=label)
    points = []
    for number in range(count):
        if database and number == count - 4:
            log = TrialLog(Store(database).study())
        if killed:
            die_once(study, name)
        trial = Proposer(name, SPACE, 3).ask(log)
        points.append(trial.point)
        value = trial.point["scale"] - trial.point["mix_1"] ** 2
        trial.tell(Estimate(value, 0.001), {}, items=20, order=number)
    return points


def die_once(study, name):
    """Begin a trial whose parameters are never stored."""

    class Dying(TrialLog):
        def open(self, distributions, *, left=None, sampler=None):
            study.sampler = sampler or study.sampler
            study.ask()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Proposer(name, SPACE, 3).ask(Dying(study))


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {"auto"}))
def test_killed_trial_is_proposed_again(name):
    count = STARTS + RANDOM_STARTUP + 12
    points = proposed(name, count)
    assert points == proposed(name, count, killed=True)
    assert all(SPACE.contains(point) for point in points)


def test_state_of_cmaes_is_in_the_database(tmp_path):
    count = STARTS + 14
    assert proposed("cmaes", count, database=tmp_path / "study.db") == proposed("cmaes", count)


@pytest.mark.parametrize("name", ["gp", "tpe", "cmaes", "nsga2", "optuna.samplers:TPESampler"])
def test_samplers_that_learn_beat_random_points(name):
    late = {
        name: np.mean([p["scale"] - p["mix_1"] ** 2 for p in proposed(name, STARTS + 80)[-20:]])
        for name in (name, "random")
    }
    assert late[name] > late["random"] + 0.2


def test_grid_is_an_even_curve_of_each_method():
    points = proposed("grid", STARTS + 18)[STARTS:]
    for method in SPACE.methods:
        scales = sorted(point["scale"] for point in points if point["method"] == method)
        assert scales == pytest.approx(np.linspace(0, 1, 9))
    assert {(w[0] - w[1]) for [w] in SPACE.weights(points).tolist()} == {0.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.to:Find", "No module named 'nowhere'; install it"),
        ("optuna.samplers:Oracle", "has no attribute 'Oracle'"),
        ("optuna.study:Study", "is not a subclass of optuna.samplers.BaseSampler"),
    ],
)
def test_sampler_class_that_cannot_be_used_is_refused(name, message):
    with pytest.raises(StudyError, match=message):
        load_sampler(name)


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {"auto", "grid"}))
def test_recipes_of_a_pool_use_at_most_the_donors_they_may(name):
    donors = tuple(f"donor {number}" for number in range(20))
    methods = ("task_arithmetic", "ties", "linear", "slerp", "model_stock", "karcher")
    space = Space("base", donors, methods, (0.0, 1.5), {"density": (0.1, 1.0)}, at_most=3)
    sampler = StudySampler(name, space, 0)
    used = []
    for _ in range(len(warm_starts(space)) + RANDOM_STARTUP + 10):
        recipe = to_recipe(space, sampler.ask())
        inputs = [source.model for source in recipe.donors if source.model != "base"]
        used.append(len(inputs) + (recipe.merge_method == "slerp"))
        weight = recipe.values("x", 0.0).get("weight", ())
        sampler.tell(Estimate(float(sum(weight)), 0.001))
    assert max(used) == 3
