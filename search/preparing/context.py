"""The bench a study works at: live model, donors, items and space, all checked before any work.

transformers and lm-eval take seconds to import: that is done when the donors have been checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from merge_engine.building.builder import Builder
from merge_engine.errors import MergeError, check_keys
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.memory_plan import plan_memory
from merge_engine.models.model_set import ModelSet
from merge_engine.models.vocabulary import check_tokenizer, load_tokenizer
from merge_engine.recipe.recipe_file import load_recipe
from objectives.base import Item, Objective, ObjectiveError
from objectives.entries import PluginEntry, PromptEntry
from objectives.items import Splits, split_items
from search.proposing.starts import warm_starts
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from objectives.harness.harness import Harness
    from objectives.harness.tasks import LoadedTask
    from search.proposing.space import Space


@dataclass(frozen=True)
class Hardware:
    """What a run may use.

    Args:
        device: Where the live model is; "auto": spread over all GPUs.
        memory: Bytes at the most; None: what is free.
        compiled: Kernels may be compiled, where that pays.
        sharers: How many workers share its memory.
    """

    device: str
    memory: int | None = None
    compiled: bool = True
    sharers: int = 1

    @property
    def builds_on(self) -> torch.device:
        """Where statistics of the donors are worked out."""
        return torch.device("cuda" if self.device == "auto" else self.device)


@dataclass(frozen=True)
class StudyContext:
    """All that is made once for a study.

    Args:
        spec: The study.
        objective: Knows the items.
        splits: Which items are for what.
        space: The recipes that are searched.
        models: What tells the weights of each model from others, by its name.
    """

    spec: StudySpec
    objective: Objective
    splits: Splits
    space: Space
    models: Mapping[str, str]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each task in the study's mean."""
        return dict(self.objective.tasks)

    def items_of(self, split: str) -> list[Item]:
        """The items of a split, in scoring order."""
        return [self.objective.items[number] for number in getattr(self.splits, split)]

    def tasks_of(self, split: str) -> list[str]:
        """The task of each of them."""
        return [item.task for item in self.items_of(split)]


@dataclass(frozen=True)
class LiveContext(StudyContext):
    """One with a live model, which the objective can ask.

    Args:
        builder: Writes recipes into the live model.
    """

    builder: Builder


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


def load_model(
    checkpoint: Checkpoint, dtype: str, device: str, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A checkpoint as a live model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with own_code_refused(checkpoint):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=torch_dtype(dtype),
            device_map=device,
            trust_remote_code=trust_remote_code,
        )
    model.eval()
    return model


@contextmanager
def own_code_refused(checkpoint: Checkpoint) -> Iterator[None]:
    """Say what to do about a model that brings code of its own."""
    try:
        yield
    except MergeError:
        raise
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            reason = str(error).split(". ")[0].splitlines()[0]
            raise StudyError(
                f"{checkpoint.folder}: transformers cannot use it: {reason}; correct its "
                "config.json, or update transformers"
            ) from error
        raise StudyError(
            f"model {checkpoint.model!r} brings Python code of its own; read it, and if you trust "
            "it, set trust_remote_code: true in the study"
        ) from error


def load_live(spec: StudySpec, model: str, device: str) -> tuple[PreTrainedModel, Checkpoint]:
    """A checkpoint, hub id or recipe file as a live model in the study's dtype.

    Returns:
        The model, and the study's base: whoever is scored uses its tokenizer.
    """
    base = Checkpoint(spec.base_model)
    dtype = spec.dtype or model_dtype(base)
    trusted = spec.trust_remote_code
    if not model.endswith((".yaml", ".yml")):
        return load_model(Checkpoint(model), dtype, device, trust_remote_code=trusted), base
    recipe, _ = load_recipe(Path(model))
    family = ModelSet(recipe.models_read)
    live = load_model(family.reference, dtype, device, trust_remote_code=trusted)
    Builder(live, family).build(recipe)
    return live, base


def find_tasks(spec: StudySpec) -> list[LoadedTask]:
    """Load the study's tasks and check all that takes no model; classes of its own come later.

    Raises:
        ObjectiveError: A task or a class cannot be used, or there are too few items.
    """
    from objectives.harness.tasks import load_tasks
    from objectives.plugin import find_class

    wanted, entries = spec.objective, []
    for entry in wanted.tasks:
        if isinstance(entry, PluginEntry):
            find_class(entry.objective)
        else:
            entries.append(entry)
    if not entries:
        return []
    tasks = load_tasks(entries, wanted.include_path, unsafe_code=wanted.unsafe_code)
    if len(entries) == len(wanted.tasks):
        items = [item for task in tasks for item in task.items]
        make_splits(spec, items, {task.name: task.weight for task in tasks})
    return tasks


def make_objective(
    spec: StudySpec, tasks: Sequence[LoadedTask], model: PreTrainedModel, checkpoint: Checkpoint
) -> Objective:
    """What the study asks, prepared for a live model, with the checkpoint's tokenizer."""
    from objectives.plugin import Plugin, Suite

    tokenizer = _tokenizer(spec, checkpoint)
    parts: list[Objective] = []
    if tasks:
        parts.append(_harness(spec, tasks, model, tokenizer))
    parts += [
        Plugin(entry, model, tokenizer)
        for entry in spec.objective.tasks
        if isinstance(entry, PluginEntry)
    ]
    return parts[0] if len(parts) == 1 else Suite(parts)


