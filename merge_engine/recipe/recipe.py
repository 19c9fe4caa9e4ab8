"""A merge recipe: mergekit's configuration as a frozen model, with derived properties."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from merge_engine.errors import MergeError
from merge_engine.methods import METHODS, Base, Elementwise, Method
from merge_engine.methods.contract import Value, Values
from merge_engine.recipe.settings import Setting, dump_setting, parse_setting, value_at
from merge_engine.schema import DtypeName, FrozenModel, dump_yaml

Settings = dict[
    str, Annotated[Setting, BeforeValidator(parse_setting), PlainSerializer(dump_setting)]
]


def _model_name(raw: object) -> object:
    """Convert mergekit's mapping form of a model to the equivalent string."""
    if not isinstance(raw, dict):
        return raw
    if raw.get("override_architecture"):
        raise ValueError(
            "override_architecture is not supported; correct 'architectures' in the model's "
            "config.json instead"
        )
    raw = {key: value for key, value in raw.items() if key != "override_architecture"}
    if set(raw) <= {"path", "revision"} and "path" in raw:
        return f"{raw['path']}@{raw['revision']}" if raw.get("revision") else str(raw["path"])
    if set(raw) <= {"model", "lora"} and "model" in raw:
        parts = [raw["model"], raw["lora"]] if raw.get("lora") else [raw["model"]]
        return "+".join(str(_model_name(part)) for part in parts)
    raise ValueError("a model is a name, {path, revision} or {model, lora}")


def _source_name(raw: object) -> object:
    """Convert a vocabulary's source; old recipes wrote it with the prefix ``model:``."""
    return raw.removeprefix("model:") if isinstance(raw, str) else _model_name(raw)


ModelName = Annotated[str, Field(min_length=1), BeforeValidator(_model_name)]
SourceName = Annotated[str, Field(min_length=1), BeforeValidator(_source_name)]


_Layer = Annotated[int, Field(ge=0, le=100_000)]


class Source(FrozenModel):
    """One model of a recipe with its own settings."""

    model: ModelName
    parameters: Settings = Field(default={})


class SliceSource(Source):
    """The layers ``[first, last)`` of one model in a slice."""

    layer_range: tuple[_Layer, _Layer]


class Slice(FrozenModel):
    """Consecutive layers of the result, merged from equally many layers of each source."""

    sources: Annotated[tuple[SliceSource, ...], Field(min_length=1)]
    base_model: ModelName | None = None
    parameters: Settings = Field(default={})


class Module(FrozenModel):
    """A part of a model with its own layers, like a vision tower; most models have only one."""

    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Settings = Field(default={})


class TokenOfModel(FrozenModel):
    """The embedding row of a token in one model's vocabulary, given by text or by id."""

    kind: Literal["model_token"]
    model: ModelName
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _has_text_or_id(self) -> TokenOfModel:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give either token or token_id")
        return self


class ZeroRow(FrozenModel):
    """An embedding row of zeros."""

    kind: Literal["zero"]


class Token(FrozenModel):
    """Where models that lack a token take its embedding row from; with ``force``, all models."""

    source: TokenOfModel | ZeroRow | ModelName | None = None
    force: bool = False


class Tokenizer(FrozenModel):
    """The vocabulary of the result: ``union``, ``base`` or a model's."""

    source: SourceName = "union"
    tokens: dict[str, Token] = Field(default={})
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class FlatPart(NamedTuple):
    """Consecutive layers of the result as a recipe in the ``models`` form."""

    path: str  # in the YAML, for messages: "models" or "slices[0]"
    recipe: Recipe
    layers: Mapping[str, tuple[int, int]] | None  # [first, last) by model; None: all layers


