"""What ``check`` says: can a file be used, and what would using it take? Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch

from merge_engine.building.plan import plan_merge
from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint, TensorInfo
from merge_engine.models.tensor_names import layer_counts
from merge_engine.recipe.recipe_file import load_recipe
from search.preparing.context import Hardware, model_dtype, open_family, outline, place_donors
from search.proposing.starts import warm_starts
from search.study.reading import load_study

Plan = tuple[list[str], list[str]]  # lines, and notes


def check_recipe(file: Path, _device: str) -> Plan:
    """Validate a recipe with the headers of its models.

    Raises:
        RecipeError: It cannot be built.
    """
    recipe, notes = load_recipe(file)
    plan = plan_merge(recipe)
    dtype = recipe.out_dtype or recipe.dtype or model_dtype(plan.reference)
    lines = [f"recipe: {recipe.merge_method}, writes {dtype}"]
    checkpoints = {
        model: checkpoint
        for part in plan.parts
        for model, checkpoint in part.family.checkpoints.items()
    }
    if recipe.vocabulary is None:
        notes += _tokenizers(plan.reference, checkpoints.values())
    return lines + _models(plan.shapes(), checkpoints), notes


def check_study(file: Path, device: str) -> Plan:
    """Validate a study with the headers of its models and the items of its tasks.

    Raises:
        StudyError, RecipeError, ObjectiveError: It cannot be run.
    """
    spec = load_study(file)
    family = open_family(spec)
    dtype, machine = spec.dtype or model_dtype(family.reference), Hardware(device)
    bench = outline(spec, family)
    from search.preparing.cost import estimate  # and scipy

    space = bench.space
    searched = {name: d for name, d in space.distributions.items() if name != "method"}
    lines = [
        f"study: {spec.search.trials} trials of {', '.join(spec.search.methods)}",
        f"searched: {', '.join(searched) or 'the method alone'}; "
        f"{len(warm_starts(space))} warm starts first",
        *_models(family.tensors, family.checkpoints),
        *place_donors(family, dtype, machine),
    ]
    for split, wanted in spec.objective.items.model_dump().items():
        tasks = bench.tasks_of(split)
        counted = ", ".join(f"{task} {tasks.count(task)}" for task in dict.fromkeys(tasks))
        lines.append(f"{split}: {wanted} items ({counted})")
    lines.append(str(estimate(bench, family, machine)))
    return lines, _tokenizers(family.reference, family.checkpoints.values())


def _models(
    tensors: Mapping[str, TensorInfo] | Mapping[str, torch.Tensor],
    checkpoints: Mapping[str, Checkpoint],
) -> list[str]:
    """The models and their shape."""
    size = sum(prod(info.shape) for info in tensors.values())
    layers = max(layer_counts(tensors).values(), default=0)
    return [
        *(f"model: {model} ({each.folder})" for model, each in checkpoints.items()),
        f"shape: {len(tensors)} tensors, {size / 1e6:.1f} M parameters, {layers} layers",
    ]


def _tokenizers(reference: Checkpoint, checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Notes on models whose tokens are not the reference's: their embeddings are merged as is."""
    expected = _vocabulary(reference)
    return [
        f"model {checkpoint.model!r} has another vocabulary than {reference.model!r}; rows "
        "of the embeddings are merged by number, and the result gets the latter's tokenizer"
        for checkpoint in checkpoints
        if expected is not None and _vocabulary(checkpoint) not in (None, expected)
    ]


def _vocabulary(checkpoint: Checkpoint) -> object:
    file = checkpoint.folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"].get("vocab")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise MergeError(f"{file}: damaged or cut short: {error}; fetch it again") from None
