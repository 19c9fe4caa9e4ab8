"""From a study to live objects: first a plan, in which all input errors show, then the models.

``plan_study`` reads headers and tasks. ``load`` adds the live model; ``load_outline`` adds a model
without weights, for a coordinator whose workers have the live ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from merge_engine.building.builder import Builder
from merge_engine.building.export import files_to_copy
from merge_engine.building.live_tensors import LiveTensors
from merge_engine.building.units import Units
from merge_engine.models.alignment import is_multimodal, text_config
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.config_differences import check_functions, config_notes
from merge_engine.models.free_memory import free_bytes, reserve_share
from merge_engine.models.memory_plan import (
    Allowance,
    ForwardPasses,
    MemoryPlan,
    Models,
    plan_memory,
)
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import Placed
from merge_engine.models.quantised import quantisation_of
from merge_engine.models.token_table import vocabulary_notes
from merge_engine.models.vocabulary import check_tokenizer
from objectives.base import Item, Objective
from objectives.entries import ENGINE_MEMORY
from objectives.items import Split, Splits
from search.preparing.forward_memory import forward_passes, scored_tokens, tuned_tokens
from search.preparing.models import (
    Hardware,
    load_model,
    load_without_weights,
    open_model_set,
    study_dtype,
    study_tokenizer,
    torch_dtype,
)
from search.preparing.offload import check_offload, offload
from search.preparing.own_templates import (
    BoundTemplate,
    OwnTemplate,
    bind_own_templates,
    find_own_templates,
    template_notes,
)
from search.preparing.tasks import TaskPlan, bind_prompts, bind_tasks, plan_tasks
from search.proposing.space import Space
from search.proposing.starts import warm_starts
from search.proposing.tuned_path import TunedUnits, tuned_units
from search.study.parameters import names_all_models, tuning_method
from search.study.sampler_table import SAMPLERS
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from objectives.entries import PromptEntry

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyPlan:
    """Everything about a study that is known without weights and without transformers."""

    spec: StudySpec  # the study
    model_set: ModelSet  # the base and the donors: their headers, aligned
    dtype: str  # name of the live model's dtype
    tasks: TaskPlan  # tasks and items
    space: Space  # the recipes that are searched
    starts: int  # number of warm starts
    own_templates: Mapping[str, OwnTemplate]  # other than the study's, by donor
    tuned_units: TunedUnits | None  # units with weights tuned by gradient; None: no tuning

    @property
    def kernels(self) -> str:
        """How merges are run, as a line for the user."""
        compiled = self.model_set.runner.compiled
        how = "compiled once, one pass a candidate" if compiled else "run in chunks"
        return f"kernels: {how} ({self.model_set.parameters / 1e6:.1f} M parameters)"

    def notes(self) -> list[str]:
        """Return notes on models that differ in config, template or tokens but not in shape."""
        reference, checkpoints = self.model_set.reference, self.model_set.checkpoints.values()
        notes = config_notes(reference, checkpoints) + template_notes(self.own_templates)
        if whole := [each.model for each in checkpoints if each.unmapped]:
            notes.append(
                f"{', '.join(whole)}: weights in a format from before PyTorch 1.6, which are read "
                "whole for any tensor; save them as safetensors"
            )
        if self.spec.objective.trust_task_code:
            notes.append("trust_task_code: Python code that comes with the task files is run")
        return notes if self.spec.tokenizer else notes + vocabulary_notes(checkpoints)

    def place_donors(self, hardware: Hardware) -> MemoryPlan:
        """Decide where the donors live while candidates are built."""
        models, engine = self.model_set, self.spec.objective.engine
        merged = Models(
            models.tensors,
            len(models.checkpoints),
            torch_dtype(self.dtype),
            methods=self.spec.search.methods,
            compiled=models.runner.compiled,
            unmapped=max(each.unmapped for each in models.checkpoints.values()),
        )
        allowed = Allowance(
            hardware.memory,
            hardware.sharers,
            hardware.joins,
            hardware.share,
            ENGINE_MEMORY if engine else 0.0,
        )
        passes = self._forward_passes(tuned=self.tuned_units is not None and not hardware.offload)
        plan = plan_memory(merged, hardware.lives_on, passes=passes, allowed=allowed)
        models.place(hardware.builds_on, plan.budget)
        if (placed := models.placement.placed) != Placed():
            plan = replace(plan, placed=placed)
        return replace(plan, copied_to=hardware.device) if hardware.offload else plan

    def _forward_passes(self, *, tuned: bool) -> ForwardPasses:
        """Estimate the memory of forward passes, and of backward ones if weights are ``tuned``."""
        tasks, chat = self.tasks.loaded, self.spec.objective.apply_chat_template
        tokenizer = study_tokenizer(self.spec, self.model_set) if tasks else None
        if tokenizer:
            from objectives.harness.encoding import Prompting, check_encoding

            check_encoding(tokenizer, Prompting())  # in a process of its own, before it is used

        def count_tokens(text: str) -> int:
            return len(tokenizer.encode(text)) if tokenizer else 0

        return forward_passes(
            text_config(self.model_set.reference.config),
            torch_dtype(self.dtype).itemsize,
            scored=scored_tokens(tasks, count_tokens, chat=chat),
            tuned=tuned_tokens(tasks, count_tokens, chat=chat) if tuned else None,
        )


@dataclass(frozen=True)
class StudyContext:
    """The objects of a study that are made once and need no live model."""

    spec: StudySpec  # the study
    objective: Objective  # the items, and how they are scored
    splits: Splits  # item numbers of each split
    space: Space  # the recipes that are searched
    models: Mapping[str, Checkpoint]  # by name
    # The items under donors' own chat templates, by donor.
    own_templates: Mapping[str, BoundTemplate] = field(default_factory=dict, kw_only=True)
    # Units with weights tuned by gradient; None: no tuning.
    tuned_units: TunedUnits | None = field(default=None, kw_only=True)

    def objective_of(self, donor: str | None) -> Objective:
        """Return the items under a donor's own chat template; None: under the study's."""
        return self.objective if donor is None else self.own_templates[donor].objective

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each task in the study's mean."""
        return dict(self.objective.tasks)

    def items_of(self, split: Split) -> list[Item]:
        """Return the items of a split, in scoring order."""
        return [self.objective.items[number] for number in getattr(self.splits, split)]

    def tasks_of(self, split: Split) -> list[str]:
        """Return the task name of each item of a split, in scoring order."""
        return [item.task for item in self.items_of(split)]


