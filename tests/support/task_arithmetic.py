"""A recipe of two donors, for tests."""

from typing import Any

from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import parse_recipe

TASK_ARITHMETIC: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 1.0}},
        {"model": "b", "parameters": {"weight": [0.3, 0.7]}},
    ],
}


def parsed(**changes: Any) -> tuple[Recipe, list[str]]:
    """Parse the recipe with some keys changed."""
    return parse_recipe({**TASK_ARITHMETIC, **changes}, "r.yaml")
