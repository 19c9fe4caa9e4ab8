"""What is searched: points of Optuna, and the recipes they stand for.

Scale and mixture are separate axes, shared by all methods: ``scale`` is the donors' mean weight
(so 1/k of one donor's weight in the uniform average of k, and 1 adds every task vector in full),
and ``mix_1 .. mix_{k-1}`` cut the mixture stick by stick, so that a uniform point is a uniform
mixture of the simplex and no two points are one recipe. With depth groups or tensor-name splits
every unit of the model has a scale and a mixture of its own; in the first stages of a search units
can share theirs, so that what is good for all is known before what is good for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from scipy.optimize import nnls

from merge_engine.errors import MergeError
from merge_engine.methods import METHODS, Base, Param
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import load_recipe
from search.proposing.encoding import Floats, without_trifles
from search.study.parameters import followers, searchable
from search.study.spec import ModelDifference, StudySpec, as_differences, models_but_base

Point = Mapping[str, Any]
UNIFORM = "uniform average"
STAGE = 20  # trials that a stage lasts
LADDER = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Space:
    """The recipes of a study.

    Args:
        base: The base model.
        donors: k models or differences of two.
        methods: Names in METHODS.
        scale: Range of the donors' mean weight.
        ranges: Range of every other searched or fixed parameter, equal ends for a fixed one.
        units: Parts of the model with weights of their own: for each the tensor-name filters that
            make it up. The last unit has every other tensor, too.
        stages: How units share weights before each has its own: the group of each unit, stage
            after stage, from coarse to fine.
        dtype: Of the merged weights.
        seed: Of random methods' masks.
        starts: Recipes to try first, besides our own.
    """

    base: str
    donors: tuple[str | ModelDifference, ...]
    methods: tuple[str, ...]
    scale: tuple[float, float]
    ranges: Mapping[str, tuple[float, float]]
    units: tuple[tuple[str, ...], ...] = ((),)
    dtype: str = "float32"
    seed: int = 0
    starts: tuple[Recipe, ...] = ()
    stages: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, spec: StudySpec, layers: Sequence[str], dtype: str) -> Space:
        """The space of a study over models whose layers have these tensor-name filters."""
        search = spec.search
        found = {
            name: search.ranges.get(name, param.search)
            for name, param in sorted(searchable(search.methods).items())
        }
        return cls(
            base=spec.base_model,
            donors=spec.models,
            methods=search.methods,
            scale=search.scale,
            ranges={name: bounds for name, bounds in found.items() if bounds is not None},
            units=_units(layers, search.layer_groups, search.split),
            stages=coarse_to_fine(search.layer_groups, len(search.split)),
            dtype=dtype,
            seed=search.seed,
            starts=tuple(
                load_recipe(path / "recipe.yaml" if path.is_dir() else path)[0]
                for path in search.start
            ),
        )

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The m models of which a recipe gives weights."""
        return models_but_base(self.base, self.donors)

    @cached_property
    def _signs(self) -> Floats:
        """What each donor adds of each model, (k, m): 1, 0, or -1 for one that it subtracts."""
        vectors = as_differences(self.base, self.donors)
        return np.array(
            [[float(m == one.model) - (m == one.minus) for m in self.models] for one in vectors]
        )

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view: the same names for every method, fixed parameters left out."""
        return dict(self._distributions)

    @cached_property
    def _distributions(self) -> Mapping[str, BaseDistribution]:
        ranges = {
            **{self._name("scale", unit): self.scale for unit in range(len(self.units))},
            **{
                self._name(f"mix_{stick}", unit): (0.0, 1.0)
                for unit in range(len(self.units))
                for stick in range(1, len(self.donors))
            },
            **self.ranges,
        }
        searched = {name: bounds for name, bounds in ranges.items() if bounds[0] < bounds[1]}
        return {
            "method": CategoricalDistribution(self.methods),
            **{name: FloatDistribution(*bounds) for name, bounds in searched.items()},
        }

    def groups(self, trials: int) -> tuple[int, ...]:
        """The group of each unit after so many trials, as in ``RecipeEncoding``."""
        stage = max(0, trials) // STAGE
        return self.stages[stage] if stage < len(self.stages) else ()

    def contains(self, point: Point) -> bool:
        """Whether the study's ranges allow the point."""
        distributions = self.distributions()
        return point.keys() == distributions.keys() and all(
            distribution._contains(distribution.to_internal_repr(point[name]))
            for name, distribution in distributions.items()
        )

    def weights(self, points: Sequence[Point]) -> Floats:
        """Each point's weights in each of the u units of the k donors, (n, u, k).

        Their mean over the donors is the unit's scale.
        """
        k, units = len(self.donors), range(len(self.units))
        names = [self._name(f"mix_{i}", unit) for unit in units for i in range(1, k)]
        sticks = np.array([[p[name] for name in names] for p in points])
        scales = np.array([[self._get(p, "scale", unit) for unit in units] for p in points])
        shares = without_trifles(_mixture(sticks.reshape(len(points), len(units), k - 1)))
        return (k * scales.reshape(len(points), -1, 1) * shares).round(6)

    def recipe(self, point: Point) -> Recipe:
        """The recipe a point stands for; parameters its method has not are left out."""
        return self._recipe(point, self.weights([point])[0] @ self._signs)

    def _recipe(self, point: Point, of_models: Floats) -> Recipe:
        """The recipe with these weights of the m models in each of the u units, (u, m)."""
        rounded = of_models.round(6) + 0.0  # which makes -0.0 zero
        weights: list[tuple[float, ...]] = [*map(tuple, rounded.tolist())]
        method = str(point["method"])
        chosen = self._heaviest(weights, METHODS[method].donors[1])
        if METHODS[method].base is Base.ENDPOINT:
            return self._arc(method, weights, chosen)
        params = METHODS[method].params
        shared: dict[str, Any] = {
            name: param.default
            for name, param in params.items()
            if param.default is not None and not param.per_donor
        }
        shared |= {name: self._value(point, name, params[name]) for name in self.active(method)}
        if {"density", "epsilon"} <= params.keys():
            known = {name: param.default for name, param in params.items()} | shared
            shared["epsilon"] = _within(known["epsilon"], known["density"])
        if "weight" in params and ("lambda" not in params or shared.get("normalize")):
            # Only the ratio of the weights counts here; the scale is lambda's, if there is one.
            scales = [self._get(point, "scale", unit) for unit in range(len(self.units))]
            weights = [
                tuple(round(w / scale, 6) if scale else 1.0 for w in unit)
                for unit, scale in zip(weights, scales, strict=True)
            ]
            if "lambda" in params:
                shared["lambda"] = self._setting([round(scale, 6) for scale in scales])
        return self._make(method, chosen, weights, shared)

    def active(self, method: str) -> list[str]:
        """The names in ``ranges`` that a method follows."""
        return [name for name in self.ranges if method in followers(name, self.methods)]

    def default(self, name: str) -> float:
        """What a parameter is taken to be where it has no effect: the nearest to its default."""
        low, high = self.ranges[name]
        return min(max(float(searchable(self.methods)[name].default or 0.0), low), high)

    def baselines(self) -> dict[str, Recipe]:
        """What any winner has to beat: base and models by name, and the ``UNIFORM`` average."""
        k, m = len(self.donors), len(self.models)
        whole = replace(self, units=((),), methods=("task_arithmetic",), ranges={})
        average = whole.point("task_arithmetic", (round(1 / k, 6),) * k)
        alone = np.vstack([np.zeros(m), np.eye(m)])[:, None]  # (1 + m, 1, m)
        names = (self.base, *self.models)
        recipes = {name: whole._recipe(average, w) for name, w in zip(names, alone, strict=True)}
        return {**recipes, UNIFORM: whole.recipe(average)}

    def point(self, method: str, weights: Sequence[float], **values: float) -> dict[str, Any]:
        """The point whose recipe has these weights of the k donors in every unit.

        Parameters not in ``values`` get the middle of their range.
        """
        return self.point_of(method, [weights] * len(self.units), values)

    def point_of(
        self, method: str, weights: Sequence[Sequence[float]], values: Mapping[str, float]
    ) -> dict[str, Any]:
        """The point whose recipe has these weights of the k donors in each unit."""
        point: dict[str, Any] = {"method": method}
        for unit, of_donors in enumerate(weights):
            k, scale = len(of_donors), sum(of_donors) / len(of_donors)
            sticks = _sticks([w / (scale * k) if scale else 1 / k for w in of_donors])
            point[self._name("scale", unit)] = scale
            point |= {self._name(f"mix_{i}", unit): u for i, u in enumerate(sticks, start=1)}
        middles = {name: (low + high) / 2 for name, (low, high) in self.ranges.items()}
        known = self.distributions()
        point |= {**middles, **values}
        return {name: point[name] for name in known} if known.keys() <= point.keys() else point

    def point_like(self, recipe: Recipe) -> dict[str, Any]:
        """The point whose recipe has a recipe's method, weights and parameters in every unit.

        Raises:
            RecipeError: It is none of this study's.
        """
        models = [source.model for source in recipe.donors]
        if recipe.method.base is Base.ENDPOINT:
            models = [str(recipe.base_model), *models]
        units = [recipe.values((*unit, "")[0], 0.0) for unit in self.units]
        added = [
            dict(zip(models, _added(values, len(models), len(self.donors)), strict=True))
            for values in units
        ]
        # The base may be named for its tokenizer alone.
        named = {m for unit in added for m, weight in unit.items() if weight or m != self.base}
        strangers = sorted(named - {*self.models})
        if strangers or recipe.merge_method not in self.methods:
            stranger = repr(strangers[0]) if strangers else f"method {recipe.merge_method!r}"
            raise MergeError(f"it has {stranger}, which the study has not; leave it out")
        of_models = np.array([[unit.get(m, 0.0) for m in self.models] for unit in added])
        weights = self._of_donors(of_models).tolist()
        known = {n: float(np.mean(units[-1][n])) for n in self.ranges if n in units[-1]}
        point = self.point_of(recipe.merge_method, weights, known)
        if not self.contains(point):
            raise MergeError(
                f"it is outside the study's ranges: {point}; widen them, or leave it out"
            )
        return point

    def _point_of_start(self, place: int, recipe: Recipe) -> dict[str, Any]:
        try:
            return self.point_like(recipe)
        except MergeError as error:
            raise MergeError(f"search.start: recipe {place}: {error}") from None

    def _of_donors(self, of_models: Floats) -> Floats:
        """The weights of the k donors, (u, k), that make these of the m models, (u, m).

        Raises:
            RecipeError: There are none.
        """
        if self.models == self.donors:
            return of_models
        found = [nnls(self._signs.T, of_unit) for of_unit in of_models]
        if max(distance for _, distance in found) > 1e-5:
            raise MergeError(f"it is no sum of {', '.join(map(str, self.donors))}")
        return np.array([weights.round(9) for weights, _ in found])  # a bound stays one

    def warm_starts(self) -> list[tuple[str, dict[str, Any]]]:
        """What is tried first: base, each donor, their average, a ladder of scales, each method.

        Labels and points; those outside the study's ranges are left out.
        """
        return list(self._warm_starts)

    @cached_property
    def _warm_starts(self) -> Sequence[tuple[str, dict[str, Any]]]:
        k = len(self.donors)
        ones = (1.0,) * k
        starts: list[tuple[str, dict[str, Any]]] = []
        if "task_arithmetic" in self.methods:
            named = [("base", (0.0,) * k)]
            named += [
                (str(d), tuple(float(d == other) for other in self.donors)) for d in self.donors
            ]
            named.append((UNIFORM, (round(1 / k, 6),) * k))
            named += [(f"scale {scale:g}", (scale,) * k) for scale in LADDER]
            starts += [(label, self.point("task_arithmetic", w)) for label, w in named]
        others = [method for method in self.methods if method != "task_arithmetic"]
        starts += [(f"{method} as it is", self.point(method, ones)) for method in others]
        starts = [(label, point) for label, point in starts if self.contains(point)]
        return starts + [
            (f"start {place}", self._point_of_start(place, recipe))
            for place, recipe in enumerate(self.starts, start=1)
        ]

    def _heaviest(self, weights: Sequence[Sequence[float]], most: int | None) -> list[int]:
        """The places of the ``most`` models that weigh most (None: of all), in order."""
        totals = [sum(unit[i] for unit in weights) for i in range(len(self.models))]
        ranked = sorted(range(len(self.models)), key=lambda i: -totals[i])
        return sorted(ranked[:most])

    def _arc(
        self, method: str, weights: Sequence[Sequence[float]], chosen: Sequence[int]
    ) -> Recipe:
        """Slerp from the first chosen model to the second."""
        first, second = chosen
        shares = [
            round(unit[second] / both, 6) if (both := unit[first] + unit[second]) else 0.5
            for unit in weights
        ]
        ends = [{"model": self.models[i]} for i in (first, second)]
        return self._validated(method, self.models[first], ends, {"t": self._setting(shares)})

    def _make(
        self,
        method: str,
        chosen: Sequence[int],
        weights: Sequence[Sequence[float]],
        shared: dict[str, Any],
    ) -> Recipe:
        weighted = "weight" in METHODS[method].params
        models: list[dict[str, Any]] = [
            {"model": self.models[i]}
            | (
                {"parameters": {"weight": self._setting([u[i] for u in weights])}}
                if weighted
                else {}
            )
            for i in chosen
        ]
        base: str | None = self.base
        if METHODS[method].base is Base.INPUT:
            if weighted:  # named, so that config and tokenizer are the base's
                models = [{"model": self.base, "parameters": {"weight": 0.0}}, *models]
            else:  # it would be one more model that counts
                base = None
        return self._validated(method, base, models, shared)

    def _validated(
        self,
        method: str,
        base: str | None,
        models: list[dict[str, Any]],
        parameters: dict[str, Any],
    ) -> Recipe:
        return Recipe.model_validate(
            {
                "merge_method": method,
                "base_model": base,
                "models": models,
                "parameters": parameters,
                "dtype": "float32",  # in 16 bits mergekit's own rounding can exceed the deltas
                "out_dtype": self.dtype,
                "seed": self.seed,
            }
        )

    def _setting(self, by_unit: Sequence[float]) -> Any:
        """A setting with one value per unit of the model."""
        if len(by_unit) == 1:
            return by_unit[0]
        clauses = [
            {"filter": name, "value": value}
            for filters, value in zip(self.units, by_unit, strict=True)
            for name in filters
        ]
        return [*clauses, {"value": by_unit[-1]}]

    def _name(self, name: str, unit: int) -> str:
        return name if len(self.units) == 1 else f"{name}@{unit}"

    def _get(self, point: Point, name: str, unit: int) -> float:
        return float(point.get(self._name(name, unit), self.scale[0]))

    def _value(self, point: Point, name: str, param: Param) -> float | bool | int:
        value = float(point.get(name, self.ranges[name][0]))
        return param.kind(float(f"{value:.6g}")) if param.kind is not bool else value >= 0.5


