"""Scores and constraint violations from the stored results of a study's items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from objectives.items import Split
from search.preparing.context import StudyContext
from search.proposing.starts import baselines
from search.racing.item_scores import ItemScores, constraint_violation
from search.racing.race import Floats, Strata
from search.running.evaluator import Evaluated, Evaluator
from search.study.spec import BelowBase, StudyError


class Scores:
    """Scores of recipes on the study's items, evaluated where they are not stored."""

    def __init__(self, context: StudyContext, evaluator: Evaluator) -> None:
        self.context, self.evaluator = context, evaluator
        constraints = context.spec.objective.constraints
        self._fixed = {task: f for task, f in constraints.items() if isinstance(f, float)}
        self._below_base = {t: f for t, f in constraints.items() if isinstance(f, BelowBase)}
        self._base = baselines(context.space)[context.spec.base_model]

    def empty(self) -> ItemScores:
        """Return the scores of no items."""
        return ItemScores((), (), self.context.weights)

    def stored(self, recipe: Evaluated, split: Split, items: int | None = None) -> ItemScores:
        """Read a recipe's scores on the first items of a split, in whole blocks; None: on all.

        Raises:
            StudyError: Some of them are not there.
        """
        results = self.evaluator.stored(recipe, split, items)
        return ItemScores.of(
            self.context.items_of(split)[: len(results)], results, self.context.weights
        )

    def evaluate(self, recipes: Sequence[Evaluated], split: Split) -> list[ItemScores]:
        """Evaluate recipes on a split, all together, and read their scores.

        Raises:
            MergeError, ObjectiveError: One of them cannot be built or evaluated.
        """
        for error in self.attempt(recipes, split).values():
            raise error
        return [self.stored(recipe, split) for recipe in recipes]

    def attempt(
        self, recipes: Sequence[Evaluated], split: Split, items: int | None = None
    ) -> dict[str, Exception]:
        """Evaluate recipes on the first items of a split; return the errors of failed ones by key.

        If a constraint is relative to the base, the base is evaluated on the same items.
        """
        base = [self._base] if self._below_base else []
        return self.evaluator.attempt([*recipes, *base], split, items)

    def matrix(
        self, recipes: Sequence[Evaluated], split: Split, items: int | None = None
    ) -> Floats:
        """Read k recipes' scores on the first items of a split: values (k, m)."""
        return np.array([self.stored(recipe, split, items).values for recipe in recipes])

    def strata(self, split: Split) -> Strata:
        """Return the tasks of a split's items as strata."""
        return Strata(self.context.tasks_of(split), self.context.weights)

    def violation(self, scores: Mapping[Split, ItemScores]) -> float:
        """Compute a recipe's constraint violation on the items it was evaluated on."""
        together = sum(scores.values(), start=self.empty())
        limit = self.context.spec.objective.max_mean_tokens
        return constraint_violation(together, self.floors(scores), limit)

    def floors(self, scores: Mapping[Split, ItemScores]) -> dict[str, float]:
        """Compute each constrained task's minimum mean for a recipe with these scores.

        A constraint relative to the base is the base's mean on the same items, less its margin.
        """
        floors = dict(self._fixed)
        if self._below_base:
            same = [
                self.stored(self._base, split, len(one.values)) for split, one in scores.items()
            ]
            means = sum(same, start=self.empty()).by_task
            floors |= {
                task: mean - self._below_base[task].margin
                for task, mean in means.items()
                if task in self._below_base
            }
        return floors

    def faults(self, recipe: Evaluated, items: int | None = None) -> list[tuple[str, str]]:
        """List task and reason of each of the first search items that could not be judged."""
        results = self.evaluator.stored(recipe, "search", items)
        tasks = self.context.tasks_of("search")
        return [(t, one.fault) for t, one in zip(tasks, results, strict=False) if one.fault]

    def check_judged(self, name: str, recipe: Evaluated) -> list[str]:
        """Describe how many search items of a model could not be judged, task by task.

        Raises:
            StudyError: No item of a task could be judged, so no candidate could score on it.
        """
        faults = self.faults(recipe)
        sizes = Counter(self.context.tasks_of("search"))
        notes = []
        for task, count in Counter(task for task, _ in faults).items():
            reason = next(reason for at, reason in faults if at == task)
            if count == sizes[task]:
                raise StudyError(f"{name} alone: task {task!r}: no answer can be judged: {reason}")
            notes.append(
                f"{name} alone: task {task!r}: {count} of {sizes[task]} answers could not be "
                f"judged and count 0, the first: {reason}"
            )
        return notes
