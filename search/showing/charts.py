"""The charts of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Final, NamedTuple

import numpy as np
from markupsafe import Markup

from search.proposing.encoding import Candidates
from search.proposing.insight import HALF_WIDTH, PosteriorView
from search.racing.race import Floats
from search.showing.comparison import Row
from search.showing.facts import RunFacts, describe_trial
from search.showing.svg import Axis, Chart, IntervalRow, interval_chart
from search.storing.trials import TrialRecord

DRAWN: Final = 2000  # trials in a chart
MOMENTS: Final = 40  # at which the incumbent's posterior is computed
PAIRS: Final = 6  # of tasks, for which the Pareto front is drawn
NEGLIGIBLE: Final = 1e-9  # a difference of features due to rounding
COLOURS: Final = 8  # number of colours for methods in the style sheet


def colour(method: str, methods: Sequence[str]) -> str:
    """Return the class of a method's colour in the style sheet."""
    return f"m{methods.index(method) % COLOURS}"


def score_charts(columns: Sequence[str], rows: Sequence[Row]) -> list[Markup]:
    """Draw the test scores of all models, a chart for each column, on one axis."""
    scores = [
        [
            IntervalRow(
                row.name,
                100 * cell.score.mean,
                100 * cell.score.low,
                100 * cell.score.high,
                "chosen" if row.marked else "",
            )
            for cell in row.cells
            if cell
        ]
        for row in rows
    ]
    ends = [end for row in scores for score in row for end in (score.low, score.high)]
    axis = Axis.around("test score, %", ends)
    return [
        interval_chart(axis, [row[index] for row in scores], f"{column}: score on test")
        for index, column in enumerate(columns)
    ]


def front_charts(columns: Sequence[str], rows: Sequence[Row]) -> list[Markup]:
    """Draw the Pareto front, winner and baselines over pairs of tasks."""
    charts = []
    for one, other in list(combinations(range(1, len(columns)), 2))[:PAIRS]:
        points = [
            (row, 100 * first.score.mean, 100 * second.score.mean)
            for row in rows
            if (first := row.cells[one]) and (second := row.cells[other])
        ]
        chart = Chart(
            Axis.around(f"{columns[one]}, %", [x for _, x, _ in points]),
            Axis.around(f"{columns[other]}, %", [y for _, _, y in points]),
        )
        for row, x, y in points:
            kind = "chosen" if row.marked else ""
            chart.dot(x, y, f"{row.name}: {x:.1f}, {y:.1f}", kind, 4)
        charts.append(chart.svg(f"the Pareto front in {columns[one]} and {columns[other]}"))
    return charts


def progress_chart(facts: RunFacts, view: PosteriorView) -> Markup:
    """Draw the incumbent's posterior mean, with its 95 % band, over item evaluations."""
    counts = np.unique(np.linspace(3, len(view.trials), MOMENTS).astype(int))
    evaluations, means, sides = [], [], []
    for count in counts.tolist():
        posterior = view.after(count)
        best = int(np.argmax(posterior.feasible_means))
        data = posterior.data
        mean, deviation = posterior.values(data.x[[best]], data.method[[best]])
        evaluations.append(facts.evaluations[view.trials[count - 1].number])
        means.append(100 * float(mean[0]))
        sides.append(100 * HALF_WIDTH * float(deviation[0]))
    x, y, side = np.array(evaluations, dtype=float), np.array(means), np.array(sides)
    chart = Chart(
        Axis("item evaluations", 0, max(evaluations)),
        Axis.around("posterior mean, %", [*y, y.max() + side[-1], y.max() - side[-1]]),
    )
    chart.band(x, y - side, y + side, "chosen")
    chart.line(x, y, "chosen")
    return chart.svg("posterior mean of the best trial so far")


