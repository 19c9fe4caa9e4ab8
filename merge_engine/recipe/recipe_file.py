"""Read recipes from mergekit's YAML, check them, and note what is read differently.

mergekit silently ignores parameters that the method does not have or that are at the top level
(as in many published recipes). Here they are applied where they can be, and noted; unknown keys are
refused with the closest known one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from merge_engine.errors import MergeError, check_keys, first_error, suggestion
from merge_engine.methods import METHODS, Base
from merge_engine.recipe.recipe import (
    Module,
    Recipe,
    Settings,
    Slice,
    SliceSource,
    Source,
    Token,
    Tokenizer,
)
from merge_engine.schema import find_folder, load_yaml

_Part = TypeVar("_Part", bound=BaseModel)


def load_recipe(path: Path) -> tuple[Recipe, list[str]]:
    """Read a recipe file; relative folders are relative to the file.

    Returns:
        The recipe, and notes for the user on what is read differently from mergekit.

    Raises:
        MergeError: The file is missing, is not YAML, or is not a recipe.
    """
    return parse_recipe(load_yaml(path), str(path), absolute_in(path.parent))


def absolute_in(folder: Path, other_than: Collection[str] = ()) -> Callable[[str], str]:
    """Return a function from a model to its absolute path, if it is a folder relative to this one.

    Names in ``other_than`` are not models and stay as they are.
    """

    def rename(model: str) -> str:
        found = None if model in other_than else find_folder(model, folder)
        return str(found.resolve()) if found else model

    return rename


def rename_models(part: _Part, rename: Callable[[str], str]) -> _Part:
    """Return a recipe, or a part of one, with every model renamed.

    If ``base+adapter`` is not renamed as a whole, its parts are.
    """

    def rename_parts(model: str) -> str:
        renamed = rename(model)
        return "+".join(map(rename, model.split("+"))) if renamed == model else renamed

    changed: _Part = _rename_models(part, rename_parts)
    return changed


def _rename_models(part: Any, rename: Callable[[str], str]) -> Any:
    """Return a part of a recipe with every model name replaced."""
    if isinstance(part, tuple):
        return tuple(_rename_models(entry, rename) for entry in part)
    if isinstance(part, dict):
        return {name: _rename_models(entry, rename) for name, entry in part.items()}
    if not isinstance(part, BaseModel):
        return part
    changes = {}
    for name, value in part:
        if not isinstance(value, str):
            changes[name] = _rename_models(value, rename)
        elif name in ("model", "base_model") or isinstance(part, Token):
            changes[name] = rename(value)
        elif name in ("source", "tokenizer_source"):
            changes[name] = value if value in ("base", "union") else rename(value)
    return part.model_copy(update=changes)


def is_recipe(mapping: Mapping[str, Any]) -> bool:
    """Return whether a YAML document is a recipe, or another tool's merge configuration."""
    return "merge_method" in mapping or any(key in mapping for key in _OTHER_TOOLS)


def parse_recipe(
    mapping: Mapping[str, Any], where: str, rename: Callable[[str], str] = str
) -> tuple[Recipe, list[str]]:
    """Check a recipe's mapping, as YAML gives it.

    Args:
        mapping: The recipe.
        where: Where it is from, for messages.
        rename: Gives a model the name that it has in the result, so that one model has one.

    Returns:
        The recipe, and notes for the user on what is read differently from mergekit.

    Raises:
        MergeError: It is not a recipe; the message says which key is wrong and how to fix it.
    """
    known_parameters = {name for method in METHODS.values() for name in method.params}
    _check_form(mapping, known_parameters, where)
    mapping, notes = _with_flat_parameters(mapping, known_parameters, where)
    mapping, ignored = _without_residual_weights(mapping)
    for path, entry, kind in (*_entries(mapping, where), *tokenizer_entries(mapping, where)):
        check_keys(path, entry, kind.model_fields)
    try:
        recipe = rename_models(Recipe.model_validate(mapping), rename)
    except ValidationError as error:
        raise MergeError(f"{where}: {first_error(error)}") from None
    for path, settings in _scopes(recipe, ""):
        check_keys(f"{where}: {path}", settings, known_parameters)
        notes += _ignored_parameters(recipe, path, settings)
    _check_parts(recipe, where)
    return recipe, notes + ignored


