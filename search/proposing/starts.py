"""Recipes known before the search: the baselines to beat, and the warm starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe import Recipe
from search.proposing.recipes import recipe_with_weights, to_point, to_recipe
from search.proposing.space import Space

UNIFORM: Final = "uniform average"
LADDER: Final = (1.0, 0.6, 0.4, 0.8, 0.2)  # scales of the warm starts, the most useful first
MOST_LEFT_OUT: Final = 8  # most donors for which leave-one-out averages are tried


def baselines(space: Space) -> dict[str, Recipe]:
    """Return the recipes of the baselines: base and models by name, and the ``UNIFORM`` average."""
    k, m = len(space.donors), len(space.models)
    plain = replace(space, units=((),), methods=("task_arithmetic",), ranges={})
    of_all = replace(plain, at_most=None)
    average = of_all.point("task_arithmetic", (round(1 / k, 6),) * k)
    weights = np.vstack([np.zeros(m), np.eye(m)])[:, None]  # of one model each, (1 + m, 1, m)
    recipes = {
        name: recipe_with_weights(plain, average, of_model)
        for name, of_model in zip((space.base, *space.models), weights, strict=True)
    }
    return {**recipes, UNIFORM: to_recipe(of_all, average)}


def warm_starts(space: Space, ranking: Sequence[int] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return labels and points to try first, the most useful first.

    They are the user's own recipes (``search.start``), the donors' average, the best donor, a
    ladder of scales, each other method at scale 1, the other donors, the base, and the averages
    that leave one donor out. Those outside the study's ranges are left out, and the last of them
    where they and the steps of a greedy soup would exceed ``space.most_starts``.

    Args:
        space: The study's.
        ranking: Indices of the donors, the best first; empty: as the study lists them. A recipe
            that may not use all donors uses the first of them.

    Raises:
        MergeError: One of the user's recipes is not in the space.
    """
    own = _own_starts(space, space.starts)
    found = [
        (label, space.point(method, weights))
        for label, method, weights in _usual_starts(space, ranking or range(len(space.donors)))
        if method in space.methods
    ]
    usual = [one for one in found if space.contains(one[1])]
    if space.most_starts is not None:
        usual = usual[: max(0, space.most_starts - soup_steps(space) - len(own))]
    return own + usual


def soup_steps(space: Space) -> int:
    """Return how many trials a greedy soup may take, at most a third of the warm starts."""
    if "task_arithmetic" not in space.methods or space.has_differences:
        return 0
    steps = len(space.donors) - 1 if len(space.donors) > 2 else 0
    return steps if space.most_starts is None else min(steps, space.most_starts // 3)


def even_weights(space: Space, some: Collection[int], each: float) -> tuple[float, ...]:
    """Return weights (k): ``each`` for some donors, zero for the others."""
    return tuple(each if index in some else 0.0 for index in range(len(space.donors)))


def _usual_starts(
    space: Space, ranking: Sequence[int]
) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """Yield label, method and weights (k) of each start, the most useful first."""
    plain, k, used = "task_arithmetic", len(space.donors), ranking[: space.used]
    donors = [(str(space.donors[one]), plain, even_weights(space, [one], 1.0)) for one in ranking]
    if k > 1:  # else both are the recipe with scale 1
        average = UNIFORM if len(used) == k else f"average of the best {len(used)}"
        yield average, plain, even_weights(space, used, round(1 / len(used), 6))
        yield donors[0]
    for scale in LADDER:
        yield f"scale {scale:g}", plain, even_weights(space, used, scale)
    for method in space.methods:
        if method != plain:
            yield f"{method} as it is", method, even_weights(space, used, 1.0)
    if k > 1:
        yield from donors[1:]
    yield "base", plain, (0.0,) * k
    if 3 <= k <= MOST_LEFT_OUT and space.used >= k - 1:
        for one in reversed(ranking):
            others = [other for other in ranking if other != one]
            label = f"average without {space.donors[one]}"
            yield label, plain, even_weights(space, others, round(1 / (k - 1), 6))


def _own_starts(space: Space, recipes: Sequence[Recipe]) -> list[tuple[str, dict[str, Any]]]:
    starts = []
    for number, recipe in enumerate(recipes, start=1):
        try:
            starts.append((f"start {number}", to_point(space, recipe)))
        except MergeError as error:
            raise MergeError(f"search.start: recipe {number}: {error}") from None
    return starts
