"""Charts of tuned weights: the winner's weights, and the path's losses and estimates."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from markupsafe import Markup

from search.proposing.insight import HALF_WIDTH
from search.proposing.recipes import is_tuned, merged_weights
from search.proposing.tuned_path import PATH_PREFIX, TunedUnits
from search.racing.race import Floats
from search.showing.charts import COLOURS
from search.showing.facts import RunFacts
from search.showing.svg import Axis, Chart, HeatRow, heat_map
from search.storing.store import PathStep

DARKEST: Final = 0.95  # quantile of |weight| drawn darkest, so that outliers do not hide the rest
AVERAGED: Final = 5  # steps over which the drawn loss is averaged


class WeightMaps(NamedTuple):
    """The winner's weights, as a heat map for each donor."""

    strength: float  # between flat and tuned weights
    largest: float  # |weight| from which on cells are darkest
    mean: float  # over all units and donors
    maps: Mapping[str, Markup]  # by the donor's short name


class PathCharts(NamedTuple):
    """The path of tuned weights over its steps."""

    steps: int  # of all paths
    evaluations: int  # item evaluations that they took
    race: Markup | None  # estimates of the path's points; None: none has one yet
    loss: Markup  # of the items of each step


def weight_maps(facts: RunFacts) -> WeightMaps | None:
    """Draw the winner's weights over layers and kinds of tensors; None: they were not tuned."""
    winner = facts.result and facts.result.winner.trial
    trial = next((one for one in facts.complete if one.number == winner), None)
    if trial is None or facts.space.tuned is None or not is_tuned(trial.point):
        return None
    weights = merged_weights(facts.space, trial.point)
    largest = float(np.quantile(np.abs(weights), DARKEST)) or 1.0
    maps = {}
    for donor, of_units in zip(facts.space.donors, weights.T, strict=True):
        name = facts.names.get(str(donor), str(donor))
        layers, rows = arranged(facts.space.tuned.units, of_units)
        maps[name] = heat_map(layers, rows, largest, f"weights of {name}, layer by layer")
    strength = float(trial.point["strength"])
    return WeightMaps(strength, largest, float(weights.mean()), maps)


def arranged(units: TunedUnits, weights: Floats) -> tuple[list[int], list[HeatRow]]:
    """Arrange units' weights (U) in rows of one kind of tensor, a column for each layer.

    Tensors outside the layers follow in rows of one cell.

    Returns:
        The numbers of the layers, and the rows.
    """
    in_layers = defaultdict[tuple[str, str], dict[int, float]](dict)
    others: dict[str, float] = {}
    for filters, weight in zip(units.filters, weights.tolist(), strict=True):
        drawn = set[int | None]()  # other filters of a unit may be a live model's for its tensors
        for name in filters or ("all else",):
            found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            layer = int(found[1]) if found else None
            if layer in drawn:
                continue
            drawn.add(layer)
            if found:
                kind = name[: found.start()], name[found.end() :].removesuffix(".weight")
                in_layers[kind][int(found[1])] = weight
            else:
                others[name.removesuffix(".weight").removeprefix("model.")] = weight
    layers = sorted({layer for of_kind in in_layers.values() for layer in of_kind})
    stacks = {stack for stack, _ in in_layers}
    rows = []
    for (stack, name), of_kind in in_layers.items():
        shown = ".".join(filter(None, (stack if len(stacks) > 1 else "", name))) or "layer"
        rows.append(HeatRow(shown, [of_kind.get(layer) for layer in layers]))
    rows.sort(key=lambda row: row.name)
    return layers, rows + [HeatRow(name, [weight]) for name, weight in others.items()]


def path_charts(facts: RunFacts) -> PathCharts | None:
    """Draw losses, and estimates of the path's points, over steps; None: no step was taken."""
    taken = [step for step in facts.steps if step.step]
    if not taken:
        return None
    x = Axis("steps", 0, 1.02 * max(step.step for step in taken))
    evaluations = sum(step.evaluations for step in facts.steps)
    return PathCharts(len(taken), evaluations, _race_chart(facts, x), _loss_chart(facts, taken, x))


def _race_chart(facts: RunFacts, x: Axis) -> Markup | None:
    points = [step for step in facts.steps if step.is_point]
    found = {
        round(trial.point["position"]): trial
        for trial in facts.complete
        if (trial.start or "").startswith(PATH_PREFIX) and "position" in trial.point
    }
    if not found:
        return None
    ends = [
        100 * (trial.value + sign * HALF_WIDTH * trial.variance**0.5)
        for trial in found.values()
        for sign in (-1, 1)
    ]
    chart = Chart(x, Axis.around("estimate on search items, %", ends), height=190)
    for path in sorted({points[position].path for position in found}):
        mine = [(points[p], found[p]) for p in sorted(found) if points[p].path == path]
        steps = np.array([float(step.step) for step, _ in mine])
        chart.line(steps, np.array([100 * trial.value for _, trial in mine]), _kind(path))
        for step, trial in mine:
            value, side = 100 * trial.value, 100 * HALF_WIDTH * trial.variance**0.5
            chart.upright(step.step, value - side, value + side, _kind(path))
            title = f"{trial.start}: {value:.1f} ± {side:.1f} %, {trial.items} items"
            chart.dot(step.step, value, f"trial {trial.number}, {title}", _kind(path), 4)
    return chart.svg("estimates of the points of the path over steps")


def _loss_chart(facts: RunFacts, taken: Sequence[PathStep], x: Axis) -> Markup:
    losses = [_mean_loss(step, facts.weights) for step in taken]
    chart = Chart(x, Axis.around("loss on tune items", losses), height=190)
    for path in sorted({step.path for step in taken}):
        mine = [
            (step.step, loss) for step, loss in zip(taken, losses, strict=True) if step.path == path
        ]
        for step, loss in mine:
            chart.dot(step, loss, f"step {step}: {loss:.3f}", f"faint {_kind(path)}", 2)
        steps, values = np.array(mine, dtype=float).T
        means = [values[max(0, end - AVERAGED) : end].mean() for end in range(1, len(values) + 1)]
        chart.line(steps, np.array(means), _kind(path))
    return chart.svg("loss of the items of each step")


def _mean_loss(step: PathStep, weights: Mapping[str, float]) -> float:
    of_tasks = [weights[task] for task in step.losses]
    return float(np.average([*step.losses.values()], weights=of_tasks))


def _kind(path: int) -> str:
    return f"m{path % COLOURS}"