def _check_form(mapping: Mapping[str, Any], parameters: set[str], where: str) -> None:
    """Refuse other tools' configurations, unknown keys and methods, and more forms than one."""
    for key, (tool, advice) in _OTHER_TOOLS.items():
        if key in mapping and "merge_method" not in mapping:
            raise MergeError(f"{where}: {key!r} makes it a configuration of {tool}; {advice}")
    check_keys(where, mapping, {*Recipe.model_fields, *parameters})
    if not isinstance(method := mapping.get("merge_method"), str) or method not in METHODS:
        raise MergeError(
            f"{where}: unknown merge_method {method!r}{suggestion(str(method), METHODS)}"
        )
    forms = ("models", "slices", "modules")
    given = [form for form in forms if mapping.get(form) not in (None, [], {})]
    if len(given) != 1:
        found = f"it has {' and '.join(given)}" if given else "it has none"
        raise MergeError(f"{where}: a recipe has one of models, slices and modules; {found}")


_TO_EXPERTS = "build it with mergekit-moe: dense models are not made into experts here"
_OTHER_TOOLS = {  # by a key that only their configurations have
    "gate_mode": ("mergekit-moe", _TO_EXPERTS),
    "experts": ("mergekit-moe", _TO_EXPERTS),
    "genome": ("mergekit-evolve", "`mergesearch init` writes a study, which searches recipes"),
}
_LISTS: Mapping[str, type[BaseModel]] = {"models": Source, "slices": Slice, "sources": SliceSource}
_EXAMPLES = {
    "models": "'- model: NAME' entries",
    "slices": "'- sources: [...]' entries",
    "sources": "'- {model: NAME, layer_range: [0, 8]}' entries",
}


