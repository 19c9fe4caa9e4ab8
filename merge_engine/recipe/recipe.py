"""A merge recipe: mergekit's YAML, checked once, both ways.

What mergekit silently ignores is said here: a parameter that the chosen method does not have, or
that stands at the top level (where many published recipes have it), is applied if it can be and
noted; a key that nobody knows is refused with the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from merge_engine.errors import MergeError, check_keys, first_error, suggestion
from merge_engine.methods import METHODS, Base, Elementwise, Method
from merge_engine.methods.contract import Values
from merge_engine.recipe.settings import Setting, dump_setting, parse_setting, value_at

Settings = dict[
    str, Annotated[Setting, BeforeValidator(parse_setting), PlainSerializer(dump_setting)]
]
DtypeName = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda name: str(name).removeprefix("torch.")),
]


def _model_name(raw: object) -> object:
    """The string that means the same as mergekit's mapping form of a model."""
    if not isinstance(raw, dict):
        return raw
    if set(raw) <= {"path", "revision"} and "path" in raw:
        return f"{raw['path']}@{raw['revision']}" if raw.get("revision") else str(raw["path"])
    if set(raw) <= {"model", "lora"} and "model" in raw:
        parts = [raw["model"], raw["lora"]] if raw.get("lora") else [raw["model"]]
        return "+".join(str(_model_name(part)) for part in parts)
    raise ValueError("a model is a name, {path, revision} or {model, lora}")


