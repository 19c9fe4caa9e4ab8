"""Recipes that need no search: the baselines a winner has to beat, and the warm starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe import Recipe
from search.proposing.recipes import recipe_with_weights, to_point, to_recipe
from search.proposing.space import Space

UNIFORM: Final = "uniform average"
LADDER: Final = (0.2, 0.4, 0.6, 0.8, 1.0)  # scales of the warm starts


def baselines(space: Space) -> dict[str, Recipe]:
    """Return what any winner has to beat: base and models by name, and the ``UNIFORM`` average."""
    k, m = len(space.donors), len(space.models)
    whole = replace(space, units=((),), methods=("task_arithmetic",), ranges={})
    average = whole.point("task_arithmetic", (round(1 / k, 6),) * k)
    alone = np.vstack([np.zeros(m), np.eye(m)])[:, None]  # (1 + m, 1, m)
    recipes = {
        name: recipe_with_weights(whole, average, weights)
        for name, weights in zip((space.base, *space.models), alone, strict=True)
    }
    return {**recipes, UNIFORM: to_recipe(whole, average)}


def warm_starts(space: Space) -> list[tuple[str, dict[str, Any]]]:
    """Return labels and points to try first; those outside the study's ranges are left out.

    They are the base, each donor, their average, a ladder of scales, each other method at scale 1,
    and the user's own recipes (``search.start``).

    Raises:
        MergeError: One of the user's recipes is not in the space.
    """
    k = len(space.donors)
    starts: list[tuple[str, dict[str, Any]]] = []
    if "task_arithmetic" in space.methods:
        named = [("base", (0.0,) * k)]
        named += [
            (str(d), tuple(float(d == other) for other in space.donors)) for d in space.donors
        ]
        named.append((UNIFORM, (round(1 / k, 6),) * k))
        named += [(f"scale {scale:g}", (scale,) * k) for scale in LADDER]
        starts += [(label, space.point("task_arithmetic", w)) for label, w in named]
    others = [method for method in space.methods if method != "task_arithmetic"]
    starts += [(f"{method} as it is", space.point(method, (1.0,) * k)) for method in others]
    return [one for one in starts if space.contains(one[1])] + _own_starts(space, space.starts)


def _own_starts(space: Space, recipes: Sequence[Recipe]) -> list[tuple[str, dict[str, Any]]]:
    starts = []
    for number, recipe in enumerate(recipes, start=1):
        try:
            starts.append((f"start {number}", to_point(space, recipe)))
        except MergeError as error:
            raise MergeError(f"search.start: recipe {number}: {error}") from None
    return starts
