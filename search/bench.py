"""The bench a study works at: live model, donors, items and space, all checked before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from merge_engine.builder import Builder
from merge_engine.donors import Checkpoint, Family
from merge_engine.memory import plan_memory
from merge_engine.recipe import check_keys, load_recipe
from merge_engine.vocabulary import load_tokenizer
from objectives.base import ObjectiveError
from objectives.harness import Harness, TaskSpec
from objectives.items import Splits, split_items
from search.space import Space
from search.spec import StudySpec


@dataclass(frozen=True)
class Machine:
    """What a run may use.

    Args:
        device: Where the live model is.
        memory: Bytes at the most; None: what is free.
        compiled: Kernels may be compiled, where that pays.
    """

    device: str
    memory: int | None = None
    compiled: bool = True


@dataclass(frozen=True)
class Bench:
    """All that is made once for a study.

    Args:
        spec: The study.
        builder: Writes recipes into the live model.
        objective: Asks the live model.
        splits: Which items are for what.
        space: The recipes that are searched.
    """

    spec: StudySpec
    builder: Builder
    objective: Harness
    splits: Splits
    space: Space

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each task in the study's mean."""
        return dict(self.objective.tasks)

    def tasks_of(self, split: str) -> list[str]:
        """The task of each item of a split, in scoring order."""
        return [self.objective.items[number].task for number in getattr(self.splits, split)]

    @property
    def items_key(self) -> str:
        """A hash of which items are in which split: the same for the life of a study."""
        parts = [
            self.objective.items[number].key
            for split in ("search", "select", "test")
            for number in getattr(self.splits, split)
        ]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16"."""
    return getattr(torch, name)  # type: ignore[no-any-return]


def model_dtype(checkpoint: Checkpoint) -> str:
    """The name of the dtype that most of a checkpoint's numbers have."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + torch.Size(info.shape).numel()
    return max(sizes, key=lambda name: sizes[name])


def load_model(checkpoint: Checkpoint, dtype: str, device: str) -> PreTrainedModel:
    """A checkpoint as a live model in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch_dtype(dtype), device_map=device
    )
    model.eval()
    return model


def load_live(spec: StudySpec, model: str, device: str) -> tuple[PreTrainedModel, Checkpoint]:
    """A checkpoint, hub id or recipe file as a live model in the study's dtype.

    Returns:
        The model, and the study's base: whoever is scored uses its tokenizer.
    """
    base = Checkpoint(spec.base_model)
    dtype = spec.dtype or model_dtype(base)
    if not model.endswith((".yaml", ".yml")):
        return load_model(Checkpoint(model), dtype, device), base
    recipe, _ = load_recipe(Path(model))
    family = Family(recipe.models_read)
    live = load_model(family.reference, dtype, device)
    Builder(live, family).build(recipe)
    return live, base


def make_objective(spec: StudySpec, model: PreTrainedModel, checkpoint: Checkpoint) -> Harness:
    """The study's tasks, prepared for a live model, with the checkpoint's tokenizer."""
    return Harness.prepare(
        [TaskSpec(t.task, t.metric, t.weight, t.num_fewshot) for t in spec.objective.tasks],
        include_path=spec.objective.include_path,
        model=model,
        tokenizer=load_tokenizer(checkpoint),
        batch_size=spec.objective.batch_size,
        apply_chat_template=spec.objective.apply_chat_template,
    )


def make_splits(spec: StudySpec, objective: Harness) -> Splits:
    """The study's items, dealt to search, select and test."""
    if not objective.items:
        raise ObjectiveError("objective.tasks: the tasks have no items")
    counts = spec.objective.items.model_dump()
    return split_items(objective.items, objective.tasks, counts, spec.search.seed)


def open_family(spec: StudySpec, *, compiled: bool = True) -> Family:
    """The study's models, base first."""
    candidates = spec.search.trials if compiled else 0
    return Family([spec.base_model, *spec.models], candidates=candidates)


def place_donors(family: Family, dtype: str, machine: Machine) -> tuple[str, str]:
    """Decide where the donors live, and say that and how kernels are run.

    Raises:
        RecipeError: There is no room.
    """
    members = len(family.checkpoints)
    plan = plan_memory(family.tensors, members, torch_dtype(dtype), machine.device, machine.memory)
    family.place(torch.device(machine.device), plan.tier)
    how = "compiled once, one pass a candidate" if family.stream.compiled else "run in chunks"
    return str(plan), f"kernels: {how} ({family.parameters / 1e6:.1f} M parameters)"


def make_bench(
    spec: StudySpec, machine: Machine, say: Callable[[str], None] = lambda _: None
) -> Bench:
    """Check everything and load the one live model.

    Args:
        spec: The study.
        machine: What may be used.
        say: Is told the plan before anything is loaded.

    Raises:
        RecipeError, ObjectiveError: A model or a task cannot be used, or there is no room.
    """
    family = open_family(spec, compiled=machine.compiled)
    dtype = spec.dtype or model_dtype(family.reference)
    for line in place_donors(family, dtype, machine):
        say(line)
    model = load_model(family.reference, dtype, machine.device)
    objective = make_objective(spec, model, family.reference)
    check_keys("objective.constraints", spec.objective.constraints, objective.tasks)
    return Bench(
        spec=spec,
        builder=Builder(model, family),
        objective=objective,
        splits=make_splits(spec, objective),
        space=Space.of(spec, family.layer_filters, dtype),
    )