@dataclass(frozen=True)
class LiveContext(StudyContext):
    """A study's objects with a live model, so that candidates can be evaluated."""

    builder: Builder  # writes recipes into the live model


def plan_study(spec: StudySpec, *, compiled: bool = True) -> StudyPlan:
    """Check everything that headers and tasks show, without weights and without a device.

    Raises:
        MergeError, ObjectiveError, StudyError: A model, task or warm start cannot be used.
    """
    models = open_model_set(
        spec.models_read,
        spec.search.trials if compiled else 0,
        spec.tokenizer,
    )
    _check_models(spec, models)
    if spec.search.sampler not in SAMPLERS:  # a user's own, which may be missing
        from search.proposing.samplers import load_sampler

        load_sampler(spec.search.sampler)
    tasks, dtype = plan_tasks(spec), study_dtype(spec, models.reference)
    space = Space.from_spec(spec, models.layer_filters, dtype)
    if spec.search.split:
        parts = Units.of_filters(models.names, space.units).with_live_names(models)
        space = replace(space, units=parts.filters)
    own_templates = find_own_templates(spec, models)
    units = None
    if tuning_method(spec):
        units = tuned_units(spec.search.tune_by, models, space.units)
    starts = len(warm_starts(space))
    return StudyPlan(spec, models, dtype, tasks, space, starts, own_templates, units)


def _check_models(spec: StudySpec, models: ModelSet) -> None:
    """Refuse models that cannot be loaded, merged with one another, or saved."""
    base, own_tokenizer = models.reference, models.vocabulary is None
    if own_tokenizer:
        check_tokenizer(base)
    if quantisation_of(base.config):
        raise StudyError(
            f"{base.folder / 'config.json'}: has a quantization_config, but its tensors are in "
            "full precision; remove that key, or transformers would load them as quantised"
        )
    files_to_copy(base, base.config, tokenizer=own_tokenizer)
    _check_kinds(spec, models)
    check_functions(base, models.checkpoints.values())
    _check_parts(spec, models)


def _check_kinds(spec: StudySpec, models: ModelSet) -> None:
    """Refuse methods whose recipes omit models, if multimodal and text-only models are mixed."""
    kinds = {is_multimodal(checkpoint.config) for checkpoint in models.checkpoints.values()}
    count = len(spec.models)
    used = spec.search.at_most or count
    methods = [m for m in spec.search.methods if not names_all_models(m, count, used)]
    if len(kinds) > 1 and methods:
        raise StudyError(
            f"search.methods: some models are multimodal and some text-only, and the recipes of "
            f"{', '.join(methods)} do not name them all; leave {'them' if methods[1:] else 'it'} "
            "out"
        )


