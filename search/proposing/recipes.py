"""Points of a search space as merge recipes, and recipes as points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from merge_engine.errors import MergeError
from merge_engine.methods import METHODS, Base, Param
from merge_engine.recipe.recipe import Recipe
from search.proposing.mixture import heaviest
from search.proposing.space import Point, Space
from search.racing.race import Floats


def to_recipe(space: Space, point: Point) -> Recipe:
    """Return the recipe at a point; parameters that its method does not have are left out.

    Weights tuned by gradient may be negative. Methods that average clip them at zero.
    """
    if space.tuned is None or not point.get("strength"):
        return recipe_with_weights(space, point, space.weights([point])[0] @ space.signs)
    weights = merged_weights(space, point)
    scales = weights.sum(axis=1) / space.used
    fine = replace(space, units=space.tuned.units.filters)
    return recipe_with_weights(fine, point, weights @ space.signs, scales.tolist())


def merged_weights(space: Space, point: Point) -> Floats:
    """Return the donors' weights (U, k) with which a point's method merges tuned units."""
    weights, method = space.tuned_weights(point), str(point["method"])
    if "lambda" not in METHODS[method].params or _normalizes(space, point, method):
        return np.maximum(weights, 0.0)
    return weights


def is_tuned(point: Point) -> bool:
    """Return whether the recipe at a point has weights tuned by gradient."""
    method = METHODS[str(point["method"])]
    weighted = "weight" in method.params or method.base is Base.ENDPOINT
    return weighted and bool(point.get("strength"))


def recipe_with_weights(
    space: Space, point: Point, of_models: Floats, scales: Sequence[float] = ()
) -> Recipe:
    """Return the recipe with a point's method and parameters and these weights.

    Args:
        space: The study's.
        point: Its weights are not used.
        of_models: Weights of the m models in each of the u units, (u, m).
        scales: Mean weight of ``space.used`` donors in each unit, (u); default: the point's.
    """
    rounded = of_models.round(6) + 0.0  # which makes -0.0 zero
    weights: list[tuple[float, ...]] = [*map(tuple, rounded.tolist())]
    scales = scales or [space.scale_of(point, unit) for unit in range(len(space.units))]
    method = str(point["method"])
    chosen = _chosen(space, method, weights)
    if METHODS[method].base is Base.ENDPOINT:
        return _arc(space, method, weights, chosen)
    shared = _shared_parameters(space, point, method)
    params = METHODS[method].params
    if "weight" in params and ("lambda" not in params or shared.get("normalize")):
        # Only the ratio of the weights counts here; the scale is lambda's, if there is one.
        weights = [
            tuple(round(w / scale, 6) if scale else 1.0 for w in unit)
            for unit, scale in zip(weights, scales, strict=True)
        ]
        if "lambda" in params:
            shared["lambda"] = _setting(space, [round(scale, 6) for scale in scales])
    base, models = _inputs(space, method, chosen, weights)
    return _recipe(space, method, base, models, shared)


def _normalizes(space: Space, point: Point, method: str) -> bool:
    return bool(_shared_parameters(space, point, method).get("normalize"))


def _shared_parameters(space: Space, point: Point, method: str) -> dict[str, Any]:
    """Return the parameters that are equal for all donors: the point's, else the defaults."""
    params = METHODS[method].params
    shared: dict[str, Any] = {
        name: param.default
        for name, param in params.items()
        if param.default is not None and not param.per_donor
    }
    shared |= {
        name: _value(space.value(point, name), params[name]) for name in space.params_of(method)
    }
    if {"density", "epsilon"} <= params.keys():
        known = {name: param.default for name, param in params.items()} | shared
        shared["epsilon"] = _within(known["epsilon"], known["density"])
    return shared


