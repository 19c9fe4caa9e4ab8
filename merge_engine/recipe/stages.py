"""Read files of several recipes, in which a recipe may use another's result as a model.

Such a file has several YAML documents, as in mergekit-multi: each has a ``name``, which the others
use in place of a folder or hub id. Only the result may lack one. The older mergekit-mega has
``out_path`` instead of a name. A file of a single recipe is one stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from merge_engine.errors import MergeError
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import absolute_in, parse_recipe, rename_models
from merge_engine.schema import dump_yaml, load_documents


@dataclass(frozen=True)
class Stage:
    """One recipe of a file, in which models may be other recipes' names."""

    where: str  # the file and, where it has several documents, which one: for messages
    name: str  # empty where it has none
    recipe: Recipe
    uses: frozenset[str]  # names of the stages whose results it merges
    text: str = ""  # YAML of the stage and of all stages that it is built from
    needed: bool = True  # whether it is the file's result, or part of it

    def placed(self, folder: Path) -> Recipe:
        """Return the recipe with the used stages' results in ``folder`` as models."""
        return rename_models(self.recipe, lambda m: str(folder / m) if m in self.uses else m)


def load_stages(path: Path) -> tuple[list[Stage], list[str]]:
    """Read a file of one recipe or several; relative folders are relative to the file.

    Returns:
        The recipes in an order in which they can be built, the result last; and notes for the user.

    Raises:
        MergeError: The file is missing, is not YAML, a document is not a recipe, or they use one
            another in a circle.
    """
    documents = _with_names(load_documents(path))
    names = _names(documents, path)
    notes: list[str] = []
    found: dict[str, Stage] = {}
    for index, (document, name) in enumerate(zip(documents, names, strict=True)):
        where = _where(path, index, names)
        body = {key: value for key, value in document.items() if key != "name"}
        recipe, own_notes = parse_recipe(body, where, absolute_in(path.parent, other_than=names))
        several = f"{where}: " if len(documents) > 1 else ""
        notes += [several + note for note in own_notes]
        found[name] = Stage(where, name, recipe, frozenset(_models(recipe) & {*names}))
    order = _order(found, path)
    if len(order) == 1:
        return [replace(order[0], text=order[0].recipe.to_yaml())], notes
    stages = [
        replace(s, text=_text(s, order), needed=s in _sources(order[-1], order)) for s in order
    ]
    notes += [
        f"{stage.where}: the result does not use it; built only with --intermediate-dir"
        for stage in stages
        if not stage.needed
    ]
    return stages, notes


def _with_names(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return documents with names in place of the ``out_path`` of the older mergekit-mega."""
    paths = [document.get("out_path") for document in documents]
    names = {path: Path(path).name for path in paths if isinstance(path, str)}

    def named(part: Any) -> Any:
        if isinstance(part, list):
            return [named(each) for each in part]
        if isinstance(part, dict):
            return {key: named(each) for key, each in part.items()}
        return names.get(part, part) if isinstance(part, str) else part

    keys = {"out_path": "name"} if names else {}
    return [{keys.get(key, key): named(part) for key, part in each.items()} for each in documents]


def _names(documents: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    """Return the documents' names, which are folders' too; empty for the one without a name."""
    names: list[str] = []
    for index, document in enumerate(documents):
        name = document.get("name", "")
        if not isinstance(name, str) or not _is_folder_name(name):
            raise MergeError(
                f"{path}: document {index + 1}: name {name!r} has to be a text that can be a "
                "folder's name, without '/' and '+'"
            )
        if name in names:
            both = f"{path}: documents {names.index(name) + 1} and {index + 1}"
            if name:
                raise MergeError(f"{both} have the same name {name!r}; rename one")
            raise MergeError(f"{both} have no name; only the result may go without: name one")
        names.append(name)
    return names


def _is_folder_name(name: str) -> bool:
    return name not in (".", "..") and not set(name) & set("/\\:+\n")


def _where(path: Path, index: int, names: Sequence[str]) -> str:
    if len(names) == 1:
        return str(path)
    name = f" ({names[index]!r})" if names[index] else ""
    return f"{path}: document {index + 1}{name}"


def _models(recipe: Recipe) -> set[str]:
    """Return every model that a recipe names, base and adapter one by one."""
    found = set()

    def note(model: str) -> str:
        found.add(model)
        return model

    rename_models(recipe, note)
    return found


def _order(stages: Mapping[str, Stage], path: Path) -> list[Stage]:
    """Return the stages in an order in which they can be built, the result last."""
    used = {name for stage in stages.values() for name in stage.uses}
    sorter = TopologicalSorter({name: sorted(stage.uses) for name, stage in stages.items()})
    try:
        order = list(sorter.static_order())
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise MergeError(f"{path}: documents use one another in a circle: {circle}") from None
    result = "" if "" in stages else [name for name in stages if name not in used][-1]
    return [stages[name] for name in (*(name for name in order if name != result), result)]


def _sources(stage: Stage, order: Iterable[Stage]) -> list[Stage]:
    """Return a stage and all that it is built from, in order."""
    wanted, found = {stage.name}, []
    for each in reversed([*order]):
        if each.name in wanted:
            wanted |= each.uses
            found.append(each)
    return found[::-1]


def _text(stage: Stage, order: Iterable[Stage]) -> str:
    return "---\n".join(
        (dump_yaml({"name": each.name}) if each.name else "") + each.recipe.to_yaml()
        for each in _sources(stage, order)
    )
