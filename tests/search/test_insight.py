"""The surrogate's posterior: which method is best, and which parameters matter."""

import numpy as np
import optuna
import pytest

from search.proposing.insight import PosteriorView, method_chances, sensitivity
from search.proposing.space import Space
from search.racing.race import Estimate
from search.storing.trials import TrialRecord

SPACE = Space("base", ("a", "b"), ("task_arithmetic", "ties"), (0.0, 1.0), {"density": (0.1, 1.0)})


@pytest.fixture(scope="module")
def view():
    """After trials of which the scale alone decides, and ties are worse."""
    generator, trials = np.random.default_rng(0), []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(60):
        point = study.ask(SPACE.distributions).params
        worse = 0.2 * (point["method"] == "ties")
        value = 0.9 - (point["scale"] - 0.5) ** 2 - worse + 0.01 * generator.standard_normal()
        estimate = Estimate(float(value), 1e-4)
        trials.append(TrialRecord(number, "complete", point, estimate=estimate))
    return PosteriorView(SPACE, trials)


def test_better_method_has_a_high_probability_of_being_best(view):
    first, second = method_chances(view)
    assert first.method == "task_arithmetic"
    assert first.chance > 0.99
    assert first.chance + second.chance == pytest.approx(1.0)
    assert second.best.mean == pytest.approx(70, abs=second.best.side + 1)
    assert view.best.trial == first.best.trial


def test_sensitivity_is_that_to_the_parameters_that_matter(view):
    effects = sensitivity(view)
    assert [name for name, _ in effects[:2]] == ["method", "scale"]
    assert effects[0][1] == pytest.approx(0.64, abs=0.2)  # of methods 0.01, of scales 1 / 180
    assert all(effect < 0.05 for _, effect in effects[2:])