class Recipe(FrozenModel):
    """Which models are merged and how: the fields of mergekit's configuration, and ``seed``.

    Exactly one of ``models``, ``slices`` and ``modules`` is given. ``parts`` is their common form;
    a recipe in the ``models`` form has one part, itself.
    """

    merge_method: str  # a key of METHODS
    # Folder or hub id, if the method has a base. The result gets its config.
    base_model: ModelName | None = None
    models: tuple[Source, ...] = ()  # the merged models in order; the base may be among them
    slices: tuple[Slice, ...] = ()  # the layers of the result, stacked from first to last
    modules: dict[str, Module] = Field(default={})  # a module's models or slices, by name
    # Settings for all models and tensors; a model's own settings take precedence.
    parameters: Settings = Field(default={})
    # The dtype mergekit computes in; this engine always computes in float32.
    dtype: DtypeName | None = None
    # Dtype of the written tensors; default `dtype`, then that of the donors.
    out_dtype: DtypeName | None = None
    tokenizer_source: SourceName | None = None  # short for `tokenizer` with only this source
    # Vocabulary of the result; by default the base's, which all models then share.
    tokenizer: Tokenizer | None = None
    # `auto` (the most frequent one), `chatml`, or the text of a template.
    chat_template: str | None = None
    # Seed of the masks of random methods. mergekit ignores it.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0

    @property
    def vocabulary(self) -> Tokenizer | None:
        """The vocabulary wanted for the result, by either key; None: that of the base."""
        source = self.tokenizer_source
        return Tokenizer(source=source) if source is not None else self.tokenizer

    @property
    def method(self) -> Method:
        """The row of the merge method in METHODS."""
        return METHODS[self.merge_method]

    @property
    def _is_random(self) -> bool:
        return isinstance(self.method, Elementwise) and self.method.random

    @property
    def base(self) -> str | None:
        """The base model, or None if the method treats it as one more input."""
        return self.base_model if self.method.base is not Base.INPUT else None

    @property
    def origin(self) -> str | None:
        """The model task vectors are relative to; None: the tensors themselves are merged."""
        return self.base_model if self.method.base in (Base.ORIGIN, Base.OPTIONAL) else None

    @cached_property
    def donors(self) -> tuple[Source, ...]:
        """The merged models besides the base, in the order of per-donor parameters."""
        if self.method.base is Base.INPUT and self.base_model not in (
            None,
            *(source.model for source in self.models),
        ):
            return (*self.models, Source(model=str(self.base_model)))
        return tuple(source for source in self.models if source.model != self.base)

    @property
    def parts(self) -> tuple[FlatPart, ...]:
        """The parts the result is stacked from, each a recipe in the ``models`` form.

        A part's settings hold the clauses of all scopes, the innermost first: the first match wins.
        """
        if self.models:
            return (FlatPart("models", self, None),)
        found = list(self._slices("", self.slices, {}))
        for name, module in self.modules.items():
            path = f"modules.{name}."
            if module.models:
                flat = self._flat(module.models, self.base_model, module.parameters)
                found.append(FlatPart(f"{path}models", flat, None))
            found += self._slices(path, module.slices, module.parameters)
        return tuple(found)

    def _slices(
        self, path: str, slices: tuple[Slice, ...], of_module: Settings
    ) -> Iterator[FlatPart]:
        for index, part in enumerate(slices):
            base = part.base_model or self.base_model
            if base not in [source.model for source in part.sources]:
                base = None  # the slice names no layers of the base
            scopes = _joined(part.parameters, of_module)
            yield FlatPart(
                f"{path}slices[{index}]",
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
        """All models of the recipe, first the one whose config and tokenizer the result gets.

        That is the base, or else the first model.
        """
        recipes = [part.recipe for part in self.parts]
        names = [n for r in recipes for n in (r.base, *(source.model for source in r.donors)) if n]
        return tuple(dict.fromkeys([self.base_model or names[0], *names]))

    @cached_property
    def key(self) -> str:
        """A hash of everything that determines the merged weights."""
        parts = self.model_dump(mode="json", exclude={"dtype"}, exclude_defaults=True)
        if not self._is_random:
            parts.pop("seed", None)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_uniform(self) -> bool:
        """Whether all tensors have the same parameters."""
        scopes = (self.parameters, *(source.parameters for source in self.donors))
        return all(setting.is_uniform for scope in scopes for setting in scope.values())

    def values(
        self, tensor: str, depth: float, inputs: Mapping[str, str] = MappingProxyType({})
    ) -> Values:
        """Return the method's parameters for one tensor, by argument name.

        Args:
            tensor: Full name of the tensor in the result.
            depth: Relative depth of its layer, from 0 to 1 (``settings.value_at``).
            inputs: The tensor's name in each model, where it differs from that in the result: the
                filters of a donor's settings are matched with the donor's own name.

        Raises:
            MergeError: A value is missing, of the wrong type or out of range.
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

    def _value(self, name: str, tensor: str, depth: float, source: Source | None) -> Value:
        """Return a parameter's value in the innermost scope that sets it, else its default."""
        param = self.method.params[name]
        for scope in (source, self) if source else (self,):
            setting = scope.parameters.get(name)
            value = value_at(setting, tensor, depth) if setting else None
            if value is not None:
                try:
                    return param.typed(value)
                except ValueError as error:
                    where = f"{_of(source)}parameter {name!r} for {tensor!r}"
                    raise MergeError(f"{where}: {error}") from None
        if param.default is None:
            raise MergeError(
                f"{_of(source)}{self.merge_method} needs the parameter {name!r} for {tensor!r}; "
                f"give it {'under the model or ' if source else ''}under 'parameters'"
            )
        return param.default

    def to_yaml(self) -> str:
        """Return the recipe as mergekit's YAML; ``parse_recipe`` is the inverse."""
        mapping = self.model_dump(mode="json", exclude_defaults=True)
        mapping.pop("seed", None)
        if self.tokenizer is not None:  # by its name even where it is the default
            mapping["tokenizer"] = {"source": self.tokenizer.source} | mapping["tokenizer"]
        if self._is_random:
            mapping["seed"] = self.seed
        return dump_yaml(mapping)


def _of(source: Source | None) -> str:
    return f"{source.model!r}: " if source else ""


def _joined(*scopes: Settings) -> Settings:
    """Concatenate the clauses of several scopes, the innermost scope first."""
    names = dict.fromkeys(name for scope in scopes for name in scope)
    return {
        name: Setting(tuple(c for scope in scopes if name in scope for c in scope[name].clauses))
        for name in names
    }