ModelName = Annotated[str, BeforeValidator(_model_name)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Source(_Frozen):
    """One model of a recipe with the settings that are its own."""

    model: ModelName
    parameters: Settings = {}


class SliceSource(Source):
    """One model's layers in a slice: from the first number up to but without the second."""

    layer_range: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Slice(_Frozen):
    """A run of the result's layers, merged from as many layers of each source."""

    sources: Annotated[tuple[SliceSource, ...], Field(min_length=1)]
    base_model: ModelName | None = None
    parameters: Settings = {}


class Module(_Frozen):
    """What mergekit calls a part of a model with layers of its own; most models are one."""

    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Settings = {}


class TokenOfModel(_Frozen):
    """The row that a model has for a token of its own, by text or by number."""

    kind: Literal["model_token"]
    model: ModelName
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _names_one(self) -> TokenOfModel:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give either token or token_id")
        return self


class ZeroRow(_Frozen):
    """A row of zeros."""

    kind: Literal["zero"]


class Token(_Frozen):
    """Where the row of one token comes from in models that lack it; ``force``: in all."""

    source: TokenOfModel | ZeroRow | ModelName | None = None
    force: bool = False


class Tokenizer(_Frozen):
    """The result's vocabulary: ``union``, ``base`` or a model's."""

    source: ModelName = "union"
    tokens: dict[str, Token] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None


class FlatPart(NamedTuple):
    """A run of the result's layers as a recipe in the ``models`` form."""

    place: str  # in the recipe, for messages
    recipe: Recipe
    layers: Mapping[str, tuple[int, int]] | None  # each model's; None: every layer it has


class Recipe(_Frozen):
    """What to merge and how: field for field mergekit's configuration, plus ``seed``.

    Exactly one of ``models``, ``slices`` and ``modules`` is given. ``parts`` is what they have in
    common; a recipe in the ``models`` form is its own only part.

    Args:
        merge_method: A key of METHODS.
        base_model: Folder or hub id, if the method has a base. The result gets its config.
        models: In order; the base may be among them.
        slices: The result's layers from the first to the last, stacked.
        modules: One module's models or slices, by its name.
        parameters: Settings for all models and tensors, weaker than a model's own.
        dtype: mergekit computes in it; this engine always computes in float32.
        out_dtype: Of the written tensors; default ``dtype``, then the donors' own.
        tokenizer_source: Short for ``tokenizer`` with this source alone.
        tokenizer: The result's vocabulary; default: the base's, and the models have to share it.
        chat_template: ``auto`` (the models' most frequent), ``chatml``, or a template's text.
        seed: Of random methods' masks. mergekit ignores the key and draws from its own.
    """

    merge_method: str
    base_model: ModelName | None = None
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: dict[str, Module] = {}
    parameters: Settings = {}
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    tokenizer_source: ModelName | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: int = 0

    @property
    def vocabulary(self) -> Tokenizer | None:
        """What is said of the result's vocabulary, in either way."""
        source = self.tokenizer_source
        return Tokenizer(source=source) if source is not None else self.tokenizer

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
    def parts(self) -> tuple[FlatPart, ...]:
        """The runs of layers the result is stacked from, each as a recipe of its own.

        A weaker scope's clauses stand behind a stronger one's: the first match wins all the same.
        """
        if self.models:
            return (FlatPart("models", self, None),)
        found = list(self._slices("", self.slices, {}))
        for name, module in self.modules.items():
            place = f"modules.{name}."
            if module.models:
                flat = self._flat(module.models, self.base_model, module.parameters)
                found.append(FlatPart(f"{place}models", flat, None))
            found += self._slices(place, module.slices, module.parameters)
        return tuple(found)

    def _slices(
        self, place: str, slices: tuple[Slice, ...], of_module: Settings
    ) -> Iterator[FlatPart]:
        for index, part in enumerate(slices):
            base = part.base_model or self.base_model
            if base not in [source.model for source in part.sources]:
                base = None  # no layers of it are named, so it takes no part
            scopes = _joined(part.parameters, of_module)
            yield FlatPart(
                f"{place}slices[{index}]",
                self._flat(part.sources, base, scopes),
                {source.model: source.layer_range for source in part.sources},
            )

    def _flat(self, models: Sequence[Source], base: str | None, scopes: Settings) -> Recipe:
        own = {
            "models": tuple(models),
            "base_model": base,
            "parameters": _joined(scopes, self.parameters),
        }
        return self.model_copy(update={"slices": (), "modules": {}} | own)

    @property
    def models_read(self) -> tuple[str, ...]:
        """Every model the recipe names, first the one whose config and tokenizer the result gets.

        That is the base, or else the first model.
        """
        recipes = [part.recipe for part in self.parts]
        names = [n for r in recipes for n in (r.base, *(source.model for source in r.donors)) if n]
        return tuple(dict.fromkeys([self.base_model or names[0], *names]))

    @property
    def key(self) -> str:
        """A hash of all that decides the merged weights; equal recipes have equal keys."""
        parts = self.model_dump(mode="json", exclude={"dtype"}, exclude_defaults=True)
        if not self._is_random:
            parts.pop("seed", None)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_uniform(self) -> bool:
        """Whether every tensor has the same parameters: no filter, no gradient."""
        scopes = (self.parameters, *(source.parameters for source in self.donors))
        clauses = [clause for scope in scopes for setting in scope.values() for clause in setting]
        return all(c.filter is None and len(c.values) == 1 for c in clauses)

    def values(
        self, tensor: str, depth: float, inputs: Mapping[str, str] = MappingProxyType({})
    ) -> Values:
        """The method's parameters for one tensor, by its kernel's argument names.

        Args:
            tensor: Full name of the tensor in the result.
            depth: Of its layer, from 0 to 1 (``parameters.value_at``).
            inputs: The models' own names of it, where they are others: filters of what is set for
                each model are tested on those.

        Raises:
            RecipeError: A value is missing, of the wrong type or out of range.
        """
        return {
            f"{name}_" if name == "lambda" else name: (
                tuple(
                    self._value(name, inputs.get(source.model, tensor), depth, source)
                    for source in self.donors
                )
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
                    raise MergeError(f"{owner}parameter {name!r} for {tensor!r}: {error}") from None
        if param.default is None:
            raise MergeError(
                f"{owner}{self.merge_method} needs the parameter {name!r} for {tensor!r}; "
                f"give it {'under the model or ' if source else ''}under 'parameters'"
            )
        return param.default

    def to_yaml(self) -> str:
        """The YAML that mergekit reads; ``parse_recipe`` reads it back to an equal recipe."""
        mapping = self.model_dump(mode="json", exclude_defaults=True)
        mapping.pop("seed", None)
        if self._is_random:
            mapping["seed"] = self.seed
        return yaml.safe_dump(mapping, sort_keys=False, default_flow_style=False)


def _joined(*scopes: Settings) -> Settings:
    """Settings of several scopes as those of one, the strongest first."""
    names = dict.fromkeys(name for scope in scopes for name in scope)
    return {name: sum((scope.get(name, ()) for scope in scopes), ()) for name in names}


def load_recipe(path: Path) -> tuple[Recipe, list[str]]:
    """Read a recipe file; its relative folders count from the file's own.

    Returns:
        The recipe, and notes for the user: what was understood otherwise than mergekit would.

    Raises:
        RecipeError: The file is missing, is not YAML, or is no recipe.
    """
    mapping = load_yaml(path)
    recipe, notes = parse_recipe(mapping, where=str(path))
    return _anchored(recipe, path.parent), notes


def load_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: The file is missing, is not YAML, or holds something else.
    """
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MergeError(f"{path}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if mapping is None:
        raise MergeError(f"{path} is empty; `mergesearch init` writes a study to begin with")
    if not isinstance(mapping, dict):
        raise MergeError(f"{path}: expected a mapping of keys to values, like 'dtype: float32'")
    return mapping


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with models that are folders beside the file as absolute paths."""

    def place(model: str) -> str:
        if (folder / model).is_dir():
            return str((folder / model).resolve())
        return "+".join(place(part) for part in model.split("+")) if "+" in model else model

    def place_tokenizer(model: str) -> str:
        return model if model in ("base", "union") else place(model)

    anchored: Recipe = _renamed(recipe, place)
    changes: dict[str, Any] = {}
    if recipe.tokenizer_source:
        changes["tokenizer_source"] = place_tokenizer(recipe.tokenizer_source)
    if recipe.tokenizer:
        tokens = {
            name: way.model_copy(update={"source": _placed(way.source, place)})
            for name, way in recipe.tokenizer.tokens.items()
        }
        own = {"source": place_tokenizer(recipe.tokenizer.source), "tokens": tokens}
        changes["tokenizer"] = recipe.tokenizer.model_copy(update=own)
    return anchored.model_copy(update=changes)


def _placed(source: Any, place: Callable[[str], str]) -> Any:
    if isinstance(source, TokenOfModel):
        return source.model_copy(update={"model": place(source.model)})
    return place(source) if isinstance(source, str) else source


def _renamed(part: Any, rename: Callable[[str], str]) -> Any:
    """A part of a recipe with every model's name changed."""
    if isinstance(part, tuple):
        return tuple(_renamed(entry, rename) for entry in part)
    if isinstance(part, dict):
        return {name: _renamed(entry, rename) for name, entry in part.items()}
    changes: dict[str, Any] = {
        name: _renamed(getattr(part, name), rename)
        for name in ("models", "slices", "modules", "sources")
        if name in type(part).model_fields
    }
    for name in ("model", "base_model"):
        if old := getattr(part, name, None):
            changes[name] = rename(old)
    return part.model_copy(update=changes)


def parse_recipe(mapping: Mapping[str, Any], where: str) -> tuple[Recipe, list[str]]:
    """Check a recipe's mapping; ``load_recipe`` without the file."""
    known_parameters = {name for method in METHODS.values() for name in method.params}
    check_keys(where, mapping, {*Recipe.model_fields, *known_parameters})
    if (method := mapping.get("merge_method")) not in METHODS:
        raise MergeError(
            f"{where}: unknown merge_method {method!r}{suggestion(str(method), METHODS)}"
        )
    given = [form for form in ("models", "slices", "modules") if mapping.get(form) is not None]
    if len(given) != 1:
        found = f"it has {' and '.join(given)}" if given else "it has none"
        raise MergeError(f"{where}: a recipe has one of models, slices and modules; {found}")
    mapping, notes = _with_flat_parameters(mapping, known_parameters)
    mapping, idle = _without_residual_weights(mapping)
    entries = (*_entries(mapping, where), *_vocabulary_entries(mapping, where))
    for place, entry, kind in entries:
        check_keys(place, entry, kind.model_fields)
    try:
        recipe = Recipe.model_validate(mapping)
    except ValidationError as error:
        raise MergeError(f"{where}: {first_error(error)}") from None
    for place, settings in _scopes(recipe, ""):
        check_keys(f"{where}: {place}", settings, known_parameters)
        notes += _idle_parameters(recipe, place, settings)
    _check_parts(recipe, where)
    return recipe, notes + idle


_LISTS: Mapping[str, type[BaseModel]] = {"models": Source, "slices": Slice, "sources": SliceSource}
_EXAMPLES = {
    "models": "'- model: NAME' entries",
    "slices": "'- sources: [...]' entries",
    "sources": "'- {model: NAME, layer_range: [0, 8]}' entries",
}


def _entries(mapping: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    """Every mapping inside a recipe's mapping: where it stands, itself, what it has to be.

    Raises:
        RecipeError: There is something else than a mapping.
    """
    for name in _LISTS.keys() & mapping.keys():
        entries = mapping[name]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise MergeError(f"{place}: {name!r} has to be a list of {_EXAMPLES[name]}")
        for index, entry in enumerate(entries):
            yield f"{place}: {name}[{index}]", entry, _LISTS[name]
            yield from _entries(entry, f"{place}: {name}[{index}]")
    for name, module in (mapping.get("modules") or {}).items():
        if not isinstance(module, dict):
            raise MergeError(f"{place}: modules.{name} has to be a mapping with 'slices'")
        yield f"{place}: modules.{name}", module, Module
        yield from _entries(module, f"{place}: modules.{name}")


def _vocabulary_entries(
    mapping: Mapping[str, Any], place: str
) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    if (raw := mapping.get("tokenizer")) is None:
        return
    if mapping.get("tokenizer_source") is not None:
        raise MergeError(f"{place}: it has both tokenizer and tokenizer_source; keep one")
    if not isinstance(raw, dict):
        raise MergeError(f"{place}: tokenizer has to be a mapping; a word is for tokenizer_source")
    yield f"{place}: tokenizer", raw, Tokenizer
    for token, way in (raw.get("tokens") or {}).items():
        if isinstance(way, dict):
            yield f"{place}: tokenizer.tokens.{token}", way, Token


def _without_residual_weights(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Leave out a slice's ``residual_weight``, which mergekit reads and never uses."""

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
    return stripped, ["residual_weight changes nothing, in mergekit neither"] * changed


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


def _scopes(part: Any, place: str) -> Iterator[tuple[str, Settings]]:
    """Every place in a recipe where parameters stand."""
    yield f"{place}parameters", part.parameters
    lists = {name: getattr(part, name, ()) for name in ("models", "slices", "sources")}
    for name, entries in lists.items():
        for index, entry in enumerate(entries):
            yield from _scopes(entry, f"{place}{name}[{index}] ")
    for name, module in getattr(part, "modules", {}).items():
        yield from _scopes(module, f"{place}modules.{name} ")


def _idle_parameters(recipe: Recipe, place: str, settings: Settings) -> list[str]:
    """Notes on the settings that change nothing."""
    notes = []
    for name in settings:
        param = recipe.method.params.get(name)
        if param is None:
            notes.append(f"{place}: {recipe.merge_method} has no parameter {name!r}; no effect")
        elif not param.effect:
            notes.append(f"{place}: {name!r} changes nothing in {recipe.merge_method}")
        elif not param.per_donor and re.search(r"(models|sources)\[\d+\] parameters$", place):
            notes.append(f"{place}: {name!r} counts only under the recipe's own 'parameters'")
    return notes


def _check_parts(recipe: Recipe, where: str) -> None:
    if len(recipe.modules) > 1:
        # A module's name stands for tensors that only mergekit's architecture files list.
        raise MergeError(
            f"{where}: modules {', '.join(recipe.modules)}: several cannot be told apart here; "
            "write 'models', which merges every module, and set what differs between them by "
            "'filter' entries on tensor names"
        )
    parts = recipe.parts
    if not parts:
        raise MergeError(f"{where}: modules need 'slices' or 'models'")
    if len(parts) > 1 and any(part.layers is None for part in parts):
        raise MergeError(f"{where}: a module has either models or slices; keep one")
    for part in parts:
        place = where if part.place == "models" else f"{where}: {part.place}"
        _check_inputs(part.recipe, place)
        if part.layers:
            _check_layers(part.layers, place)


def _check_layers(layers: Mapping[str, tuple[int, int]], where: str) -> None:
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
                f"{layers[first][1] - layers[first][0]}; they have to give as many"
            )


def _check_inputs(recipe: Recipe, where: str) -> None:
    names = [source.model for source in recipe.models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise MergeError(f"{where}: {repeated} listed more than once; give each model one entry")
    method, base = recipe.method, recipe.base_model
    if method.base in (Base.ORIGIN, Base.ENDPOINT) and base is None:
        among = " and list it among the slice's sources" if "slices[" in where else ""
        raise MergeError(f"{where}: {recipe.merge_method} needs a base_model; name one{among}")
    if method.base is Base.ENDPOINT and base not in names:
        raise MergeError(
            f"{where}: {recipe.merge_method} starts from base_model {base!r}, "
            "which has to be one of 'models'"
        )
    fewest, most = method.donors
    count = len(recipe.donors) + (method.base is Base.ENDPOINT)
    if count < fewest or (most is not None and count > most):
        wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        besides = " besides the base" if recipe.origin else ""
        base_counts = method.base is Base.INPUT and base not in (None, *names)
        raise MergeError(
            f"{where}: {recipe.merge_method} takes {wanted} model{'s' * (fewest != 1)}{besides}, "
            f"got {count}{'; base_model is one of them: leave it out' * base_counts}"
        )
