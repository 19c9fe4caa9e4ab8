"""The search loop: ask, build, evaluate, race, tell.

There are no generations: a candidate that loses its race is replaced at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merge_engine.recipe.recipe import Recipe
from search.preparing.cost import RACED, concluding_evaluations, describe_time
from search.proposing.recipes import to_recipe
from search.proposing.samplers import Proposer
from search.proposing.starts import baselines, warm_starts
from search.proposing.stopping import PATIENCE, has_stalled, should_stop
from search.racing.item_scores import ItemScores
from search.running.baselines import open_race, rank_donors, try_baselines
from search.running.evaluator import Blocks
from search.running.events import (
    Note,
    PlanReady,
    RaceProgressed,
    SearchStarted,
    TrialFinished,
    TrialProgress,
)
from search.running.run import Run
from search.running.tuner import Tuner, first_path_evaluations, last_path_trial
from search.storing.trials import OpenTrial, TrialRecord


@dataclass
class RunningTrial:
    """A trial in the race: its recipe, and its scores on the items considered so far."""

    trial: OpenTrial
    recipe: Recipe
    scores: ItemScores


def search(
    run: Run, timeout: float = math.inf, after_trial: Sequence[Callable[[Run], None]] = ()
) -> None:
    """Run trials up to the study's number, early stopping or the timeout.

    After ``timeout`` seconds of the session no trial but the first is begun.

    Raises:
        StudyError: The base or a donor cannot be evaluated.
    """
    evaluations = sum(run.store.evaluations()[0].values())
    total, items = run.spec.search.trials, run.spec.objective.items.search
    searched, own = RACED * total * items, len(run.context.own_templates)
    after = concluding_evaluations(run.spec, searched, own)
    run.listener(SearchStarted(total, run.log.finished(), evaluations, after))
    try_baselines(run)
    if run.evaluator.build_seconds:  # else the first blocks were stored
        _announce_time(run, searched + first_path_evaluations(run) + after)
    SearchLoop(run, run.opened + timeout, after_trial).work()


def _announce_time(run: Run, evaluations: float) -> None:
    """Announce the expected time, from the first blocks of base, donors and average."""
    counts, seconds = run.store.evaluations()
    per_item = sum(seconds.values()) / sum(counts.values()) / run.workers.count
    per_build = run.evaluator.build_seconds / len(baselines(run.context.space)) / run.workers.count
    run.listener(PlanReady(describe_time(run.spec, evaluations, per_item, per_build)))


class SearchLoop:
    """The trials in the race, one for each worker.

    After ``deadline``, by ``time.perf_counter``, no further trial is begun.

    Attributes:
        starts_pending: Whether the warm starts are yet to be queued, after the first path of tuned
            weights.
    """

    def __init__(
        self, run: Run, deadline: float, after_trial: Sequence[Callable[[Run], None]]
    ) -> None:
        self.run, self.deadline, self.after_trial = run, deadline, after_trial
        spec, space = run.spec.search, run.context.space
        ranked = [] if space.has_differences else rank_donors(run, own_templates=False)
        self._ranking = ranking = [space.models.index(name) for name, _ in ranked]
        self.proposer = Proposer(spec.sampler, space, spec.seed, front=spec.front, ranking=ranking)
        self.race = open_race(run)
        self.tuner = Tuner(run, deadline, ranking)
        self.starts_pending = True
        self._waiting: dict[Blocks, list[RunningTrial]] = {}  # trials by the block they need

    def work(self) -> None:
        """Ask, evaluate, race and tell until nothing is left to do."""
        evaluator = self.run.evaluator
        while True:
            trials = self.run.log.records()
            if len(trials) < self.run.spec.search.trials and self.tuner.is_due(trials):
                if not self._waiting:
                    self.tuner.advance(trials)
                    continue
            elif self._begin_trials(trials) and not self._waiting:
                continue  # all that were begun are told: their results were stored
            self._evaluate_ahead()
            if not self._waiting:
                break
            self.run.listener(RaceProgressed(self._progress()))
            block, failure = evaluator.collect()
            for running in self._waiting.pop(block):
                if failure is None:
                    self._advance(running)
                else:
                    self._finish(running.trial.fail(str(failure)))
        self._note_why_it_ended()

    def _begin_trials(self, trials: Sequence[TrialRecord]) -> bool:
        """Begin trials for idle workers; during the first tuned path, only its points.

        Returns:
            Whether one was begun.
        """
        opening = self.tuner.is_on_first_path(trials)
        if self.starts_pending and not opening:
            self._enqueue_starts()
        begun = False
        while self.run.evaluator.idle and self._may_begin():
            if opening and not self._some_wait():
                break
            self._advance(self._begin())
            begun = True
        return begun

    def _some_wait(self) -> bool:
        """Return whether a trial is queued, or was left running by an earlier session."""
        log = self.run.log
        return bool(log.records("waiting") or log.left_running(self._open_now))

    def _enqueue_starts(self) -> None:
        """Queue the warm starts that no session has queued before."""
        self.starts_pending = False
        known = {trial.start for trial in self.run.log.records()}
        for label, point in warm_starts(self.run.space, self._ranking):
            if label not in known:
                self.run.log.enqueue(point, start=label)

    @property
    def _running(self) -> list[RunningTrial]:
        """Trials that wait for a block, in the order of their numbers."""
        waiting = [one for trials in self._waiting.values() for one in trials]
        return sorted(waiting, key=lambda one: one.trial.number)

    @property
    def _open_now(self) -> list[int]:
        """Numbers of the trials in the race."""
        return [one.trial.number for one in self._running]

    def _may_begin(self) -> bool:
        run, open_now = self.run, self._open_now
        finished = run.log.finished()
        begun = len(finished) + len(open_now)
        if begun >= run.spec.search.trials or (begun and time.perf_counter() > self.deadline):
            return False
        return not self._reason_to_stop(finished) or bool(run.log.left_running(open_now))

    def _reason_to_stop(self, finished: Sequence[TrialRecord]) -> str:
        """Return why no further gain is expected; empty if one is."""
        if not self.run.spec.search.stop:
            return ""
        select = len(self.run.context.splits.select)
        tuned = last_path_trial(finished)
        if should_stop(finished, select):
            return "the expected improvement is below what the select split can resolve"
        if tuned is not None and has_stalled(finished, select, tuned):
            return f"none of the last {PATIENCE} proposals was better than the best before"
        return ""

    def _begin(self) -> RunningTrial:
        """Open the next trial: one of an earlier session, a warm start, or a new proposal."""
        start = time.perf_counter()
        trial = self.proposer.ask(self.run.log, self._open_now, self.run.space)
        self.run.ask_seconds += time.perf_counter() - start
        recipe = to_recipe(self.run.space, trial.point)
        trial.set_recipe(recipe.key)
        return RunningTrial(trial, recipe, self.run.scores.empty())

    def _advance(self, running: RunningTrial) -> None:
        """Evaluate a trial on one more block, or tell it when the race has stopped it."""
        evaluator = self.run.evaluator
        while self.race.should_continue(running.scores.array):
            items = len(running.scores.values) + 1
            if missing := evaluator.missing_blocks(running.recipe, "search", items):
                block = Blocks(running.recipe.key, "search", (missing[0],))
                if block not in self._waiting:  # else another trial of the same recipe waits
                    evaluator.submit(running.recipe, "search", missing[0])
                self._waiting.setdefault(block, []).append(running)
                return
            running.scores = self.run.scores.stored(running.recipe, "search", items)
        self._tell(running)

    def _evaluate_ahead(self) -> None:
        """Let idle workers evaluate blocks that the running trials may need next.

        Else, at the end of a search, all workers but one would wait for the longest trial.
        """
        evaluator = self.run.evaluator
        if not evaluator.idle:
            return
        for recipe in {one.recipe.key: one.recipe for one in self._running}.values():
            for number in evaluator.missing_blocks(recipe, "search"):
                block = Blocks(recipe.key, "search", (number,))
                if evaluator.idle and block not in self._waiting:
                    evaluator.submit(recipe, "search", number)
                    self._waiting[block] = []

    def _tell(self, running: RunningTrial) -> None:
        """Finish a trial with its recipe's estimate."""
        run, scores = self.run, running.scores
        violation = run.scores.violation({"search": scores})
        faults = run.scores.faults(running.recipe, len(scores.values))
        summary = None
        if faults:
            summary = f"{len(faults)} answers not judged, e.g. {': '.join(faults[0])}"
        record = running.trial.tell(
            self.race.record(scores.array, violation),
            self.race.by_task(scores.array),
            items=len(scores.values),
            order=len(run.log.finished()),
            violation=violation if run.spec.objective.has_constraints else None,
            faults=summary,
        )
        self._finish(record)

    def _finish(self, record: TrialRecord) -> None:
        self.run.log.set_header(seconds=self.run.seconds())
        self.run.listener(TrialFinished(record))
        for work in self.after_trial:
            work(self.run)

    def _progress(self) -> list[TrialProgress]:
        ends = self.run.evaluator.block_ends("search")
        return [
            TrialProgress(
                one.trial.number,
                one.recipe.merge_method,
                sum(end <= len(one.scores.values) for end in ends),
                len(ends),
                self.race.lead(one.scores.array),
            )
            for one in self._running
        ]

    def _note_why_it_ended(self) -> None:
        finished = self.run.log.finished()
        if why := self._reason_to_stop(finished):
            self.run.listener(
                Note(
                    f"early stopping after {len(finished)} trials: {why}; with search.stop: false "
                    "the search would continue"
                )
            )
        elif len(finished) < self.run.spec.search.trials:
            self.run.listener(
                Note("the time limit is reached; run it again to continue the search")
            )
