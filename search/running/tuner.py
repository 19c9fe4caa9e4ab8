"""Tuning of weights by gradient: steps along a path, whose points are trials of the study.

A step updates one weight per unit and donor by the gradient of the mean loss of a few tune items.
After 10, 20, 40, ... steps the running mean of the weights is a point of the path: a trial, which
races on search items that no gradient has seen. A path ends when its last two points are behind an
earlier one, or at its limit. If it was still improving there, a second path starts later, from the
best recipe known by then. Every step is stored before the next, so a killed run continues on the
same path.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

import numpy as np

from merge_engine.recipe.recipe import Recipe
from objectives.items import blocks
from objectives.scores import task_means
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.proposing.starts import even_weights
from search.proposing.tuned_path import PATH_PREFIX, TunedPath, TunedUnits
from search.proposing.tuning import (
    AT_ONCE,
    BATCH,
    GRADIENT_COST,
    LEAST_STEPS,
    batch_size,
    first_state,
    items_of_job,
    minibatch,
    most_steps,
    point_steps,
    update,
)
from search.racing.race import Floats
from search.running.events import Note, StepTaken
from search.running.labels import find_labels, group_by_task
from search.running.run import Run
from search.running.workers import FAILURES, LossJob, LossReply
from search.storing.store import PathStep
from search.storing.trials import TrialRecord
from search.study.parameters import tuning_method

Upcoming = Literal["point", "steps", "trial", "path", ""]

RATES: Final = (0.12, 0.06)  # step sizes of the first path and the second
BETWEEN_PATHS: Final = 10  # trials proposed by the sampler between the first path and the second


def first_path_evaluations(run: Run) -> int:
    """Return the minimum item evaluations of the first path; 0 without tuning."""
    tuned = run.context.tuned_units is not None and bool(run.context.splits.tune)
    return LEAST_STEPS * BATCH * GRADIENT_COST if tuned else 0


def last_path_trial(trials: Sequence[TrialRecord]) -> int | None:
    """Return the number of the last trial that is a point of a path."""
    numbers = [one.number for one in trials if (one.start or "").startswith(PATH_PREFIX)]
    return max(numbers, default=None)


class Tuner:
    """Takes the steps of a study's paths and makes their points trials.

    Args:
        run: Of the study.
        deadline: By ``time.perf_counter``; no step is begun after it.
        ranking: Indices of the donors, the best first; empty: as the study lists them.
    """

    def __init__(self, run: Run, deadline: float, ranking: Sequence[int] = ()) -> None:
        self.run, self.deadline = run, deadline
        self.method = tuning_method(run.spec)
        self.ended = run.context.tuned_units is None or not run.context.splits.tune
        # The average of all donors, or of the best that a recipe may use, (k).
        self._start = even_weights(
            run.context.space,
            (ranking or range(len(run.context.space.donors)))[: run.context.space.used],
            1 / run.context.space.used,
        )
        self._by_task: dict[str, list[int]] = {}
        self._labels: dict[int, str] = {}
        self._steps = run.store.steps()

    @property
    def _units(self) -> TunedUnits:
        assert self.run.context.tuned_units is not None  # else it has ended before it begins
        return self.run.context.tuned_units

    @property
    def _batch(self) -> int:
        return batch_size(len(self.run.context.weights))

    def is_due(self, trials: Sequence[TrialRecord]) -> bool:
        """Return whether steps, or a point of the path, come next, given all trials so far."""
        return self._upcoming(trials) in ("point", "steps", "path")

    def is_on_first_path(self, trials: Sequence[TrialRecord]) -> bool:
        """Return whether the first path is still under way."""
        first = not self._steps or self._steps[-1].path == 0
        return first and self._upcoming(trials) in ("point", "steps", "trial")

    def _upcoming(self, trials: Sequence[TrialRecord]) -> Upcoming:
        """Return what comes next: the last point, steps, the trial of a point, or another path."""
        if self.ended or time.perf_counter() > self.deadline:
            return ""
        if not self._steps or not self._steps[-1].is_point or not self._steps[-1].step:
            return "steps"
        trial = self._trial_of(self._steps[-1], trials)
        if trial is None:
            return "point"
        if trial.state in ("waiting", "running"):
            return "trial"
        if self._goes_on(trials):
            return "steps"
        return "path" if self._second_path_begins(trials) else ""

    def advance(self, trials: Sequence[TrialRecord]) -> None:
        """Take the steps up to the next point, and queue it as a trial.

        A step that fails ends all tuning.

        Raises:
            KeyboardInterrupt: The user has ended the run.
            StudyError: The study is to be tuned, and no item has a label.
        """
        try:
            if not self._labels:
                self._find_labels()
            if not self.ended:
                self._advance(trials)
        except FAILURES as error:
            self.ended = True
            self.run.listener(Note(f"the tuning of weights has ended: {error}"))

    def _find_labels(self) -> None:
        self._labels = dict(find_labels(self.run))
        self._by_task = group_by_task(self.run, self._labels)
        self.ended = not self._by_task

    def _advance(self, trials: Sequence[TrialRecord]) -> None:
        upcoming = self._upcoming(trials)
        if not self._steps:
            self._begin(0, np.tile(self._start, (len(self._units.filters), 1)))
        elif upcoming == "path":
            self._begin(self._steps[-1].path + 1, self._incumbent())
        if upcoming != "point":
            while not self._take_step().is_point:
                if time.perf_counter() > self.deadline:
                    return
            self.run.read_tuned_path()
        self._enqueue(self._steps[-1])

    def _incumbent(self) -> Floats:
        """Return the weights (U, k) of the best recipe of the method that is tuned."""
        ranked, _ = self.run.ranked_candidates()
        points = (one.trial.point for one in ranked)
        best = next(point for point in points if point["method"] == self.method)
        return self.run.space.tuned_weights(best)

    def _begin(self, path: int, weights: Floats) -> None:
        of_labels = self.run.log.header()["labels"]["evaluations"] if path == 0 else 0
        self._save(PathStep(path, 0, True, of_labels, 0.0, {}), first_state(weights))

    def _take_step(self) -> PathStep:
        """Update the weights by the gradient of a few items' losses, and store them."""
        start, last = time.perf_counter(), self._steps[-1]
        (state,) = self.run.store.states(points=False)
        seed = (self.run.spec.search.seed, last.path)
        items = minibatch(self._by_task, self.run.context.weights, self._batch, last.step, seed)
        losses, gradient = self._losses_and_gradient(state[0], items)
        step, ends = last.step + 1, self._point_steps(last.path)
        taken = PathStep(
            last.path,
            step,
            step in ends,
            GRADIENT_COST * len(items),
            time.perf_counter() - start,
            task_means(losses, [self.run.context.objective.items[n].task for n in items]),
        )
        self._save(taken, update(state, gradient, step, RATES[last.path]))
        upcoming = next((end for end in ends if end >= step), step)
        self.run.listener(StepTaken(step, upcoming, float(np.mean(losses)), taken.evaluations))
        return taken

    def _losses_and_gradient(
        self, weights: Floats, items: Sequence[int]
    ) -> tuple[list[float], Floats]:
        """Compute the losses of items at weights (U, k), and the gradient (U, k) of their mean.

        It is zero for donors without weight, so that they stay out (``search.at_most``).
        """
        recipe, share = self._recipe(weights), 1 / len(items)
        jobs = [
            LossJob(recipe, part, tuple(self._labels[n] for n in part), (share,) * len(part))
            for part in blocks(items, items_of_job(len(items), AT_ONCE, self.run.workers.count))
        ]
        replies = self.run.evaluator.do_all(jobs, LossReply)
        of_models = sum(reply.gradient for reply in replies if reply.gradient is not None)
        gradient = of_models @ self.run.context.space.signs.T
        gradient[:, ~weights.any(axis=0)] = 0.0
        return [loss for reply in replies for loss in reply.losses], gradient

    def _save(self, step: PathStep, state: Floats) -> None:
        self.run.store.save_step(step, state)
        self._steps.append(step)

    def _point_steps(self, path: int) -> list[int]:
        """List the steps after which the weights are a point of a path."""
        trials, items = self.run.spec.search.trials, len(self.run.context.splits.search)
        earlier = sum(one.path < path and one.step > 0 for one in self._steps)
        return point_steps(most_steps(trials, items, self._batch) - earlier)

    def _recipe(self, weights: Floats) -> Recipe:
        """Return the recipe with tuned weights (U, k)."""
        space = replace(self.run.context.space, tuned=TunedPath(self._units, weights[None]))
        return to_recipe(space, self._tuned_point(space, 0.0))

    def _tuned_point(self, space: Space, position: float) -> dict[str, object]:
        """Return the point at a position of the path, where flat weights have no effect."""
        assert self.method is not None
        point = space.point(self.method, self._start)
        for name, (low, high) in space.bounds.items():
            point[name] = min(max(point[name], low), high)
        return {**point, "strength": 1.0, "position": position}

    def _enqueue(self, step: PathStep) -> None:
        known = [one for one in self._steps if one.is_point]
        point = self._tuned_point(self.run.space, float(known.index(step)))
        self.run.log.enqueue(point, start=_label(step))

    def _trial_of(self, step: PathStep, trials: Sequence[TrialRecord]) -> TrialRecord | None:
        return next((trial for trial in trials if trial.start == _label(step)), None)

    def _trials_of(self, path: int, trials: Sequence[TrialRecord]) -> list[TrialRecord | None]:
        """List the trials of a path's points; None for one that has failed."""
        found = [
            self._trial_of(step, trials)
            for step in self._steps
            if step.path == path and step.is_point and step.step
        ]
        return [one if one and one.state == "complete" else None for one in found]

    def _goes_on(self, trials: Sequence[TrialRecord]) -> bool:
        """Return whether the last path is below its limit, its best point one of the last two."""
        last = self._steps[-1]
        known = self._trials_of(last.path, trials)
        best = min((one.sort_key for one in known if one), default=None)
        ahead = [one.sort_key == best for one in known[-2:] if one]
        return last.step < self._point_steps(last.path)[-1] and any(ahead)

    def _second_path_begins(self, trials: Sequence[TrialRecord]) -> bool:
        """Return whether the first path, still rising at its end, has a second after it.

        It was rising if its last point is ahead of every other by more than a standard error.
        """
        last = self._steps[-1]
        *others, end = self._trials_of(last.path, trials)
        if last.path + 1 >= len(RATES) or end is None or not self._point_steps(last.path + 1):
            return False
        best = min((one.sort_key for one in others if one), default=(np.inf, np.inf))
        if (end.violation, -end.value + end.variance**0.5) >= best:
            return False
        later = [trial for trial in trials if trial.number > end.number and trial.completed]
        return sum(trial.expected_improvement is not None for trial in later) >= BETWEEN_PATHS


def _label(step: PathStep) -> str:
    again = f" of path {step.path + 1}" if step.path else ""
    return f"{PATH_PREFIX}{step.step} steps{again}"