def _chosen(space: Space, method: str, weights: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the models that the recipe names.

    At most as many as the method takes and ``space.at_most`` allows. If the vocabulary is made of
    all models, those without weight are named, too.
    """
    count, row = len(space.models), METHODS[method]
    most = min(row.donors[1] or count, count)
    all_named = space.tokenizer is not None and "weight" in row.params
    if space.at_most and not all_named and not space.has_differences:
        most = min(most, space.at_most)
    return np.flatnonzero(heaviest(np.array([weights]), most)).tolist()


def _arc(
    space: Space, method: str, weights: Sequence[Sequence[float]], chosen: Sequence[int]
) -> Recipe:
    """Return the interpolation (slerp) from the first chosen model to the second."""
    first, second = chosen
    shares = [
        round(unit[second] / both, 6) if (both := unit[first] + unit[second]) else 0.5
        for unit in weights
    ]
    ends = [{"model": space.models[i]} for i in (first, second)]
    return _recipe(space, method, space.models[first], ends, {"t": _setting(space, shares)})


def _inputs(
    space: Space, method: str, chosen: Sequence[int], weights: Sequence[Sequence[float]]
) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the recipe's base model and its list of models with their weights."""
    weighted = "weight" in METHODS[method].params
    models: list[dict[str, Any]] = [
        {"model": space.models[i]}
        | (
            {"parameters": {"weight": _setting(space, [unit[i] for unit in weights])}}
            if weighted
            else {}
        )
        for i in chosen
    ]
    if METHODS[method].base is not Base.INPUT:
        return space.base, models
    if weighted:  # the base at weight zero, so that config and tokenizer are the base's
        return space.base, [{"model": space.base, "parameters": {"weight": 0.0}}, *models]
    return None, models  # a base would be merged as one more model


def _recipe(
    space: Space,
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
            "out_dtype": space.dtype,
            "tokenizer": space.tokenizer,
            "seed": space.seed,
        }
    )


def _setting(space: Space, by_unit: Sequence[float]) -> Any:
    """Return a recipe's setting with one value per unit of the model."""
    if len(by_unit) == 1:
        return by_unit[0]
    clauses = [
        {"filter": name, "value": value}
        for filters, value in zip(space.units, by_unit, strict=True)
        for name in filters
    ]
    return [*clauses, {"value": by_unit[-1]}]


def _value(value: float, param: Param) -> float | bool | int:
    """Round a value to six digits and convert it to the parameter's type."""
    return param.kind(float(f"{value:.6g}")) if param.kind is not bool else value >= 0.5


def _within(epsilon: float, density: float) -> float:
    """Return the half width nearest to epsilon that keeps density +- it inside of (0, 1)."""
    if not 0 < density < 1:
        return epsilon
    widest = math.floor(min(density, 1 - density) * 1e6 - 1) / 1e6
    return min(epsilon, max(widest, 0.0))


def to_point(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Return the point with a recipe's method, weights and parameters in every unit.

    Raises:
        MergeError: The recipe has another model or method, or is outside the study's ranges.
    """
    models = [source.model for source in recipe.donors]
    if recipe.method.base is Base.ENDPOINT:
        models = [str(recipe.base_model), *models]
    units = [recipe.values((*unit, "")[0], 0.0) for unit in space.units]
    added = [
        dict(zip(models, _added(values, len(models), space.used), strict=True)) for values in units
    ]
    _check_known(space, recipe.merge_method, added)
    of_models = np.array([[unit.get(m, 0.0) for m in space.models] for unit in added])
    weights = _donor_weights(space, of_models).tolist()
    known = {n: float(np.mean(units[-1][n])) for n in space.ranges if n in units[-1]}
    point = space.point_by_unit(recipe.merge_method, weights, known)
    if not space.contains(point):
        raise MergeError(f"it is outside the study's ranges: {point}; widen them, or leave it out")
    return point


def _check_known(space: Space, method: str, added: Sequence[Mapping[str, float]]) -> None:
    """Refuse a recipe with a method or a weighted model that is not the study's."""
    # The base may be named for its tokenizer alone.
    named = {m for unit in added for m, weight in unit.items() if weight or m != space.base}
    unknown = sorted(named - {*space.models})
    if unknown or method not in space.methods:
        what = repr(unknown[0]) if unknown else f"method {method!r}"
        raise MergeError(f"it has {what}, which the study does not have; leave it out")


def _added(values: Mapping[str, Any], count: int, used: int) -> list[float]:
    """Return the effective weight of each of a recipe's ``count`` models.

    If only the ratio of the weights counts, they are scaled to sum to ``used``.
    """
    even = (1 - values["t"], values["t"]) if "t" in values and count == 2 else (1.0,) * count
    weights = values.get("weight", even)
    if "lambda_" not in values or values["normalize"]:
        total = sum(weights) or 1.0
        weights = [weight * used / total for weight in weights]
    return [weight * values.get("lambda_", 1.0) for weight in weights]


def _donor_weights(space: Space, of_models: Floats) -> Floats:
    """Return the weights (u, k) of the donors that add up to weights (u, m) of the models."""
    from scipy.optimize import nnls  # slow to import

    if not space.has_differences:
        return of_models
    found = [nnls(space.signs.T, of_unit) for of_unit in of_models]
    if max(distance for _, distance in found) > 1e-5:
        raise MergeError(f"it is not a sum of {', '.join(map(str, space.donors))}")
    return np.array([weights.round(9) for weights, _ in found])  # so that a bound is exact
