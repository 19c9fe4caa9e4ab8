"""A study's tasks: loaded and split without a model, then bound to one.

lm-eval takes seconds to import, so functions import it where needed: errors in the models are
reported before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_engine.errors import check_keys
from merge_engine.models.cache_folder import default_folder
from objectives.base import Item, Objective, ObjectiveError
from objectives.entries import PluginEntry, PromptEntry
from objectives.items import SPLITS, Splits, split_items
from search.study.parameters import tuning_method
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from objectives.harness.harness import Harness
    from objectives.harness.tasks import LoadedTask


@dataclass(frozen=True)
class TaskPlan:
    """A study's tasks as far as they are known without a model."""

    # lm-eval's tasks and the texts, with their items; own objectives come with a model.
    loaded: tuple[LoadedTask, ...]
    items: tuple[Item, ...]  # all items of `loaded`
    splits: Splits | None  # none where own objectives have items besides


def plan_tasks(spec: StudySpec) -> TaskPlan:
    """Load a study's tasks and split their items.

    Raises:
        ObjectiveError: A task or a class cannot be used, or there are too few items.
        StudyError, MergeError: The study's constraints do not fit the tasks.
    """
    from objectives.harness.tasks import load_tasks
    from objectives.plugin import find_class

    wanted = spec.objective
    entries = [entry for entry in wanted.tasks if not isinstance(entry, PluginEntry)]
    for entry in wanted.tasks:
        if isinstance(entry, PluginEntry):
            find_class(entry.objective)
    if not entries:
        return TaskPlan((), (), None)
    loaded = load_tasks(
        entries,
        wanted.include_path,
        unsafe_code=wanted.unsafe_code,
        trust_task_code=wanted.trust_task_code,
        cache=default_folder(),
    )
    items = tuple(item for task in loaded for item in task.items)
    splits = None
    if len(entries) == len(wanted.tasks):
        splits = _split(spec, items, {task.name: task.weight for task in loaded})
    return TaskPlan(tuple(loaded), items, splits)


def bind_tasks(
    spec: StudySpec,
    tasks: TaskPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memory: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Objective, Splits]:
    """Prepare a study's prompts, and own objectives, for a live model.

    With ``memory``, the bytes a forward pass may take, larger batch sizes are tried, and ``say``
    receives the size found.

    Raises:
        ObjectiveError: They cannot be prepared or encoded, or there are too few items.
        StudyError, MergeError: The study's constraints do not fit the tasks.
    """
    from objectives.plugin import Plugin, Suite

    parts: list[Objective] = []
    if tasks.loaded:
        harness = _harness(spec, tasks.loaded, model, tokenizer)
        parts.append(harness)
        sizes = harness.language_model.sizes
        if memory is not None and harness.language_model.device.type != "cpu":
            harness.responder.hold(memory)
        if memory is not None and sizes.first != sizes.last:
            most = harness.find_batch_size(memory, spec.objective.block)
            say(f"batches: {most:,} tokens at most, found by trying")
    parts += [
        Plugin(entry, model, tokenizer)
        for entry in spec.objective.tasks
        if isinstance(entry, PluginEntry)
    ]
    objective = parts[0] if len(parts) == 1 else Suite(parts)
    splits = tasks.splits
    if splits is None or tuple(objective.items) != tasks.items:  # a document may have no request
        splits = _split(spec, objective.items, objective.tasks)
    if tasks.loaded:  # whose items come first
        numbers = [number for split in SPLITS for number in getattr(splits, split)]
        harness.check_tokens([number for number in numbers if number < len(harness.items)])
    return objective, splits


def bind_prompts(
    spec: StudySpec,
    prompts: PromptEntry,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Objective:
    """Prepare prompts to be continued as the study's tasks are prepared.

    A continuation takes half of the model's context at most.

    Raises:
        ObjectiveError: They cannot be prepared.
    """
    from objectives.harness.tasks import load_prompts

    half = getattr(model.config, "max_position_embeddings", 2 * prompts.max_tokens) // 2
    prompts = prompts.model_copy(update={"max_tokens": min(prompts.max_tokens, half)})
    harness = _harness(spec, [load_prompts(prompts)], model, tokenizer)
    harness.snapshots(range(len(prompts.prompts)))  # warns of prompts that lose their beginning
    return harness


def _harness(
    spec: StudySpec,
    tasks: Sequence[LoadedTask],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Harness:
    from objectives.harness.encoding import Prompting
    from objectives.harness.harness import Harness

    if not model.can_generate():
        raise StudyError(
            f"model {spec.base_model!r} is a {type(model).__name__}, which writes no text, so that "
            "lm-eval's tasks cannot score it; give an objective of your own"
        )
    wanted = spec.objective
    return Harness(
        tasks,
        model=model,
        tokenizer=tokenizer,
        batch_size=wanted.batch_size,
        prompting=Prompting(wanted.apply_chat_template, wanted.system_instruction),
        engine=wanted.engine,
    )


def _split(spec: StudySpec, items: Sequence[Item], tasks: Mapping[str, float]) -> Splits:
    """Split the items, after checking that constraints and token limit fit the tasks."""
    check_keys("objective.constraints", spec.objective.constraints, tasks, "task")
    if not items:
        raise ObjectiveError("objective.tasks: the tasks have no items")
    limited = spec.objective.max_mean_tokens is not None
    if limited and not any(item.generated for item in items):
        raise StudyError(
            "objective.max_mean_tokens: no task has a model write, so that no tokens can be "
            "counted; leave it out"
        )
    counts = spec.objective.items.model_dump()
    if not tuning_method(spec):
        counts["tune"] = 0
    return split_items(items, tasks, counts, spec.search.seed)
