"""Plan a merge: which tensors every tensor of the result is made of.

A recipe is a stack of parts: runs of layers with their own models and settings. A recipe in the
``models`` form is one part. Tensors before the layers belong to the first part, tensors after them
to the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from merge_engine.building.export import CheckpointFiles
from merge_engine.building.layer_config import with_layers
from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.config_differences import config_notes
from merge_engine.models.model_set import AlignedTensors, Layout, ModelSet
from merge_engine.models.opening import open_models
from merge_engine.models.size_check import LAYER_COUNTS, rows_note
from merge_engine.models.tensor_names import (
    depth_in,
    is_before_layers,
    is_head_weight,
    layer_counts,
    layer_position,
)
from merge_engine.models.token_table import vocabulary_notes
from merge_engine.models.vocabulary import (
    Vocabulary,
    load_tokenizer,
    make_vocabulary,
    with_chat_template,
)
from merge_engine.recipe.recipe import FlatPart, Recipe


@dataclass(frozen=True)
class Part:
    """A run of layers of the result."""

    recipe: Recipe  # in the `models` form
    # Its models, with the run's tensors under the names they have in the result.
    model_set: ModelSet


@dataclass(frozen=True)
class Plan:
    """A merge that is checked and ready to be built."""

    recipe: Recipe  # as the user wrote it
    parts: tuple[Part, ...]  # runs of layers, in order
    files: CheckpointFiles  # the result's files besides the weights

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the result's tensors."""
        return tuple(name for part in self.parts for name in part.model_set.names)

    def notes(self) -> list[str]:
        """Return notes on recipes that can be built but may not mean what the user wants."""
        found = {m: one for part in self.parts for m, one in part.model_set.checkpoints.items()}
        reference = self.files.reference
        checkpoints = ({reference.model: reference} | found).values()
        notes = _filter_notes(self.parts) + config_notes(reference, checkpoints)
        if self.recipe.vocabulary:
            return notes
        return notes + rows_note(reference) + vocabulary_notes(checkpoints)

    def shapes(self) -> dict[str, torch.Tensor]:
        """Return the result's tensors on the meta device: shapes and dtypes without values."""
        return {
            name: torch.empty(
                info.shape, dtype=written_dtype(part.recipe, part.model_set, name), device="meta"
            )
            for part in self.parts
            for name, info in part.model_set.tensors.items()
        }


def written_dtype(recipe: Recipe, models: ModelSet, name: str) -> torch.dtype:
    """Return the dtype to write: the recipe's, or what the models' dtypes promote to."""
    stored = models.tensors[name].dtype
    named = recipe.out_dtype or recipe.dtype
    return getattr(torch, named) if named and stored.is_floating_point else stored


def plan_merge(recipe: Recipe) -> Plan:
    """Open a recipe's models and check that it can be built, before any weight is read.

    Raises:
        MergeError: A model is missing or damaged, models do not fit one another, layers do not
            exist, or a parameter is missing or wrong.
    """
    checkpoints = open_models(recipe.models_read)
    reference = checkpoints[recipe.models_read[0]]
    vocabulary = tokenizer = None
    if recipe.vocabulary is not None:
        vocabulary = make_vocabulary(recipe.vocabulary, checkpoints, reference.model)
        tokenizer = vocabulary.tokenizer
    if recipe.chat_template:
        tokenizer = tokenizer or load_tokenizer(reference)
        tokenizer = with_chat_template(tokenizer, recipe, checkpoints)
    parts = plan_parts(recipe, checkpoints, vocabulary)
    for part in parts:
        for name in part.model_set.names:
            part.recipe.values(name, part.model_set.depth(name), part.model_set.inputs[name])
    config = _config(recipe, reference, parts)
    files = CheckpointFiles.of(reference, recipe, vocabulary, config, tokenizer)
    return Plan(recipe, parts, files)


def _filter_notes(parts: tuple[Part, ...]) -> list[str]:
    """Return a note on each filter whose value is used for no tensor."""
    used: dict[str, bool] = {}  # by filter
    everything: set[str] = set()
    for part in parts:
        names = {own for inputs in part.model_set.inputs.values() for own in inputs.values()}
        names |= {*part.model_set.names}
        everything |= names
        scopes = (part.recipe.parameters, *(source.parameters for source in part.recipe.models))
        for setting in dict.fromkeys(setting for scope in scopes for setting in scope.values()):
            found = {setting.first_matches[name] for name in names}
            for number, clause in enumerate(setting.clauses):
                if clause.filter is not None:
                    used[clause.filter] = used.get(clause.filter, False) or number in found
    return [_unused(text, everything) for text, is_used in used.items() if not is_used]


