"""A merge recipe: mergekit's YAML, checked once, both ways.

What mergekit silently ignores is said here: a parameter that the chosen method does not have, or
that stands at the top level (where many published recipes have it), is applied if it can be and
noted; a key that nobody knows is refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from merge_engine.methods import METHODS, Base, Elementwise, Method
from merge_engine.methods.contract import Values
from merge_engine.parameters import Setting, dump_setting, parse_setting, value_at


class RecipeError(ValueError):
    """A recipe, or a model it names, that cannot be used; the message says where and what to do."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` if a known name is near, else the list of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def check_keys(where: str, keys: Iterable[object], known: Iterable[str]) -> None:
    """Refuse a mapping's first key that is not known.

    Raises:
        RecipeError: Names it, where it stands, and the nearest known one.
    """
    for key in keys:
        if key not in (names := tuple(known)):
            raise RecipeError(f"{where}: unknown key {key!r}{suggestion(str(key), names)}")


Settings = dict[
    str, Annotated[Setting, BeforeValidator(parse_setting), PlainSerializer(dump_setting)]
]
DtypeName = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda name: str(name).removeprefix("torch.")),
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Source(_Frozen):
    """One model of a recipe with the settings that are its own."""

    model: str
    parameters: Settings = Field(default_factory=dict)


class Recipe(_Frozen):
    """What to merge and how: field for field mergekit's configuration, plus ``seed``.

    Args:
        merge_method: A key of METHODS.
        base_model: Folder or hub id, if the method has a base.
        models: In order; the base may be among them.
        parameters: Settings for all models and tensors, weaker than a model's own.
        dtype: mergekit computes in it; this engine always computes in float32.
        out_dtype: Of the written tensors; default ``dtype``, then the donors' own.
        seed: Of random methods' masks. mergekit ignores the key and draws from its own.
    """

    merge_method: str
    base_model: str | None = None
    models: tuple[Source, ...]
    parameters: Settings = Field(default_factory=dict)
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    seed: int = 0

    @property
    def method(self) -> Method:
        """The method's row in the table."""
        return METHODS[self.merge_method]

    @property
    def _is_random(self) -> bool:
        return isinstance(self.method, Elementwise) and self.method.random

    @property
    def base(self) -> str | None:
        """The base model, for a method that starts from one."""
        return self.base_model if self.method.base is not Base.INPUT else None

    @property
    def origin(self) -> str | None:
        """The model that task vectors start from; None: the tensors themselves are merged."""
        return self.base_model if self.method.base in (Base.ORIGIN, Base.OPTIONAL) else None

    @property
    def donors(self) -> tuple[Source, ...]:
        """The merged models that are not the base, in order, one settings' owner each."""
        if self.method.base is Base.INPUT and self.base_model not in (
            None,
            *(source.model for source in self.models),
        ):
            return (*self.models, Source(model=str(self.base_model)))
        return tuple(source for source in self.models if source.model != self.base)

    @property
    def models_read(self) -> tuple[str, ...]:
        """Every model the recipe names, the base first."""
        names = [source.model for source in self.donors]
        return tuple(dict.fromkeys([self.base_model or names[0], *names]))

    @property
    def key(self) -> str:
        """A hash of all that decides the merged weights; equal recipes have equal keys."""
        parts = self.model_dump(mode="json", exclude={"dtype"})
        if not self._is_random:
            parts.pop("seed")
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def values(self, tensor: str, depth: float) -> Values:
        """The method's parameters for one tensor, by its kernel's argument names.

        Args:
            tensor: Full name of the tensor.
            depth: Of its layer, from 0 to 1 (``parameters.value_at``).

        Raises:
            RecipeError: A value is missing, of the wrong type or out of range.
        """
        return {
            f"{name}_" if name == "lambda" else name: (
                tuple(self._value(name, tensor, depth, source) for source in self.donors)
                if param.per_donor
                else self._value(name, tensor, depth, None)
            )
            for name, param in self.method.params.items()
            if param.effect
        }

    def _value(self, name: str, tensor: str, depth: float, source: Source | None) -> Any:
        param = self.method.params[name]
        owner = f"{source.model!r}: " if source else ""
        for scope in ((source.parameters,) if source else ()) + (self.parameters,):
            value = value_at(scope[name], tensor, depth) if name in scope else None
            if value is not None:
                try:
                    return param.typed(value)
                except ValueError as error:
                    raise RecipeError(
                        f"{owner}parameter {name!r} for {tensor!r}: {error}"
                    ) from None
        if param.default is None:
            raise RecipeError(
                f"{owner}{self.merge_method} needs the parameter {name!r} for {tensor!r}; "
                f"give it {'under the model or ' if source else ''}under 'parameters'"
            )
        return param.default

    def to_yaml(self) -> str:
        """The YAML that mergekit reads; ``parse_recipe`` reads it back to an equal recipe."""
        mapping = self.model_dump(mode="json", exclude_none=True)
        if not self._is_random:
            mapping.pop("seed")
        if not self.parameters:
            mapping.pop("parameters")
        for source in mapping["models"]:
            if not source["parameters"]:
                source.pop("parameters")
        return yaml.safe_dump(mapping, sort_keys=False, default_flow_style=False)


