"""How many item evaluations, how much time and how much disk a study takes."""

from __future__ import annotations

import math
from typing import Final

from search.preparing.context import StudyPlan
from search.preparing.models import torch_dtype
from search.racing.verdict import SELECT_SHARE
from search.study.spec import StudySpec
from search.wording import duration

RACED: Final = 0.45  # share of the search's item evaluations that races leave, of 100 trials


def describe_cost(plan: StudyPlan) -> str:
    """Return a line with the most that a study takes, in item evaluations and disk."""
    search, items = plan.spec.search, plan.spec.objective.items
    searched = (search.trials + len(plan.model_set.checkpoints) + 1) * items.search
    evaluations = searched + concluding_evaluations(plan.spec, searched, len(plan.own_templates))
    checkpoint = plan.model_set.parameters * torch_dtype(plan.dtype).itemsize
    return (
        f"cost: at most {evaluations:,} item evaluations, usually less than half of them, and "
        f"{max(1, round(checkpoint / 2**20)):,} MiB of disk"
    )


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


def concluding_evaluations(spec: StudySpec, searched: float, own_templates: int) -> int:
    """Return how many item evaluations follow, at most, the ``searched`` ones of a search.

    They are those of the finalists on the select split, of the winners, base, donors and uniform
    average on the test split, of donors under their ``own_templates`` on the search and the test
    split, and of the winner once more before it is saved.
    """
    counts, finalists = spec.objective.items, spec.search.finalists
    winners, compared = (finalists if spec.search.front else 1), len(spec.models_but_base) + 2
    return (
        min(math.ceil(SELECT_SHARE * searched), finalists * counts.select)
        + (winners + compared + own_templates) * counts.test
        + own_templates * counts.search
        + (counts.search + counts.select + counts.test)
    )