def _unused(text: str, names: Iterable[str]) -> str:
    """Return why a filter's value is not used."""
    if any(text in name for name in names):
        return (
            f"filter {text!r}: its value is never used, because an earlier entry takes its "
            "tensors; put it before that"
        )
    return (
        f"filter {text!r} matches no tensor, so its value is never used; it has to be a part of "
        f"a name, such as {max(names, key=len)!r}"
    )


def plan_parts(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], vocabulary: Vocabulary | None = None
) -> tuple[Part, ...]:
    """Return the parts of a recipe with their models' tensors aligned."""
    flat = recipe.parts
    parts, start = [], 0
    for number, part in enumerate(flat):
        own = {model: checkpoints[model] for model in part.recipe.models_read}
        layout = None
        if part.layers is not None:
            _check_ranges(part, own)
            ends = (number == 0, number == len(flat) - 1)
            layout = _layout(own, part.layers, start, ends)
            start += _length(part.layers)
        tensors = AlignedTensors(own, layout, vocabulary, part.recipe.base_model)
        parts.append(Part(part.recipe, ModelSet(tensors)))
    return tuple(parts)


def _layout(
    checkpoints: Mapping[str, Checkpoint],
    layers: Mapping[str, tuple[int, int]],
    start: int,
    ends: tuple[bool, bool],
) -> Layout:
    """Return the result's tensors of a run of layers.

    ``start`` is the first layer's number in the result, ``ends`` whether the run is first, last.
    """
    wanted: dict[str, dict[str, str]] = {}
    depths: dict[str, float] = {}
    for model, (first, last) in layers.items():
        for own in checkpoints[model].tensors:
            position = layer_position(own)
            if position and first <= position.layer < last:
                step = position.layer - first
                name = f"{position.stack}{start + step}.{position.rest}"
                depths[name] = depth_in(step, last - first)
            elif position is None and ends[0 if is_before_layers(own) else 1]:
                depths[name := own] = 0.0
            else:
                continue
            wanted[name] = {m: _shifted(own, layers[m][0] - first) for m in layers}
    return Layout({name: wanted[name] for name in sorted(wanted)}, depths)


def _shifted(name: str, by: int) -> str:
    """Return a tensor's name with the layer number increased by ``by``."""
    position = layer_position(name)
    return f"{position.stack}{position.layer + by}.{position.rest}" if position else name


def _length(layers: Mapping[str, tuple[int, int]]) -> int:
    first, last = next(iter(layers.values()))
    return last - first


def _check_ranges(part: FlatPart, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Check that each model has one stack of layers, and the layers that are named."""
    assert part.layers is not None
    for model, (first, last) in part.layers.items():
        counts = layer_counts(checkpoints[model].tensors)
        if len(counts) != 1:
            raise MergeError(
                f"{part.path}: model {model!r} has {len(counts)} stacks of layers "
                f"({', '.join(sorted(counts)) or 'none'}); slices need a model with one"
            )
        if last > (count := next(iter(counts.values()))):
            raise MergeError(
                f"{part.path}: layer_range [{first}, {last}] of {model!r} goes beyond its "
                f"{count} layers; the last one is {count - 1}, so end at {count} or below"
            )


def _config(recipe: Recipe, reference: Checkpoint, parts: tuple[Part, ...]) -> dict[str, Any]:
    """Return the reference's config with the result's layers, and untied where there is a head."""
    config = dict(reference.config)
    names = {name for part in parts for name in part.model_set.names}
    if config.get("tie_word_embeddings") and any(map(is_head_weight, names)):
        config["tie_word_embeddings"] = False
    if recipe.parts[0].layers is None:
        return config
    inner = config.get("text_config")
    if isinstance(inner, dict):
        return config | {"text_config": _with_layers(inner, recipe, reference)}
    return _with_layers(config, recipe, reference)


def _with_layers(
    config: Mapping[str, Any], recipe: Recipe, reference: Checkpoint
) -> dict[str, Any]:
    """Return a config with the result's number of layers, and its lists of one entry per layer."""
    layers: list[int] = []  # number of each in the reference, or else in the first source
    for part in recipe.parts:
        assert part.layers is not None
        layers += range(*part.layers.get(reference.model, next(iter(part.layers.values()))))
    keys = [key for key in LAYER_COUNTS if key in config]
    if not keys:
        raise MergeError(
            f"model {reference.model!r}: config.json has none of {', '.join(LAYER_COUNTS)}; "
            "slices need to write the new number of layers there"
        )
    return with_layers(config, layers, keys)
