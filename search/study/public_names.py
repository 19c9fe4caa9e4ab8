"""Replace local paths by short names in everything that may be published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import escape

from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import rename_models
from search.study.spec import StudySpec


def public_names(spec: StudySpec) -> dict[str, str]:
    """Map each absolute path in a study to ``./`` and its shortest unique end."""
    paths = sorted({*_paths(spec.model_dump(mode="json"))})
    return {path: _shortest(path, paths) for path in paths}


def _paths(part: Any) -> Iterator[str]:
    if isinstance(part, str) and part.startswith("/"):
        yield from [part] if Path(part).exists() else part.split("+")
    elif isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _paths(inner)


def _shortest(path: str, others: list[str]) -> str:
    parts = Path(path).parts[1:]
    for count in range(1, len(parts) + 1):
        if sum(Path(other).parts[1:][-count:] == parts[-count:] for other in others) == 1:
            return f"./{'/'.join(parts[-count:])}"
    return "./"


def renamed(part: Any, names: Mapping[str, str]) -> Any:
    """Return JSON data with every key or string that is in ``names``, or ``a+b``, renamed."""
    if isinstance(part, dict):
        return {renamed(key, names): renamed(value, names) for key, value in part.items()}
    if isinstance(part, list):
        return [renamed(entry, names) for entry in part]
    if not isinstance(part, str):
        return part
    return names.get(part) or "+".join(names.get(each, each) for each in part.split("+"))


def public_recipe(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """Return a recipe that names folders without their paths."""
    return rename_models(recipe, lambda model: names.get(model, model))


def without_paths(text: str, names: Mapping[str, str]) -> str:
    """Replace all paths in a text or page by their names, and the home folder by ``~``."""
    known = {**names, str(Path.home()): "~"}
    known |= {str(escape(path)): str(escape(name)) for path, name in known.items()}
    known.pop("/", None)
    longest_first = sorted(known, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(rf"(?:{pattern})(?![\w-])", lambda match: known[match[0]], text)
