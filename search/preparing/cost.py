"""How many item evaluations, how much time and how much disk a study takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from search.preparing.context import StudyPlan
from search.preparing.forward_memory import JOB_ITEMS
from search.preparing.models import torch_dtype
from search.proposing.tuning import GRADIENT_COST, batch_size, most_steps
from search.racing.verdict import SELECT_SHARE
from search.study.parameters import tuning_method
from search.study.spec import StudySpec
from search.wording import duration

RACED: Final = 0.45  # share of all item evaluations that 100 raced trials need
_LONG: Final = 600.0  # seconds of scoring from which on advice on their number is given
_DEARER: Final = 1.5  # ratio of an item's costs from which on it is given


def describe_cost(plan: StudyPlan) -> str:
    """Return a line with an upper bound of a study's item evaluations and disk space."""
    search, items = plan.spec.search, plan.spec.objective.items
    searched = (search.trials + len(plan.model_set.checkpoints) + 1) * items.search
    evaluations = searched + concluding_evaluations(plan.spec, searched, len(plan.own_templates))
    evaluations += _tuning_evaluations(plan)
    checkpoint = plan.model_set.parameters * torch_dtype(plan.dtype).itemsize
    return (
        f"cost: at most {evaluations:,} item evaluations, usually less than half of them, and "
        f"{max(1, round(checkpoint / 2**20)):,} MiB of disk"
    )


def describe_tuning(plan: StudyPlan) -> list[str]:
    """Return a line on how weights are tuned; empty if they are not."""
    if plan.tuned_units is None:
        return []
    batch, steps = _steps(plan)
    units, donors = len(plan.tuned_units.filters), len(plan.spec.models)
    return [
        f"tuning: {units} weights for each of {donors} donors, by gradient; at most {steps} steps "
        f"of {batch} items, {GRADIENT_COST * batch * steps:,} of the item evaluations; beside the "
        "live model it holds the gradient of one tensor and the activations of up to 8 items"
    ]


def _steps(plan: StudyPlan) -> tuple[int, int]:
    """Return the items of a step, and how many steps there are at most."""
    spec = plan.spec
    batch = batch_size(len(plan.tasks.loaded) or len(spec.objective.tasks))
    return batch, most_steps(spec.search.trials, spec.objective.items.search, batch)


def _tuning_evaluations(plan: StudyPlan) -> int:
    """Return the most evaluations of tuning: gradients, and answers that may become labels."""
    if plan.tuned_units is None:
        return 0
    batch, steps = _steps(plan)
    tune = plan.tasks.splits.tune if plan.tasks.splits else ()
    generated = sum(plan.tasks.items[number].generated for number in tune)
    return GRADIENT_COST * batch * steps + generated * len(plan.model_set.checkpoints)


def describe_time(spec: StudySpec, evaluations: float, per_item: float, per_build: float) -> str:
    """Return a line with the time that a search without early stopping takes.

    Args:
        spec: The study.
        evaluations: Item evaluations of all of it, about.
        per_item: Seconds in which the workers evaluate an item.
        per_build: Seconds in which they build a candidate.
    """
    builds = spec.search.trials + spec.search.finalists + len(spec.models_but_base) + 2
    seconds = evaluations * per_item + builds * per_build
    return (
        f"time: about {duration(seconds)}, less where early stopping ends the search "
        f"({per_item:.2g} s an item, {per_build:.2g} s a candidate)"
    )


def block_advice(block: int, counts: Mapping[str, int], seconds: Mapping[str, float]) -> list[str]:
    """Return the advice to enlarge blocks where items cost far less in larger jobs.

    Args:
        block: Items of a block, in which search items are scored.
        counts: Item evaluations by split; test items are scored in jobs of ``JOB_ITEMS``.
        seconds: What they took.
    """
    alone, together = (seconds[split] / counts[split] for split in ("search", "test"))
    if seconds["search"] < _LONG or block >= JOB_ITEMS or alone < _DEARER * together:
        return []
    return [
        f"an item took {alone:.2g} s in blocks of {block} and {together:.2g} s in jobs of "
        f"{JOB_ITEMS}: another study like this one is faster with a larger objective.block"
    ]


def concluding_evaluations(spec: StudySpec, searched: float, own_templates: int) -> int:
    """Return an upper bound of the item evaluations after a search with ``searched`` of them.

    These are the finalists on the select split; the winners, base, donors, uniform average and, if
    weights are tuned, the best untuned recipe on the test split; donors under their
    ``own_templates`` on the search and test splits; and the winner once more before it is saved.
    """
    counts, finalists = spec.objective.items, spec.search.finalists
    winners, compared = (finalists if spec.search.front else 1), len(spec.models_but_base) + 2
    compared += tuning_method(spec) is not None
    return (
        min(math.ceil(SELECT_SHARE * searched), finalists * counts.select)
        + (winners + compared + own_templates) * counts.test
        + own_templates * counts.search
        + (counts.search + counts.select + counts.test)
    )
