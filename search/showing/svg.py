"""Charts as inline SVG that fills the width of its element, with text of a fixed size.

x coordinates are percentages of the plot area, y coordinates are pixels. Curves are drawn in a
nested SVG that is stretched to the area. Ticks and names lie in the padding of the element around
it. Colours and widths are the style sheet's, by class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from search.wording import shortened

if TYPE_CHECKING:
    from search.racing.race import Floats

ROW = 22  # pixels of a row of intervals
CELL = 15  # pixels of a row of cells
MOST_NAMED = 12  # columns of cells with a number beneath


@dataclass(frozen=True)
class Axis:
    """A range of values, named with their unit."""

    name: str
    low: float
    high: float

    @classmethod
    def around(cls, name: str, values: Sequence[float] | Floats) -> Axis:
        """Make an axis that spans all the values, with a margin."""
        low, high = float(np.min(values)), float(np.max(values))
        margin = 0.06 * (high - low) or 1.0
        return cls(name, low - margin, high + margin)

    def share(self, value: float) -> float:
        """Return the position of a value along the axis, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """List round values on the axis."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]


@dataclass(frozen=True)
class IntervalRow:
    """A named value, the ends of its interval, and its class."""

    name: str
    mean: float
    low: float
    high: float
    kind: str = ""


@dataclass(frozen=True)
class HeatRow:
    """A named row of values: one for each column (None: no cell), or a single one for all."""

    name: str
    values: Sequence[float | None]


@dataclass
class Chart:
    """A plot area to draw in."""

    x: Axis  # horizontal axis
    y: Axis  # vertical axis
    height: int = 230  # of the area, in pixels
    _marks: list[Markup] = field(default_factory=list)

    def band(self, x: Floats, low: Floats, high: Floats, kind: str = "") -> None:
        """Fill between two curves (n)."""
        there, back = self._path(x, low), self._path(x[::-1], high[::-1])
        self._stretch(f"M{there}L{back}Z", f"band {kind}")

    def line(self, x: Floats, y: Floats, kind: str = "") -> None:
        """Draw a curve (n)."""
        self._stretch(f"M{self._path(x, y)}", f"line {kind}")

    def upright(self, x: float, low: float, high: float, kind: str = "") -> None:
        """Draw a vertical interval."""
        self._marks.append(
            Markup('<line class="{}" x1="{x}" x2="{x}" y1="{:.1f}" y2="{:.1f}"/>').format(
                kind, self._down(low), self._down(high), x=self._across(x)
            )
        )

    def dot(self, x: float, y: float, title: str, kind: str = "", radius: float = 3) -> None:
        """Draw a point with a title that shows when it is pointed at."""
        self._marks.append(
            Markup('<circle class="{}" cx="{}" cy="{:.1f}" r="{:.1f}">{}</circle>').format(
                kind, self._across(x), self._down(y), radius, _title(title)
            )
        )

    def svg(self, what: str) -> Markup:
        """Return the chart, with a description for screen readers."""
        grid = [
            Markup(
                '<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text class="tick" x="-8" y="{y:.1f}" dy="4" text-anchor="end">{}</text>'
            ).format(_number(tick), y=self._down(tick))
            for tick in self.y.ticks()
        ]
        names = Markup('<text class="name" x="-40" y="-10">{}</text>').format(self.y.name)
        area = Markup('<svg width="100%" height="{}">{}</svg>').format(
            self.height, Markup("").join(self._marks)
        )
        parts = [*grid, names, _across_ticks(self.x, self.height), area]
        return _drawing(what, self.height, parts)

    def _across(self, x: float) -> str:
        return f"{100 * self.x.share(x):.2f}%"

    def _down(self, y: float) -> float:
        return self.height * (1 - self.y.share(y))

    def _path(self, x: Floats, y: Floats) -> str:
        points = zip(x.tolist(), y.tolist(), strict=True)
        return "L".join(f"{100 * self.x.share(a):.2f} {self._down(b):.1f}" for a, b in points)

    def _stretch(self, path: str, kind: str) -> None:
        self._marks.append(
            Markup(
                '<svg viewBox="0 0 100 {h}" preserveAspectRatio="none" width="100%" height="{h}">'
                '<path class="{}" d="{}"/></svg>'
            ).format(kind, path, h=self.height)
        )


def interval_chart(x: Axis, rows: Sequence[IntervalRow], what: str) -> Markup:
    """Draw a dot and an interval for each row, on one axis."""
    height = ROW * len(rows)
    parts = [_across_ticks(x, height, grid=True)]
    for index, row in enumerate(rows):
        low, mean, high = (f"{100 * x.share(v):.2f}%" for v in (row.low, row.mean, row.high))
        title = f"{row.name}: {row.mean:.1f} [{row.low:.1f}, {row.high:.1f}]"
        parts.append(
            Markup(
                '<g class="{}"><text class="row" x="-10" y="{y}" dy="4" text-anchor="end">{}</text>'
                '<line x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
                '<circle cx="{}" cy="{y}" r="4">{}</circle></g>'
            ).format(
                row.kind, shortened(row.name, 16), low, high, mean, _title(title),
                y=ROW * (index + 0.5),
            )
        )  # fmt: skip
    return _drawing(what, height, parts)


def heat_map(columns: Sequence[int], rows: Sequence[HeatRow], largest: float, what: str) -> Markup:
    """Draw a cell for each value, the darker the farther from zero; ``largest`` is darkest.

    Negative values have a class of their own. A row with a single value is one wide cell.
    """
    parts = []
    for index, row in enumerate(rows):
        y, width = CELL * index, 100 / len(row.values)
        text = Markup('<text class="row" x="-8" y="{}" dy="4" text-anchor="end">{}</text>')
        parts.append(text.format(y + CELL / 2, shortened(row.name, 26)))
        for column, value in enumerate(row.values):
            if value is None:
                continue
            where = f", layer {columns[column]}" if len(row.values) > 1 else ""
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.3f}%" y="{}" width="{:.3f}%" height="{}" '
                    'fill-opacity="{:.3f}">{}</rect>'
                ).format(
                    "below" if value < 0 else "cell", width * column, y, width, CELL - 1,
                    min(1.0, abs(value) / largest), _title(f"{row.name}{where}: {value:.3f}"),
                )
            )  # fmt: skip
    height, step = CELL * len(rows), -(-len(columns) // MOST_NAMED)
    tick = Markup('<text class="tick" x="{:.2f}%" y="{}" text-anchor="middle">{}</text>')
    parts += [
        tick.format(100 * (column + 0.5) / len(columns), height + 14, columns[column])
        for column in range(0, len(columns), max(1, step))
    ]
    name = Markup('<text class="name" x="100%" y="{}" text-anchor="end">layer</text>')
    return _drawing(what, height, [*parts, name.format(height + 30)])


def _across_ticks(x: Axis, height: int, *, grid: bool = False) -> Markup:
    lines = Markup('<line class="{}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>')
    texts = Markup('<text class="tick" x="{x}" y="{}" text-anchor="middle">{}</text>')
    ticks = [(f"{100 * x.share(tick):.2f}%", _number(tick)) for tick in x.ticks(4)]
    start = 0 if grid else height
    parts = [lines.format("grid", start, height + 4, x=at) for at, _ in ticks]
    parts += [texts.format(height + 18, number, x=at) for at, number in ticks]
    name = Markup('<text class="name" x="100%" y="{}" text-anchor="end">{}</text>')
    return Markup("").join([*parts, name.format(height + 36, x.name)])


def _drawing(what: str, height: int, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="drawing" role="img" aria-label="{}" height="{}">{}</svg>'
    ).format(what, height, Markup("").join(parts))  # fmt: skip


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text)


def _number(value: float) -> str:
    return f"{round(value, 9):,g}" if abs(value) < 1e6 else f"{value:,.0f}"
