"""Widen default ranges: if the best recipe lies at an edge, a better one may lie beyond.

A range that the study does not give is widened again and again while the best recipe lies at its
edge, within the parameter's natural limits. Its width follows from the finished trials alone: it
contains all their points, plus STEP at an edge where the best of them lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from merge_engine.methods import METHODS
from search.proposing.space import Point, Space
from search.storing.result import AtEdge
from search.study.parameters import searchable

NEAR: Final = 0.05  # of a range's width: a value so near an edge lies at it
STEP: Final = 0.5  # of a range's width, by which it is widened
MOSTLY_TUNED: Final = 0.5  # strength above which the scale of the flat weights matters little
WIDEST: Final = 100.0  # widths, if a parameter has no limit


def edges(space: Space, point: Point) -> Iterator[AtEdge]:
    """Yield a point's parameters at an edge of their range, beyond which there are legal values."""
    for name, (low, high) in _searched(space).items():
        least, most = _limits(space, name)
        near, step = NEAR * (high - low), STEP * (high - low)
        for value in _values(space, point, name):
            # At most half the way to a limit: a density of 0 keeps nothing.
            if value <= low + near and low > least:
                wider = (max(low - step, (low + least) / 2), high)
            elif value >= high - near and high < most:
                wider = (low, min(high + step, most))
            else:
                continue
            yield AtEdge(name=name, value=value, range=(low, high), wider=wider)
            break


def widen_to(space: Space, points: Sequence[Point]) -> Space:
    """Return the space with its default ranges widened to hold these points."""
    ranges = {}
    for name, bounds in _searched(space).items():
        if name in space.widenable:
            values = [
                *bounds,
                *(value for point in points for value in _values_by_unit(space, point, name)),
            ]
            ranges[name] = (min(values), max(values))
    return _with_ranges(space, ranges)


def widen_at_edges(space: Space, best: Point) -> Space:
    """Return the space with its default ranges widened at the edges where the best lies."""
    wider = {e.name: e.wider for e in edges(space, best) if e.name in space.widenable}
    return _with_ranges(space, wider)


def widest(space: Space) -> Space:
    """Return the space with its default ranges as wide as they can become."""
    ranges = {}
    for name in space.widenable & _searched(space).keys():
        (low, high), (least, most) = _searched(space)[name], _limits(space, name)
        reach = WIDEST * (high - low)
        ranges[name] = (max(low - reach, least), min(high + reach, most))
    return _with_ranges(space, ranges)


def _searched(space: Space) -> dict[str, tuple[float, float]]:
    known = {"scale": space.scale, **space.ranges}
    return {name: bounds for name, bounds in known.items() if bounds[0] < bounds[1]}


def _limits(space: Space, name: str) -> tuple[float, float]:
    """Return the least and the largest value that a parameter can have."""
    if name == "scale":
        return 0.0, math.inf
    param = searchable(space.methods)[name]
    return param.valid if param.kind is float else space.ranges[name]


def _values(space: Space, point: Point, name: str) -> list[float]:
    """Return a parameter's values in a point: none if its method ignores it."""
    if name == "scale":
        params = METHODS[point["method"]].params
        if point.get("strength", 0.0) > MOSTLY_TUNED:
            return []
        return _values_by_unit(space, point, name) if {"weight", "lambda"} <= params.keys() else []
    return _values_by_unit(space, point, name) if name in space.params_of(point["method"]) else []


def _values_by_unit(space: Space, point: Point, name: str) -> list[float]:
    if name == "scale":
        return [space.scale_of(point, unit) for unit in range(len(space.units))]
    return [space.value(point, name)]


def _with_ranges(space: Space, ranges: Mapping[str, tuple[float, float]]) -> Space:
    if not ranges:
        return space
    others = {name: bounds for name, bounds in ranges.items() if name != "scale"}
    scale = ranges.get("scale", space.scale)
    return replace(space, scale=scale, ranges={**space.ranges, **others})
