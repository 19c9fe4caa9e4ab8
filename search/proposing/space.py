"""The search space: axes shared by all methods, and the donors' weights at its points.

Scale and mixture are separate axes. ``scale`` is the donors' mean weight: 1/k is the uniform
average of k donors, and 1 adds every task vector in full; with ``at_most`` it is the mean over that
many donors. ``mix_1 .. mix_{k-1}`` are the stick-breaking coordinates of the mixture, which are
unique. With depth groups or tensor-name splits every unit of the model has its own scale and
mixture; in the first stages of a search units share theirs (coarse to fine).

``recipes`` maps points to recipes and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from merge_engine.recipe.recipe import Recipe, Tokenizer
from merge_engine.recipe.recipe_file import load_recipe
from search.proposing.mixture import (
    break_sticks,
    join_sticks,
    keep_heaviest,
    zero_small_weights,
)
from search.proposing.tuned_path import STRENGTH, TunedPath, TunedUnits
from search.racing.race import Floats
from search.study.parameters import followers, searchable
from search.study.spec import (
    DEFAULT_SCALE,
    ModelDifference,
    StudySpec,
    as_differences,
    models_but_base,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Point = Mapping[str, Any]
STAGE = 20  # trials of a stage


@dataclass(frozen=True)
class Space:
    """The search space of a study."""

    base: str  # the base model
    donors: tuple[str | ModelDifference, ...]  # k models or differences of two
    methods: tuple[str, ...]  # names in METHODS
    scale: tuple[float, float]  # range of the mean weight of ``used`` donors
    # Range of every other searched or fixed parameter, equal ends for a fixed one.
    ranges: Mapping[str, tuple[float, float]]
    # u parts of the model with weights of their own: for each the tensor-name filters that make it
    # up. The last unit has every other tensor, too.
    units: tuple[tuple[str, ...], ...] = ((),)
    at_most: int | None = None  # donors that a recipe uses at most; None: all
    dtype: str = "float32"  # of the merged weights
    tokenizer: Tokenizer | None = None  # their vocabulary; None: the base's
    seed: int = 0  # of random methods' masks
    most_starts: int | None = None  # warm starts at most, besides those of the user; None: all
    starts: tuple[Recipe, ...] = ()  # recipes to try first, besides the default warm starts
    # How units share weights before each has its own: the group of each unit, stage after stage,
    # from coarse to fine.
    stages: tuple[tuple[int, ...], ...] = ()
    # Names of the ranges that the study does not give, which may be widened; `scale` may be one.
    widenable: frozenset[str] = frozenset()
    tuned: TunedPath | None = None  # weights tuned by gradient; None: none so far

    @classmethod
    def from_spec(cls, spec: StudySpec, layers: Sequence[str], dtype: str) -> Space:
        """Return the space of a study whose models' layers have these tensor-name filters."""
        search = spec.search
        found = {
            name: search.ranges.get(name, param.search)
            for name, param in sorted(searchable(search.methods).items())
        }
        ranges = {name: bounds for name, bounds in found.items() if bounds is not None}
        scale = {"scale"} if search.scale is None else set()
        return cls(
            base=spec.base_model,
            donors=spec.models,
            methods=search.methods,
            scale=search.scale or DEFAULT_SCALE,
            ranges=ranges,
            widenable=frozenset(ranges.keys() - search.ranges.keys() | scale),
            units=model_units(layers, search.layer_groups, search.split),
            at_most=search.at_most,
            most_starts=search.trials // 3,
            stages=coarse_to_fine(search.layer_groups, len(search.split)),
            dtype=dtype,
            tokenizer=spec.tokenizer,
            seed=search.seed,
            starts=tuple(
                load_recipe(path / "recipe.yaml" if path.is_dir() else path)[0]
                for path in search.start
            ),
        )

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The m models that the donors are made of, which have weights in a recipe."""
        return models_but_base(self.base, self.donors)

    @property
    def has_differences(self) -> bool:
        """Whether a donor is the difference of two models, so that it is no model on its own."""
        return self.models != self.donors

    @property
    def used(self) -> int:
        """How many of the donors a recipe uses at most."""
        return min(len(self.donors), self.at_most or len(self.donors))

    @cached_property
    def signs(self) -> Floats:
        """Coefficient of each model in each donor, (k, m): 1, 0, or -1 for a subtracted one."""
        vectors = as_differences(self.base, self.donors)
        return np.array(
            [[float(m == one.model) - (m == one.minus) for m in self.models] for one in vectors]
        )

    @cached_property
    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """The range of every searched parameter but the method; the same names for every method."""
        ranges = {
            **{self._name("scale", unit): self.scale for unit in range(len(self.units))},
            **{
                self._name(f"mix_{stick}", unit): (0.0, 1.0)
                for unit in range(len(self.units))
                for stick in range(1, len(self.donors))
            },
            **self.ranges,
        }
        if self.tuned is not None:
            ranges |= {"strength": STRENGTH, "position": (0.0, self.tuned.last)}
        return {name: bounds for name, bounds in ranges.items() if bounds[0] < bounds[1]}

    @cached_property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Optuna's distribution of every searched parameter."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        return {
            "method": CategoricalDistribution(self.methods),
            **{name: FloatDistribution(*bounds) for name, bounds in self.bounds.items()},
        }

    def shared_units(self, trials: int) -> tuple[int, ...]:
        """Return each unit's group after ``trials`` trials; empty once none is shared."""
        stage = max(0, trials) // STAGE
        return self.stages[stage] if stage < len(self.stages) else ()

    def contains(self, point: Point) -> bool:
        """Return whether the point has this space's parameters, each within its range."""
        return (
            point.keys() == {"method", *self.bounds}
            and point["method"] in self.methods
            and all(low <= point[name] <= high for name, (low, high) in self.bounds.items())
        )

    def params_of(self, method: str) -> list[str]:
        """Return the names in ``ranges`` that have an effect on a method."""
        return [name for name in self.ranges if method in followers(name, self.methods)]

    def default(self, name: str) -> float:
        """Return the value in a parameter's range that is nearest to its default."""
        low, high = self.ranges[name]
        return min(max(float(searchable(self.methods)[name].default or 0.0), low), high)

    def value(self, point: Point, name: str) -> float:
        """Return a parameter of a point, or its fixed value where it is not searched."""
        return float(point.get(name, self.ranges[name][0]))

    def scale_of(self, point: Point, unit: int) -> float:
        """Return the mean weight of ``used`` donors in a unit."""
        return float(point.get(self._name("scale", unit), self.scale[0]))

    def weights(self, points: Sequence[Point]) -> Floats:
        """Return n points' weights of the k donors in each of the u units, (n, u, k).

        At most ``used`` of them are above zero, and their sum is ``used`` times the unit's scale.
        """
        k, units = len(self.donors), range(len(self.units))
        names = [self._name(f"mix_{i}", unit) for unit in units for i in range(1, k)]
        sticks = np.array([[p[name] for name in names] for p in points])
        scales = np.array([[self.scale_of(p, unit) for unit in units] for p in points])
        shares = zero_small_weights(break_sticks(sticks.reshape(len(points), len(units), k - 1)))
        weights = self.used * scales.reshape(len(points), -1, 1) * shares
        return keep_heaviest(weights, self.at_most).round(6)

    def tuned_weights(self, point: Point) -> Floats:
        """Return a point's weights (U, k) in the units of the tuned path."""
        assert self.tuned is not None
        strength, position = float(point["strength"]), float(point.get("position", 0.0))
        flat = self.weights([point])[0][list(self.tuned.units.unit_of)]
        blended = (1 - strength) * flat + strength * self.tuned.at([position])[0]
        kept: Floats = keep_heaviest(blended[None], self.at_most)[0].round(6)
        return kept

    def point(self, method: str, weights: Sequence[float], **values: float) -> dict[str, Any]:
        """Return the point with these weights of the k donors in every unit.

        Parameters not in ``values`` get the middle of their range.
        """
        return self.point_by_unit(method, [weights] * len(self.units), values)

    def point_by_unit(
        self, method: str, weights: Sequence[Sequence[float]], values: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the point with these weights of the k donors in each unit, (u, k)."""
        point: dict[str, Any] = {"method": method}
        for unit, of_donors in enumerate(weights):
            k, total = len(of_donors), sum(of_donors)
            sticks = join_sticks([w / total if total else 1 / k for w in of_donors])
            scale = total / self.used
            point[self._name("scale", unit)] = scale
            point |= {self._name(f"mix_{i}", unit): u for i, u in enumerate(sticks, start=1)}
        middles = {name: (low + high) / 2 for name, (low, high) in self.ranges.items()}
        known = self.distributions
        point |= {"strength": 0.0, "position": 0.0, **middles, **values}
        return {name: point[name] for name in known} if known.keys() <= point.keys() else point

    def _name(self, name: str, unit: int) -> str:
        return name if len(self.units) == 1 else f"{name}@{unit}"


def with_points(space: Space, units: TunedUnits, states: Sequence[Floats]) -> Space:
    """Return the space with the points of the tuned path, if there are any besides its start.

    Each state (4, U, k) has a point's weights last, see ``tuning.update``.
    """
    if len(states) < 2:
        return space
    return replace(space, tuned=TunedPath(units, np.stack([state[-1] for state in states])))


def model_units(
    layers: Sequence[str], groups: int, split: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Return each unit's filters: depth groups times name splits, then what the splits leave."""
    if groups == 1:
        return (*((part,) for part in split), ())
    depths = [
        tuple(layer for i, layer in enumerate(layers) if i * groups // len(layers) == group)
        for group in range(groups)
    ]
    named = [tuple(layer + part for layer in depth) for depth in depths for part in split]
    return (*named, *depths)


def coarse_to_fine(groups: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Return the stages before ``model_units`` have their own weights: 1, 2, 4, ... depth groups.

    ``parts`` is the number of name splits in each depth group.
    """
    depths = [depth for depth in range(groups) for _ in range(parts)] + [*range(groups)]
    counts = [2**power for power in range(groups.bit_length()) if 2**power < groups]
    stages = [tuple(depth * count // groups for depth in depths) for count in counts]
    return (*stages, tuple(depths)) if parts else tuple(stages)