def _entries(mapping: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    """Yield the path of each mapping nested in a recipe, the mapping, and the model it must fit."""
    for name, kind in _LISTS.items():
        if (entries := mapping.get(name)) is None:
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise MergeError(f"{path}: {name!r} has to be a list of {_EXAMPLES[name]}")
        for index, entry in enumerate(entries):
            yield f"{path}: {name}[{index}]", entry, kind
            yield from _entries(entry, f"{path}: {name}[{index}]")
    for name, module in _mapping(mapping, "modules", path).items():
        if not isinstance(module, dict):
            raise MergeError(
                f"{path}: modules.{name} has to be a mapping with 'models' or 'slices'"
            )
        yield f"{path}: modules.{name}", module, Module
        yield from _entries(module, f"{path}: modules.{name}")


def tokenizer_entries(
    mapping: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    """Yield the path of each mapping under ``tokenizer``, it, and the model it must fit.

    Raises:
        MergeError: It is not a mapping, or ``tokenizer_source`` is given, too.
    """
    if (raw := mapping.get("tokenizer")) is None:
        return
    if mapping.get("tokenizer_source") is not None:
        raise MergeError(f"{path}: it has both tokenizer and tokenizer_source; keep one")
    if not isinstance(raw, dict):
        raise MergeError(
            f"{path}: tokenizer has to be a mapping; to name a source only, use tokenizer_source"
        )
    yield f"{path}: tokenizer", raw, Tokenizer
    for token, entry in _mapping(raw, "tokens", f"{path}: tokenizer").items():
        if isinstance(entry, dict):
            yield f"{path}: tokenizer.tokens.{token}", entry, Token


def _without_residual_weights(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Remove the ``residual_weight`` of slices, which mergekit reads and never uses."""

    def strip(raw: Any) -> Any:
        if isinstance(raw, list):
            return [strip(entry) for entry in raw]
        if isinstance(raw, dict):
            return {
                name: strip(entry)
                for name, entry in raw.items()
                if name != "residual_weight" or "sources" not in raw
            }
        return raw

    stripped = strip(dict(mapping))
    changed = stripped != mapping
    return stripped, ["residual_weight has no effect, as in mergekit"] * changed


def _mapping(part: Mapping[str, Any], name: str, path: str) -> dict[str, Any]:
    """Return the mapping under a key, empty if there is none; refuse anything else."""
    found = part.get(name)
    if found is not None and not isinstance(found, dict):
        raise MergeError(f"{path}: {name!r} has to be a mapping (got {found!r})")
    return found or {}


def _with_flat_parameters(
    mapping: Mapping[str, Any], known: set[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Move parameters from the top level, where mergekit ignores them, to ``parameters``."""
    flat = {name: value for name, value in mapping.items() if name in known}
    rest = {name: value for name, value in mapping.items() if name not in known}
    notes = [
        f"{name}: {value!r} is at the top level, where mergekit ignores it; "
        "applied here as if under 'parameters'"
        for name, value in flat.items()
    ]
    if not flat:
        return rest, notes
    return rest | {"parameters": flat | _mapping(rest, "parameters", where)}, notes


def _scopes(part: Any, path: str) -> Iterator[tuple[str, Settings]]:
    """Yield every ``parameters`` mapping of a recipe with its path."""
    yield f"{path}parameters", part.parameters
    lists = {name: getattr(part, name, ()) for name in ("models", "slices", "sources")}
    for name, entries in lists.items():
        for index, entry in enumerate(entries):
            yield from _scopes(entry, f"{path}{name}[{index}] ")
    for name, module in getattr(part, "modules", {}).items():
        yield from _scopes(module, f"{path}modules.{name} ")


def _ignored_parameters(recipe: Recipe, path: str, settings: Settings) -> list[str]:
    """Return notes on the settings that have no effect."""
    notes = []
    for name in settings:
        param = recipe.method.params.get(name)
        if param is None:
            notes.append(f"{path}: {recipe.merge_method} has no parameter {name!r}; no effect")
        elif not param.effect:
            notes.append(f"{path}: {name!r} has no effect in {recipe.merge_method}")
        elif not param.per_donor and re.search(r"(models|sources)\[\d+\] parameters$", path):
            notes.append(f"{path}: {name!r} is read only from the recipe's own 'parameters'")
    return notes


def _check_parts(recipe: Recipe, where: str) -> None:
    """Refuse parts that cannot be merged, before any model is opened."""
    if len(recipe.modules) > 1:
        # Which tensors a module has is known only to mergekit's architecture files.
        raise MergeError(
            f"{where}: modules {', '.join(recipe.modules)}: several are not supported; "
            "write 'models', which merges every module, and set what differs between them by "
            "'filter' entries on tensor names"
        )
    parts = recipe.parts
    if not parts:
        raise MergeError(f"{where}: modules need 'slices' or 'models'")
    if len(parts) > 1 and any(part.layers is None for part in parts):
        raise MergeError(f"{where}: a module has either models or slices; keep one")
    for part in parts:
        path = where if part.path == "models" else f"{where}: {part.path}"
        _check_inputs(part.recipe, path)
        if part.layers:
            _check_layers(part.layers, path)


def _check_layers(layers: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse ranges of a slice that are reversed or differ in length."""
    first = next(iter(layers))
    for model, (start, end) in layers.items():
        if end < start:
            raise MergeError(
                f"{where}: {model!r}: layer_range [{start}, {end}] ends before it starts; "
                "it is [first, last + 1]"
            )
        if end - start != layers[first][1] - layers[first][0]:
            raise MergeError(
                f"{where}: {model!r} gives {end - start} layers and {first!r} "
                f"{layers[first][1] - layers[first][0]}; a slice takes equally many of each"
            )


def _check_inputs(recipe: Recipe, where: str) -> None:
    """Refuse repeated models, a missing base, and a number of models the method does not take."""
    names = [source.model for source in recipe.models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise MergeError(f"{where}: {repeated} listed more than once; give each model one entry")
    method, base = recipe.method, recipe.base_model
    if method.base in (Base.ORIGIN, Base.ENDPOINT) and base is None:
        among = " and list it among the slice's sources" if "slices[" in where else ""
        raise MergeError(f"{where}: {recipe.merge_method} needs a base_model; name one{among}")
    fewest, most = method.donors
    count = len(recipe.donors) + (method.base is Base.ENDPOINT)
    if count < fewest or (most is not None and count > most):
        wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        besides = " besides the base" if recipe.origin else ""
        base_counts = method.base is Base.INPUT and base not in (None, *names)
        raise MergeError(
            f"{where}: {recipe.merge_method} takes {wanted} model{'s' * (fewest != 1)}{besides}, "
            f"got {count}{'; base_model counts as one: leave it out' * base_counts}"
        )
