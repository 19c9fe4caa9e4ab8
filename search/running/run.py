"""The search loop of a run: ask, build, evaluate, race, tell.

Everything a run knows is in its database, so running it again goes on where it stopped: finished
trials are kept, a running trial is taken up again with its finished blocks, and proposals depend
on the finished trials alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_engine.recipe.recipe import Recipe
from search.preparing.context import StudyContext
from search.preparing.cost import RACED, concluding_evaluations
from search.proposing.gp import posterior_of
from search.proposing.gp_sampler import MAX_TRIALS
from search.proposing.recipes import to_recipe
from search.proposing.samplers import Proposer
from search.proposing.starts import baselines, warm_starts
from search.proposing.stopping import should_stop
from search.racing.elimination import JointPosterior, successive_elimination
from search.racing.item_scores import ItemScores
from search.racing.race import Floats, Race
from search.running.evaluator import Block, Evaluator
from search.running.events import (
    BlockEvaluated,
    Listener,
    Note,
    RaceProgress,
    RaceProgressed,
    SearchStarted,
    TrialFinished,
)
from search.running.scores import Scores
from search.running.workers import FAILURES, Workers
from search.storing.address import Storage
from search.storing.resume import check_items, check_models, check_same, find_trial
from search.storing.store import Store
from search.storing.trials import Candidate, OpenTrial, TrialLog, TrialRecord, candidates
from search.study.spec import StudyError, StudySpec


@dataclass
class RunningTrial:
    """A trial in the race: its recipe, and its scores on the items considered so far."""

    trial: OpenTrial
    recipe: Recipe
    scores: ItemScores


class Run:
    """One session of a run.

    Args:
        folder: The run folder.
        context: The study's space, items and models.
        workers: Build and evaluate recipes.
        listener: Called with every event.
        store: The run's database; None: the folder's own.
        after_trial: Called after each finished trial.
    """

    def __init__(
        self,
        folder: Path,
        context: StudyContext,
        workers: Workers,
        listener: Listener,
        store: Store | None = None,
        after_trial: Sequence[Callable[[Run], None]] = (),
    ) -> None:
        self.folder, self.context, self.workers, self.listener = folder, context, workers, listener
        self.store = store or Store(Storage.of(folder))
        self.log = TrialLog(self.store.study())
        search = context.spec.search
        self.proposer = Proposer(search.sampler, context.space, search.seed, front=search.front)
        self.evaluator = Evaluator(
            context, self.store, workers, lambda items: listener(BlockEvaluated(items))
        )
        self.scores = Scores(context, self.evaluator)
        self.after_trial = after_trial
        self._waiting: dict[Block, list[RunningTrial]] = {}  # trials by the block they need
        self._started = time.perf_counter()
        self._ask_seconds = 0.0
        self._earlier: Mapping[str, float] = self.log.header().get("seconds", {})

    @property
    def spec(self) -> StudySpec:
        """The study."""
        return self.context.spec

    def bind_to_store(self) -> None:
        """Write the study into the database, or compare it with what is there.

        Raises:
            StudyError: The folder is another study's, or models or tasks' files have changed.
        """
        context = self.context
        check_same(self.folder, self.log, self.spec)
        check_items(self.folder, self.store, context.objective, context.splits)
        check_models(self.folder, self.log, context.models)
        self.log.set_header(  # for what has the database alone, such as the report
            baselines={name: recipe.key for name, recipe in baselines(context.space).items()},
            weights=context.weights,
            spec=self.spec.model_dump(mode="json"),
        )

    def search(self, timeout: float = math.inf) -> None:
        """Run trials until the study has all of them: one in the race for each worker.

        A candidate that has lost its race makes way for the next at once; there is no barrier.

        Args:
            timeout: Seconds of this session after which no trial but the first is begun.

        Raises:
            StudyError: The base or a donor cannot be evaluated.
        """
        evaluations = sum(self.store.evaluations()[0].values())
        total, items = self.spec.search.trials, self.spec.objective.items.search
        after = concluding_evaluations(self.spec, RACED * total * items)
        self.listener(SearchStarted(total, self.log.finished(), evaluations, after))
        self._enqueue_warm_starts()
        self._try_baselines()
        race = self._race()
        while True:
            while self.evaluator.idle and self._goes_on(timeout):
                self._advance(self._begin(), race)
            self._evaluate_ahead()
            if not self._waiting:
                break
            self.listener(RaceProgressed(self._progress(race)))
            block, failure = self.evaluator.collect()
            for running in self._waiting.pop(block):
                if failure is None:
                    self._advance(running, race)
                else:
                    self._finish(running.trial.fail(str(failure)))
        self._note_why_it_ended()

    def _note_why_it_ended(self) -> None:
        finished = self.log.finished()
        if self._exhausted(finished):
            self.listener(
                Note(
                    f"early stopping after {len(finished)} trials: the expected improvement is "
                    "below what the select split can resolve; with search.stop: false the search "
                    "goes on"
                )
            )
        elif len(finished) < self.spec.search.trials:
            self.listener(Note("the time is up; run it again to go on searching"))

    def _try_baselines(self) -> None:
        """Evaluate base, donors and their uniform average on a first block of search items.

        Raises:
            StudyError: One of them cannot be evaluated.
        """
        inputs = baselines(self.context.space)
        with suppress(*FAILURES):  # all at once; which of them has failed is found below
            self.scores.evaluate([*inputs.values()], "search", 1)
        right = 0.0
        for name, recipe in inputs.items():
            try:
                right += self.scores.evaluate([recipe], "search", 1)[0].mean
            except FAILURES as error:
                raise StudyError(f"{name} alone: {error}") from error
        if right == 0:
            first = self.evaluator.block_ends("search")[0]
            self.listener(
                Note(
                    f"neither the base nor a donor has one of the first {first} "
                    "search items right; if they should, look at how the task asks them (its "
                    "doc_to_text, apply_chat_template)"
                )
            )

    @property
    def _running(self) -> list[RunningTrial]:
        """Trials that wait for a block."""
        return [one for trials in self._waiting.values() for one in trials]

    @property
    def _open_now(self) -> list[int]:
        """Numbers of the trials that wait for a block."""
        return [one.trial.number for one in self._running]

    def _goes_on(self, timeout: float) -> bool:
        """Decide whether to begin another trial beside the running ones."""
        finished, open_now = self.log.finished(), self._open_now
        begun = len(finished) + len(open_now)
        in_time = time.perf_counter() - self.store.opened <= timeout
        wanted = self.log.left_running(open_now) or not self._exhausted(finished)
        return begun < self.spec.search.trials and bool(wanted) and (in_time or not begun)

    def _exhausted(self, finished: Sequence[TrialRecord]) -> bool:
        """Decide whether early stopping ends the search."""
        return self.spec.search.stop and should_stop(finished, len(self.context.tasks_of("select")))

    def _begin(self) -> RunningTrial:
        """Open the next trial: one of an earlier session, a warm start, or a new proposal."""
        start = time.perf_counter()
        trial = self.proposer.ask(self.log, self._open_now)
        self._ask_seconds += time.perf_counter() - start
        recipe = to_recipe(self.context.space, trial.point)
        trial.set_recipe(recipe.key)
        return RunningTrial(trial, recipe, self.scores.empty())

    def _advance(self, running: RunningTrial, race: Race) -> None:
        """Evaluate a trial on one more block, or tell it when the race has stopped it."""
        while race.should_continue(running.scores.array):
            items = len(running.scores.values) + 1
            if missing := self.evaluator.missing_blocks(running.recipe, "search", items):
                block = Block(running.recipe.key, "search", missing[0])
                if block not in self._waiting:  # else another trial of the same recipe waits
                    self.evaluator.submit(running.recipe, "search", missing[0])
                self._waiting.setdefault(block, []).append(running)
                return
            running.scores = self.scores.stored(running.recipe, "search", items)
        self._tell(running, race)

    def _progress(self, race: Race) -> list[RaceProgress]:
        """Describe the running trials, in the order of their numbers."""
        ends = self.evaluator.block_ends("search")
        return [
            RaceProgress(
                one.trial.number,
                one.recipe.merge_method,
                sum(end <= len(one.scores.values) for end in ends),
                len(ends),
                race.lead(one.scores.array),
            )
            for one in sorted(self._running, key=lambda one: one.trial.number)
        ]

    def _evaluate_ahead(self) -> None:
        """Let idle workers evaluate blocks that the running trials may need next.

        At the end of a search the longest trial would keep all but one of them waiting.
        """
        if not self.evaluator.idle:
            return
        for recipe in {one.recipe.key: one.recipe for one in self._running}.values():
            for number in self.evaluator.missing_blocks(recipe, "search"):
                block = Block(recipe.key, "search", number)
                if self.evaluator.idle and block not in self._waiting:
                    self.evaluator.submit(recipe, "search", number)
                    self._waiting[block] = []

    def _tell(self, running: RunningTrial, race: Race) -> None:
        """Tell a trial its recipe's estimate and that estimate's variance."""
        scores, limited = running.scores, self.spec.objective.has_constraints
        violation = self.scores.violation({"search": scores})
        faults = self.scores.faults(running.recipe, len(scores.values))
        record = running.trial.tell(
            race.record(scores.array, violation),
            race.by_task(scores.array),
            items=len(scores.values),
            order=len(self.log.finished()),
            violation=violation if limited else None,
            faults=f"{len(faults)} answers not judged, e.g. {': '.join(faults[0])}"
            if faults
            else None,
        )
        self._finish(record)

    def _finish(self, record: TrialRecord) -> None:
        self.log.set_header(seconds=self.seconds())
        self.listener(TrialFinished(record))
        for work in self.after_trial:
            work(self)

    def best_donor(self) -> str:
        """Return the donor with the highest posterior mean after a race among the donors."""
        donors = self.spec.models_but_base
        recipes = [baselines(self.context.space)[donor] for donor in donors]

        def values(some: Sequence[int], items: int) -> Floats:
            return self.scores.matrix([recipes[index] for index in some], "search", items)

        best = successive_elimination(
            JointPosterior.vague(len(donors)),
            self.scores.strata("search"),
            values,
            self.evaluator.block_ends("search"),
        )
        return donors[best]

    def _race(self) -> Race:
        """Make the race as the finished trials have left it; the best donor is recorded first."""
        race = Race(self.scores.strata("search"), front=self.spec.search.front)
        best = self.best_donor()
        recipe = baselines(self.context.space)[best]
        (scores,) = self.scores.evaluate([recipe], "search")
        for note in self.scores.check_judged(best, recipe):
            self.listener(Note(note))
        race.record(scores.array, self.scores.violation({"search": scores}))
        for trial in self._references(race):
            scores = self.scores_of(trial)
            race.record(scores.array, self.scores.violation({"search": scores}))
        return race

    def _references(self, race: Race) -> list[TrialRecord]:
        """List the trials that a race depends on, in the order they were told.

        They were evaluated on all search items and, where there is one objective, are the
        reference panel, or equal to its last but for rounding.
        """
        size = len(self.context.splits.search)
        trials = [trial for trial in self.log.complete() if trial.items == size]
        if not race.front and len(trials) > race.panel:
            violation, loss = sorted(trial.sort_key for trial in trials)[race.panel - 1]
            limit = (violation, loss + 1e-9 * max(1.0, abs(loss)))
            trials = [trial for trial in trials if trial.sort_key <= limit]
        return sorted(trials, key=lambda trial: trial.tell_order)

    def scores_of(self, trial: TrialRecord) -> ItemScores:
        """Read the scores that a complete trial's estimate was made from."""
        return self.scores.stored(self.recipe_of(trial), "search", trial.items)

    def recipe_of(self, trial: TrialRecord) -> Recipe:
        """Return the recipe that a trial's point stands for."""
        return to_recipe(self.context.space, trial.point)

    def find_recipe(self, number: int) -> Recipe:
        """Return the recipe of a finished trial.

        Raises:
            StudyError: There is no such trial.
        """
        return self.recipe_of(find_trial(self.folder, self.log, number))

    def posterior(self) -> tuple[list[Candidate], JointPosterior]:
        """Compute the joint posterior of the leading candidates' values.

        Returns:
            The candidates in the order of their first trials, and their posterior.
        """
        known = candidates(self.log.complete())
        leading = sorted(known, key=lambda one: one.trial.sort_key)[:MAX_TRIALS]
        leading.sort(key=lambda one: one.number)
        estimates = [one.trial.estimate for one in leading if one.trial.estimate]
        posterior = posterior_of(
            self.context.space,
            [one.trial.point for one in leading],
            np.array([estimate.value for estimate in estimates]),
            np.array([estimate.variance for estimate in estimates]),
        )
        return leading, posterior

    def seconds(self) -> Mapping[str, float]:
        """Sum the time of all sessions so far: ask, build and total."""
        return {
            name: self._earlier.get(name, 0.0) + now
            for name, now in (
                ("ask", self._ask_seconds),
                ("build", self.evaluator.build_seconds),
                ("total", time.perf_counter() - self._started),
            )
        }

    def request_stop(self) -> bool:
        """End the search after the blocks that are being evaluated; False: none is."""
        self.evaluator.stopping = self.evaluator.working
        return self.evaluator.working

    def _enqueue_warm_starts(self) -> None:
        known = {trial.start for trial in self.log.records()}
        for label, point in warm_starts(self.context.space):
            if label not in known:
                self.log.enqueue(point, start=label)