def trial_chart(facts: RunFacts) -> Markup:
    """Draw every trial's estimate, with its 95 % interval, over item evaluations."""
    trials = thinned(facts.complete, DRAWN)
    most = max(trial.items for trial in trials)
    end = max(facts.evaluations.values())
    chart = Chart(
        Axis("item evaluations", -0.02 * end, 1.02 * end),
        Axis.around("estimate, %", [100 * trial.value for trial in trials]),
    )
    for trial in trials:
        value, side = 100 * trial.value, 100 * HALF_WIDTH * trial.variance**0.5
        x = facts.evaluations[trial.number]
        kind = colour(trial.point["method"], facts.spec.search.methods)
        chart.upright(x, value - side, value + side, kind)
        infeasible = " infeasible" if trial.violation else ""
        title = f"{value:.1f} ± {side:.1f} %, {describe_trial(trial)}"
        chart.dot(x, value, title, f"{kind}{infeasible}", 2 + 2.5 * trial.items / most)
    for trial in facts.failed[:DRAWN]:
        title = f"failed: {describe_trial(trial)}: {trial.error}"
        chart.dot(facts.evaluations[trial.number], chart.y.low, title, "failed", 5)
    return chart.svg("every trial's estimate")


def thinned(complete: Sequence[TrialRecord], most: int) -> list[TrialRecord]:
    """Thin many trials to ``most``: half of them the best, half a sample of the others."""
    if len(complete) <= most:
        return [*complete]
    ranked = sorted(range(len(complete)), key=lambda index: complete[index].sort_key)
    best, others = ranked[: most // 2], ranked[most // 2 :]
    step = -(-len(others) // (most // 2))
    return [complete[index] for index in sorted([*best, *others[::step]])]


class ScaleCharts(NamedTuple):
    """The response to the scale of each method that has one, around one trial."""

    trial: int
    charts: Mapping[str, Markup]


def scale_charts(facts: RunFacts, view: PosteriorView) -> ScaleCharts | None:
    """Draw the posterior over the scale, all else as in the winner or the best trial so far."""
    centre = view.best.trial
    if facts.result:
        winner = facts.result.winner.trial
        centre = next(trial for trial in facts.complete if trial.number == winner)
    one, (low, high) = view.encoding.candidates([centre.point]), view.space.scale
    scales = np.linspace(low, high, 61)
    curves = _posterior_over_scale(view, one, scales)
    if not curves:
        return None
    y = Axis.around("value, %", np.concatenate([values for values, _ in curves.values()]))
    charts = {}
    for number, (values, deviations) in curves.items():
        method = facts.space.methods[number]
        kind = colour(method, facts.spec.search.methods)
        chart, side = Chart(Axis("scale", low, high), y, height=170), HALF_WIDTH * deviations
        chart.band(scales, values - side, values + side, kind)
        chart.line(scales, values, kind)
        tried = _mean_scales(view, view.tried[view.tried.method == number])
        for scale in tried.tolist():
            chart.upright(scale, y.low, y.low + 0.05 * (y.high - y.low), kind)
        if number == one.method[0]:
            scale, value = float(_mean_scales(view, one)[0]), float(view.values(one)[0][0])
            chart.dot(scale, value, describe_trial(centre), "chosen", 4)
        charts[method] = chart.svg(f"value of {method} over the scale")
    return ScaleCharts(centre.number, charts)


def _mean_scales(view: PosteriorView, some: Candidates) -> Floats:
    """Return n candidates' scales, averaged over the units of the model, (n)."""
    scales: Floats = some.weights.sum(axis=2).mean(axis=1) / view.space.used
    return scales


def _posterior_over_scale(
    view: PosteriorView, one: Candidates, scales: Floats
) -> dict[int, tuple[Floats, Floats]]:
    """Compute posterior means and deviations (n) over n scales, by number of the method.

    Methods whose merge does not depend on the scale are left out.
    """
    mean = float(_mean_scales(view, one)[0])
    shape = one.weights[0] / mean if mean else np.ones_like(one.weights[0])
    found: dict[int, tuple[Floats, Floats]] = {}
    for number in range(len(view.space.methods)):
        along = Candidates(
            np.full(len(scales), number),
            scales[:, None, None] * shape,
            np.repeat(one.values, len(scales), axis=0),
            np.repeat(one.tuned, len(scales), axis=0),
        )
        features = view.encoding.encode(along[1:])  # at scale 0 the weights' ratios are lost
        if np.ptp(features, axis=0).max() > NEGLIGIBLE:
            found[number] = view.values(along)
    return found
