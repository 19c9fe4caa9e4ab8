"""The live view: a fact a line, whatever the width."""

import os

import pytest
from rich.console import Console

from search.racing.race import Estimate
from search.running.events import TrialProgress
from search.showing.live_view import View, render
from search.showing.progress import Progress
from search.storing.trials import TrialRecord

BEST = TrialRecord(
    number=9,
    state="complete",
    point={"method": "ties", "scale": 0.75},
    estimate=Estimate(0.8831, 0.01),
    items=20,
    tasks={"demo_sort": Estimate(0.9, 0.1), "demo_know\x1b[2J": Estimate(0.5, 0.1)},
)
VIEW = View(
    Progress(total=100, done=23, evaluations=9780),
    incumbent=BEST,
    posterior_mean=0.871,
    racing=(TrialProgress(23, "dare_linear", 3, 12, Estimate(-0.021, 0.0361**2)),),
    left=200.0,
    memory="3 MiB for the live model",
)


def lines_of(view, width=80):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(render(view))
        return console.export_text().splitlines()


def test_view_has_the_trials_the_incumbent_and_the_race():
    text = "\n".join(lines_of(VIEW))
    assert "trial 23 of at most 100" in text
    assert "about 3 min left" in text
    assert "posterior mean 87.1 %, estimate 88.3 %, trial 9, ties at scale 0.75" in text
    assert "sort 90.0" in text
    assert "\x1b" not in text
    assert "trial 23  3 of 12 blocks  lead -2.1 ± 3.6 over the best  dare_linear" in text
    assert "9,780 evaluations" in text
    assert "3 MiB for the live model" in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_each_fact_is_one_line_that_fits(width):
    lines = lines_of(VIEW, width)
    assert max(map(len, lines)) <= min(width, 80)
    assert len([line for line in lines if line.strip()]) == (6 if width >= 40 else 7)


def test_of_many_trials_in_the_race_four_are_shown():
    many = tuple(TrialProgress(number, "ties", 0, 12, None) for number in range(7))
    text = "\n".join(lines_of(View(Progress(total=100), racing=many)))
    assert "trial 3" in text
    assert "trial 4" not in text
    assert "and 3 more" in text