def _units(layers: Sequence[str], groups: int, split: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Filters of each unit: depth groups times name splits, then what the splits leave over."""
    if groups == 1:
        return (*((part,) for part in split), ())
    depths = [
        tuple(layer for i, layer in enumerate(layers) if i * groups // len(layers) == group)
        for group in range(groups)
    ]
    named = [tuple(layer + part for layer in depth) for depth in depths for part in split]
    return (*named, *depths)


def coarse_to_fine(groups: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """The stages before ``_units`` have weights of their own: 1, 2, 4, ... groups of their depths.

    Args:
        groups: Depth groups.
        parts: Names by which each is split.
    """
    depths = [depth for depth in range(groups) for _ in range(parts)] + [*range(groups)]
    counts = [2**power for power in range(groups.bit_length()) if 2**power < groups]
    stages = [tuple(depth * count // groups for depth in depths) for count in counts]
    return (*stages, tuple(depths)) if parts else tuple(stages)


def _added(values: Mapping[str, Any], count: int, donors: int) -> list[float]:
    """How much a recipe with these parameters adds of each of its ``count`` models.

    Where their ratio alone counts, the weights' sum is the number of donors.
    """
    even = (1 - values["t"], values["t"]) if "t" in values and count == 2 else (1.0,) * count
    weights = values.get("weight", even)
    if "lambda_" not in values or values["normalize"]:
        total = sum(weights) or 1.0
        weights = [weight * donors / total for weight in weights]
    return [weight * values.get("lambda_", 1.0) for weight in weights]


def _within(epsilon: float, density: float) -> float:
    """The nearest half width that keeps ``density`` plus and minus it inside of (0, 1)."""
    if not 0 < density < 1:
        return epsilon
    room = math.floor(min(density, 1 - density) * 1e6 - 1) / 1e6
    return min(epsilon, max(room, 0.0))


def _mixture(sticks: Floats) -> Floats:
    """Break unit sticks (..., k - 1) into shares (..., k), uniform for uniform sticks."""
    left, shares = np.ones(sticks.shape[:-1]), []
    for place, more in enumerate(range(sticks.shape[-1], 0, -1)):
        shares.append(left * (1 - (1 - sticks[..., place]) ** (1 / more)))
        left = left - shares[-1]
    return np.stack([*shares, np.maximum(left, 0.0)], axis=-1)


def _sticks(shares: Sequence[float]) -> list[float]:
    """The inverse of ``_mixture``."""
    sticks, left = [], 1.0
    for place, share in enumerate(shares[:-1]):
        part = min(1.0, share / left) if left > 1e-12 else 0.0
        sticks.append(1 - (1 - part) ** (len(shares) - 1 - place))
        left -= share
    return sticks