def make_prompts(bench: LiveContext, prompts: PromptEntry) -> Objective:
    """Prompts, prepared as a study's tasks are; a short model keeps half its room for them."""
    from objectives.harness.tasks import load_prompts

    tokenizer = _tokenizer(bench.spec, bench.builder.family.reference)
    model = cast("PreTrainedModel", bench.builder.model)  # as make_bench has loaded it
    room = getattr(model.config, "max_position_embeddings", 2 * prompts.max_tokens) // 2
    prompts = prompts.model_copy(update={"max_tokens": min(prompts.max_tokens, room)})
    harness = _harness(bench.spec, [load_prompts(prompts)], model, tokenizer)
    harness.snapshots(range(len(prompts.prompts)))  # it warns of those that lose their beginning
    return harness


def _tokenizer(spec: StudySpec, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    with own_code_refused(checkpoint):
        found: PreTrainedTokenizerBase = load_tokenizer(
            checkpoint, trust_remote_code=spec.trust_remote_code
        )
    return found


def _harness(
    spec: StudySpec,
    tasks: Sequence[LoadedTask],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Harness:
    from objectives.harness.harness import Harness
    from objectives.harness.prompts import Prompting

    wanted = spec.objective
    return Harness.prepare(
        tasks,
        model=model,
        tokenizer=tokenizer,
        batch_size=wanted.batch_size,
        prompting=Prompting(wanted.apply_chat_template, wanted.system_instruction),
    )


def make_splits(spec: StudySpec, items: Sequence[Item], tasks: Mapping[str, float]) -> Splits:
    """The study's items, dealt to search, select and test.

    Raises:
        StudyError, ObjectiveError: What the study says of them does not fit.
    """
    check_keys("objective.constraints", spec.objective.constraints, tasks, "task")
    if not items:
        raise ObjectiveError("objective.tasks: the tasks have no items")
    counted = spec.search.cost or spec.objective.max_mean_tokens is not None
    if counted and not any(item.generated for item in items):
        raise StudyError(
            "search.cost, objective.max_mean_tokens: no task has a model write, so that no tokens "
            "can be counted; leave them out"
        )
    counts = spec.objective.items.model_dump()
    return split_items(items, tasks, counts, spec.search.seed)


def open_family(spec: StudySpec, *, compiled: bool = True) -> ModelSet:
    """The study's models, base first."""
    candidates = spec.search.trials if compiled else 0
    return ModelSet([spec.base_model, *spec.models_but_base], candidates=candidates)


def place_donors(family: ModelSet, dtype: str, machine: Hardware) -> tuple[str, str]:
    """Decide where the donors live, and say that and how kernels are run.

    Raises:
        RecipeError: There is no room.
    """
    members = len(family.checkpoints)
    plan = plan_memory(
        family.tensors, members, torch_dtype(dtype), machine.device, machine.memory, machine.sharers
    )
    family.place(machine.builds_on, plan.tier)
    how = "compiled once, one pass a candidate" if family.stream.compiled else "run in chunks"
    return str(plan), f"kernels: {how} ({family.parameters / 1e6:.1f} M parameters)"


def outline(spec: StudySpec, family: ModelSet) -> StudyContext:
    """Check everything that headers and tasks can tell, without weights and without a device.

    Raises:
        RecipeError, ObjectiveError: A model or a task cannot be used.
    """
    dtype = spec.dtype or model_dtype(family.reference)
    space, tasks = _matter(spec, family, dtype)
    from transformers import AutoModelForCausalLM

    config = _config(spec, family.reference)
    with torch.device("meta"):  # tasks are prepared for a model; this one has no weights
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(dtype), trust_remote_code=spec.trust_remote_code
        )
    return StudyContext(*_asked(spec, model, family, space, tasks))


def make_context(
    spec: StudySpec, machine: Hardware, say: Callable[[str], None] = lambda _: None
) -> LiveContext:
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
    space, tasks = _matter(spec, family, dtype)
    for line in place_donors(family, dtype, machine):
        say(line)
    trusted = spec.trust_remote_code
    model = load_model(family.reference, dtype, machine.device, trust_remote_code=trusted)
    return LiveContext(*_asked(spec, model, family, space, tasks), Builder(model, family))


def _matter(spec: StudySpec, family: ModelSet, dtype: str) -> tuple[Space, list[LoadedTask]]:
    """The recipes and the tasks of a study.

    What is wrong there, or with the tokenizer, is said at once: importing transformers takes
    seconds, and loading models longer.
    """
    check_tokenizer(family.reference)
    if not _has_folder(family.reference.config.get("model_type")):
        _config(spec, family.reference)  # no architecture that is known, it may be
    tasks = find_tasks(spec)
    from search.proposing.space import Space

    space = Space.from_spec(spec, family.layer_filters, dtype)
    warm_starts(space)  # one of the user's may be none of the study's
    return space, tasks


def _config(spec: StudySpec, checkpoint: Checkpoint) -> PretrainedConfig:
    from transformers import AutoConfig

    with own_code_refused(checkpoint):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=spec.trust_remote_code
        )
    return config


def _has_folder(model_type: object) -> bool:
    """Whether transformers has code in a folder of that name; to see it, nothing is imported."""
    package = importlib.util.find_spec("transformers")
    folders = package.submodule_search_locations if package else None
    return any((Path(folder) / "models" / str(model_type)).is_dir() for folder in folders or ())


def _asked(
    spec: StudySpec,
    model: PreTrainedModel,
    family: ModelSet,
    space: Space,
    tasks: Sequence[LoadedTask],
) -> tuple[StudySpec, Objective, Splits, Space, Mapping[str, str]]:
    """What is asked of whom."""
    objective = make_objective(spec, tasks, model, family.reference)
    models = {name: model.contents for name, model in family.checkpoints.items()}
    splits = make_splits(spec, objective.items, objective.tasks)
    return spec, objective, splits, space, models