def load_recipe(path: Path) -> tuple[Recipe, list[str]]:
    """Read a recipe file; its relative folders count from the file's own.

    Returns:
        The recipe, and notes for the user: what was understood otherwise than mergekit would.

    Raises:
        RecipeError: The file is missing, is not YAML, or is no recipe.
    """
    mapping = load_yaml(path)
    recipe, notes = parse_recipe(mapping, where=str(path))
    return recipe.model_copy(update=_anchored(recipe, path.parent)), notes


def load_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: The file is missing, is not YAML, or holds something else.
    """
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise RecipeError(f"{path}: expected a mapping of keys to values")
    return mapping


def _anchored(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe's models, those that are folders beside the file as absolute paths."""

    def place(model: str) -> str:
        return str((folder / model).resolve()) if (folder / model).is_dir() else model

    return {
        "base_model": recipe.base_model and place(recipe.base_model),
        "models": tuple(
            source.model_copy(update={"model": place(source.model)}) for source in recipe.models
        ),
    }


def parse_recipe(mapping: Mapping[str, Any], where: str) -> tuple[Recipe, list[str]]:
    """Check a recipe's mapping; ``load_recipe`` without the file."""
    known_parameters = {name for method in METHODS.values() for name in method.params}
    for name in _LATER & set(mapping):
        raise RecipeError(f"{where}: {name!r} is not supported yet; use 'models'")
    check_keys(where, mapping, {*Recipe.model_fields, *known_parameters})
    if (method := mapping.get("merge_method")) not in METHODS:
        raise RecipeError(
            f"{where}: unknown merge_method {method!r}{suggestion(str(method), METHODS)}"
        )
    mapping, notes = _with_flat_parameters(mapping, known_parameters)
    for index, source in enumerate(_sources(mapping, where)):
        check_keys(f"{where}: models[{index}]", source, Source.model_fields)
    try:
        recipe = Recipe.model_validate(mapping)
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_error(error)}") from None
    for place, settings in _scopes(recipe):
        check_keys(f"{where}: {place}", settings, known_parameters)
        notes += _idle_parameters(recipe, place, settings)
    _check_inputs(recipe, where)
    return recipe, notes


_LATER = {"slices", "modules", "tokenizer", "tokenizer_source", "chat_template"}


def first_error(error: ValidationError) -> str:
    """The first of pydantic's complaints in one line: where, what, what was got."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']} (got {first['input']!r})"


def _sources(mapping: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]]:
    sources = mapping.get("models")
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise RecipeError(f"{where}: 'models' has to be a list of '- model: NAME' entries")
    return sources


def _with_flat_parameters(
    mapping: Mapping[str, Any], known: set[str]
) -> tuple[dict[str, Any], list[str]]:
    """Move parameters from the top level, where mergekit ignores them, to where they count."""
    flat = {name: value for name, value in mapping.items() if name in known}
    rest = {name: value for name, value in mapping.items() if name not in known}
    notes = [
        f"{name}: {value!r} stands at the top level, where mergekit ignores it; "
        "read here as if under 'parameters'"
        for name, value in flat.items()
    ]
    return rest | ({"parameters": flat | (rest.get("parameters") or {})} if flat else {}), notes


def _scopes(recipe: Recipe) -> list[tuple[str, Settings]]:
    own = [(f"models[{i}] parameters", source.parameters) for i, source in enumerate(recipe.models)]
    return [("parameters", recipe.parameters), *own]


def _idle_parameters(recipe: Recipe, place: str, settings: Settings) -> list[str]:
    """Notes on the settings that change nothing."""
    notes = []
    for name in settings:
        param = recipe.method.params.get(name)
        if param is None:
            notes.append(f"{place}: {recipe.merge_method} has no parameter {name!r}; no effect")
        elif not param.effect:
            notes.append(f"{place}: {name!r} changes nothing in {recipe.merge_method}")
        elif place != "parameters" and not param.per_donor:
            notes.append(f"{place}: {name!r} counts only under the recipe's own 'parameters'")
    return notes


def _check_inputs(recipe: Recipe, where: str) -> None:
    names = [source.model for source in recipe.models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"{where}: {repeated} listed more than once; give each model one entry")
    method, base = recipe.method, recipe.base_model
    if method.base in (Base.ORIGIN, Base.ENDPOINT) and base is None:
        raise RecipeError(f"{where}: {recipe.merge_method} needs a base_model; name one")
    if method.base is Base.ENDPOINT and base not in names:
        raise RecipeError(
            f"{where}: {recipe.merge_method} starts from base_model {base!r}, "
            "which has to be one of 'models'"
        )
    fewest, most = method.donors
    count = len(recipe.donors) + (method.base is Base.ENDPOINT)
    if count < fewest or (most is not None and count > most):
        wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        besides = " besides the base" if recipe.origin else ""
        raise RecipeError(
            f"{where}: {recipe.merge_method} takes {wanted} models{besides}, got {count}"
        )
