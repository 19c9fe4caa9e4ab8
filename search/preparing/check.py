"""The plan that ``check`` prints for a study or a recipe, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from merge_engine.building.build_stages import planned
from merge_engine.building.plan import Plan
from merge_engine.models.checkpoint import Checkpoint, TensorInfo
from merge_engine.models.tensor_names import layer_counts
from merge_engine.recipe.stages import load_stages
from objectives.items import SPLITS
from search.preparing.context import load_outline, plan_study
from search.preparing.cost import describe_cost, describe_tuning
from search.preparing.models import Hardware, model_dtype
from search.proposing.starts import soup_steps
from search.study.reading import load_study
from search.wording import OWN_TEMPLATE

Description = tuple[list[str], list[str]]  # lines to print, and notes


def check_recipe(file: Path) -> Description:
    """Validate the recipe or recipes in a file against the headers of their models."""
    stages, notes = load_stages(file)
    lines: list[str] = []
    with planned(stages) as plans:
        for stage, plan in zip(stages, plans, strict=True):
            own_lines, own_notes = _describe_plan(plan)
            several = len(stages) > 1
            lines += [*([f"{stage.where}:"] if several else []), *own_lines]
            notes += [f"{stage.where}: {note}" if several else note for note in own_notes]
    return lines, notes


def _describe_plan(plan: Plan) -> Description:
    recipe = plan.recipe
    dtype = recipe.out_dtype or recipe.dtype or model_dtype(plan.files.reference)
    lines = [f"recipe: {recipe.merge_method}, writes {dtype}"]
    checkpoints = {
        model: checkpoint
        for part in plan.parts
        for model, checkpoint in part.model_set.checkpoints.items()
    }
    return lines + _describe_models(plan.shapes(), checkpoints), plan.notes()


def check_study(file: Path, device: str) -> Description:
    """Validate a study against the headers of its models and the items of its tasks."""
    spec = load_study(file)
    plan = plan_study(spec)
    context, models = load_outline(plan), plan.model_set
    memory = plan.place_donors(Hardware(device))
    searched = [name for name in plan.space.distributions if name != "method"]
    lines = [
        f"study: {spec.search.trials} trials of {', '.join(spec.search.methods)}",
        f"searched: {', '.join(searched) or 'the method alone'}; {plan.starts} warm starts first"
        + (f", and up to {soup} of a greedy soup" if (soup := soup_steps(plan.space)) else ""),
        *_describe_models(models.tensors, models.checkpoints),
        str(memory),
        plan.kernels,
    ]
    for split in SPLITS:
        tasks = context.tasks_of(split)
        counted = ", ".join(f"{task} {tasks.count(task)}" for task in dict.fromkeys(tasks))
        lines.append(f"{split}: {len(tasks)} items ({counted})")
    lines += [f"scored {OWN_TEMPLATE}, too: {donor}" for donor in context.own_templates]
    lines += [*describe_tuning(plan), describe_cost(plan)]
    return lines, plan.notes()


def _describe_models(
    tensors: Mapping[str, TensorInfo] | Mapping[str, torch.Tensor],
    checkpoints: Mapping[str, Checkpoint],
) -> list[str]:
    """Return lines with the models' folders and their common shape."""
    size = sum(prod(info.shape) for info in tensors.values())
    layers = max(layer_counts(tensors).values(), default=0)
    return [
        *(f"model: {model} ({each.folder})" for model, each in checkpoints.items()),
        f"shape: {len(tensors)} tensors, {size / 1e6:.1f} M parameters, {layers} layers",
    ]
