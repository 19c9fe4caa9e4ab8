"""A session of a run: its study, database, workers and scores.

The whole state of a run is in its database, so it can be resumed: finished trials are kept, a
running trial continues after its finished blocks, and proposals depend on the finished trials
alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from merge_engine.recipe.recipe import Recipe
from search.preparing.context import StudyContext
from search.proposing.gp import posterior_of
from search.proposing.gp_sampler import MAX_TRIALS
from search.proposing.recipes import to_recipe
from search.proposing.space import with_points
from search.proposing.starts import baselines
from search.racing.elimination import JointPosterior
from search.racing.item_scores import ItemScores
from search.running.evaluator import Evaluator, under_own_templates
from search.running.events import Listener
from search.running.scores import Scores
from search.running.workers import Workers
from search.storing.address import Storage
from search.storing.resume import check_items, check_models, check_same, find_trial
from search.storing.store import Store
from search.storing.trials import Candidate, TrialLog, TrialRecord, candidates
from search.study.spec import StudySpec


class Run:
    """One session of a run.

    Args:
        store: The run's database; None: the folder's own.
        opened: When the session began, by ``time.perf_counter``; None: now.
    """

    def __init__(
        self,
        folder: Path,
        context: StudyContext,
        workers: Workers,
        listener: Listener,
        store: Store | None = None,
        opened: float | None = None,
    ) -> None:
        self.folder, self.context, self.workers, self.listener = folder, context, workers, listener
        self.store = store or Store(Storage.of(folder))
        self.log = TrialLog(self.store.study())
        self.evaluator = Evaluator(folder, context, self.store, workers, listener)
        self.scores = Scores(context, self.evaluator)
        self.space = context.space  # including the weights tuned so far
        self.read_tuned_path()
        self.ask_seconds = 0.0
        self._started = time.perf_counter()
        self.opened = self._started if opened is None else opened
        self._earlier: Mapping[str, float] = self.log.header().get("seconds", {})

    @property
    def spec(self) -> StudySpec:
        """The study."""
        return self.context.spec

    def bind_to_store(self) -> None:
        """Write the study into the database, or compare it with the stored one.

        Raises:
            StudyError: The folder is another study's, or models or tasks' files have changed.
        """
        context = self.context
        check_same(self.folder, self.log, self.spec)
        check_items(self.folder, self.store, context.objective, context.splits)
        fingerprints = {name: model.fingerprint for name, model in context.models.items()}
        check_models(self.folder, self.log, fingerprints)
        self.log.set_header(  # for readers of the database alone, such as the report
            baselines={name: recipe.key for name, recipe in baselines(context.space).items()},
            own_templates={name: one.key for name, one in under_own_templates(context).items()},
            weights=context.weights,
            tuned_units=context.tuned_units and asdict(context.tuned_units),
            spec=self.spec.model_dump(mode="json"),
        )

    def read_tuned_path(self) -> None:
        """Read the weights tuned so far into the space."""
        if self.context.tuned_units is not None:
            states = self.store.states(points=True)
            self.space = with_points(self.context.space, self.context.tuned_units, states)

    def scores_of(self, trial: TrialRecord) -> ItemScores:
        """Read the scores that a complete trial's estimate was made from."""
        return self.scores.stored(self.recipe_of(trial), "search", trial.items)

    def recipe_of(self, trial: TrialRecord) -> Recipe:
        """Return the recipe that a trial's point stands for."""
        return to_recipe(self.space, trial.point)

    def find_recipe(self, number: int) -> Recipe:
        """Return the recipe of a finished trial."""
        return self.recipe_of(find_trial(self.folder, self.log, number))

    def ranked_candidates(self) -> tuple[list[Candidate], JointPosterior]:
        """Rank the candidates with the best estimates, feasible ones first, by posterior mean.

        Returns:
            The candidates, the best first, and the joint posterior of their values.
        """
        known = candidates(self.log.complete())
        leading = sorted(known, key=lambda one: one.trial.sort_key)[:MAX_TRIALS]
        leading.sort(key=lambda one: one.number)
        trials = [one.trial for one in leading]
        posterior = posterior_of(
            self.space,
            [trial.point for trial in trials],
            np.array([trial.value for trial in trials]),
            np.array([trial.variance for trial in trials]),
        )
        order = posterior.ranked([trial.violation for trial in trials])
        return [leading[index] for index in order], posterior[order]

    def seconds(self) -> Mapping[str, float]:
        """Sum the time of all sessions so far: ask, build and total."""
        return {
            name: self._earlier.get(name, 0.0) + now
            for name, now in (
                ("ask", self.ask_seconds),
                ("build", self.evaluator.build_seconds),
                ("total", time.perf_counter() - self._started),
            )
        }

    def request_stop(self) -> bool:
        """Ask the evaluator to stop after the jobs under way; return whether there are any."""
        self.evaluator.stopping = self.evaluator.working
        return self.evaluator.working