def _check_parts(spec: StudySpec, models: ModelSet) -> None:
    """Refuse layer groups and splits that match nothing: their weights would have no effect."""
    if spec.search.layer_groups > max(1, count := len(models.layer_filters)):
        raise StudyError(
            f"search.layer_groups: {spec.search.layer_groups} groups of {count} layers; name fewer"
        )
    for part in spec.search.split:
        if not any(part in name for name in models.names):
            raise StudyError(
                f"search.split: {part!r} is in no tensor's name; name a part of one, such as "
                f"{max(models.names, key=len)!r}"
            )


def load(
    plan: StudyPlan,
    hardware: Hardware,
    say: Callable[[MemoryPlan | str], None] = lambda _: None,
) -> LiveContext:
    """Place the donors, load the one live model and prepare the prompts for it.

    ``say`` receives the memory plan and how merges are run, before anything is loaded, and the size
    of batches where it was found by trying.

    Raises:
        MergeError, ObjectiveError, StudyError: The model does not fit, or it, its tokenizer or a
            prompt cannot be used.
    """
    if hardware.offload:
        check_offload(plan.spec, hardware.device)
        if plan.tuned_units is not None:
            say("weights are not tuned by gradient with --offload")
            plan = replace(plan, tuned_units=None)
    reserve_share(hardware.device, hardware.share)
    _model_without_weights(plan)  # first, so that its imports count as the process's own memory
    memory = plan.place_donors(hardware)
    say(memory)
    say(plan.kernels)
    model = load_model(
        plan.spec,
        plan.model_set.reference,
        plan.dtype,
        hardware.lives_on,
        plan.model_set.vocabulary,
    )
    builder, spare = Builder(model, plan.model_set), memory.spare
    if hardware.offload:
        offload(model, hardware.device)
        spare = free_bytes(hardware.device, hardware.share)
    # Only for a single worker: several would find different sizes, and so round differently.
    alone = hardware.sharers == 1 and hardware.share == 1 and hardware.device != "auto"
    context = _bind(plan, model, spare if alone else None, say)
    return LiveContext(**vars(context), builder=builder)


def load_outline(plan: StudyPlan) -> StudyContext:
    """Prepare the prompts with a model that has no weights: nothing can be evaluated with it.

    Raises:
        MergeError, ObjectiveError, StudyError: As ``load``, except for memory.
    """
    return _bind(plan, _model_without_weights(plan))


def _model_without_weights(plan: StudyPlan) -> PreTrainedModel:
    """Make the live model without weights, and check that the donors' tensors become its own."""
    models = plan.model_set
    model = load_without_weights(plan.spec, models.reference, plan.dtype, models.vocabulary)
    live = LiveTensors(model, {name: info.shape for name, info in models.tensors.items()})
    if unread := [name for name in models.names if name not in live.targets]:
        _LOG.warning(
            "%s reads no %r%s of the stored tensors: they are merged, and have no part in scores",
            *(type(model).__name__, unread[0], f" and {len(unread) - 1} more" * (len(unread) > 1)),
        )
    return model


def load_prompts(context: LiveContext, prompts: PromptEntry, donor: str | None) -> Objective:
    """Prepare prompts for the live model, as the study's tasks are prepared.

    With ``donor``, they are under that donor's own chat template.
    """
    if donor is None:
        tokenizer = study_tokenizer(context.spec, context.builder.model_set)
    else:
        tokenizer = context.own_templates[donor].tokenizer
    model = cast("PreTrainedModel", context.builder.model)  # as ``load`` has made it
    return bind_prompts(context.spec, prompts, model, tokenizer)


def _bind(
    plan: StudyPlan,
    model: PreTrainedModel,
    memory: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> StudyContext:
    """Prepare the study's prompts and own objectives for a model.

    Forward passes may take ``memory`` bytes; None: batches have the default size.
    """
    tokenizer = study_tokenizer(plan.spec, plan.model_set)
    objective, splits = bind_tasks(plan.spec, plan.tasks, model, tokenizer, memory, say)
    models = plan.model_set.checkpoints
    own = bind_own_templates(
        plan.spec, plan.model_set, plan.own_templates, model, tokenizer, objective
    )
    return StudyContext(
        plan.spec,
        objective,
        splits,
        plan.space,
        models,
        own_templates=own,
        tuned_units=plan.tuned_units,
    )
