"""A run: ask, build, score, tell; then choose, test once and export.

Everything a run knows is in its database, so running it again goes on where it stopped: finished
trials are kept, a trial that was at work is taken up again with its finished blocks, and proposals
depend on the finished trials alone.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from merge_engine.recipe.recipe import Recipe
from objectives.items import Split
from search.preparing.context import StudyContext
from search.preparing.cost import RACED, concluding_evaluations
from search.proposing.gp import MODELLED, believed, rank
from search.proposing.recipes import to_recipe
from search.proposing.samplers import make_sampler
from search.proposing.space import Space
from search.proposing.starts import baselines, warm_starts
from search.proposing.stopping import exhausted
from search.racing.item_scores import COST, ItemScores, shortfall, tasks_with_cost
from search.racing.race import Floats, JointPosterior, Race, Strata, elect
from search.running.evaluator import Block, Evaluator
from search.running.events import Output, RaceProgress
from search.running.workers import FAILURES, ExportCheck, Workers
from search.storing.folder import DATABASE, has_run
from search.storing.snapshot import difference, freeze
from search.storing.store import Storage, Store
from search.study.spec import BelowBase, StudyError, StudySpec


def check_run(folder: Path, spec: StudySpec, storage: Storage) -> None:
    """Refuse a folder in which another study has been run, before anything long starts.

    Raises:
        StudyError: It has.
    """
    if (folder / DATABASE).is_file():
        _check_same(folder, Store(storage).study(), spec)


def _check_same(run: Path, study: Study, spec: StudySpec) -> None:
    theirs = study.user_attrs.get("spec")
    if theirs and (changed := _changes(theirs, spec.model_dump(mode="json"))):
        raise StudyError(
            f"{run} is the run of another study: {'; '.join(changed)}. "
            "Choose another --out, set it back, or begin anew with --force-new"
        )


def stored_spec(run: Path, url: str | None = None) -> StudySpec:
    """The study a run folder belongs to.

    Args:
        run: The folder.
        url: Of its storage, where that needs a password.

    Raises:
        StudyError: There is no run in it.
    """
    if not has_run(run):
        raise StudyError(f"{run}: no run here (no {DATABASE}); give the folder of a run")
    attributes = Store(Storage.of(run, url)).study().user_attrs
    if "spec" not in attributes:
        raise StudyError(f"{run}: the run was stopped before it began; run it again")
    return StudySpec.model_validate(attributes["spec"])


@dataclass(frozen=True)
class Candidate:
    """A recipe of a space, the number of the trial that first proposed it, and its last trial."""

    space: Space
    number: int
    trial: FrozenTrial

    @cached_property
    def recipe(self) -> Recipe:
        """What the trial proposed; there may be thousands that nobody asks for."""
        return to_recipe(self.space, self.trial.params)

    @property
    def value(self) -> float:
        """What it was told to be worth."""
        return -self.rank[1]

    @property
    def missed(self) -> float:
        """By how much it misses the floors, as far as it was asked."""
        return self.rank[0]

    @property
    def rank(self) -> tuple[float, float]:
        """Before whom it comes."""
        return rank(self.trial)


@dataclass
class Turn:
    """A trial at work: what it proposes, and the answers that are considered so far."""

    trial: Trial
    recipe: Recipe
    sheet: ItemScores


@dataclass
class Run:
    """One session of a run: its folder, its bench, who works for it and what it has asked."""

    folder: Path
    bench: StudyContext
    workers: Workers
    output: Output
    opened: InitVar[Store | None] = None  # else the folder's own
    after_trial: Sequence[Callable[[], None]] = ()

    def __post_init__(self, opened: Store | None) -> None:
        self.store = opened or Store(Storage.of(self.folder))
        self.study: Study = self.store.study()
        self.scorer = Evaluator(self.bench, self.store, self.workers, self.output.block)
        self._waiting: dict[Block, list[Turn]] = {}  # who for which block
        self._started = time.perf_counter()
        self._ask_seconds = 0.0
        self._earlier: Mapping[str, float] = self.study.user_attrs.get("seconds", {})

    @property
    def spec(self) -> StudySpec:
        """The study's."""
        return self.bench.spec

    def adopt(self) -> None:
        """Write the study into the database, or compare it with what is there.

        Raises:
            StudyError: The folder is another study's, or models or tasks' files have changed.
        """
        _check_same(self.folder, self.study, self.spec)
        self._adopt_items()
        self._adopt_models()
        keys = {name: recipe.key for name, recipe in baselines(self.bench.space).items()}
        self.study.set_user_attr("baselines", keys)  # for who has no bench, as a report
        self.study.set_user_attr("weights", self.bench.weights)
        self.study.set_user_attr("spec", self.spec.model_dump(mode="json"))

    def _adopt_models(self) -> None:
        """Note what tells the models' weights from others, or refuse to go on with others."""
        now, stored = self.bench.models, self.study.user_attrs.get("models", {})
        if changed := [
            name for name, weights in now.items() if stored.get(name, weights) != weights
        ]:
            raise StudyError(
                f"{self.folder}: the weights of {', '.join(changed)} have changed since the run "
                "began. Restore them, choose another --out, or begin anew with --force-new"
            )
        self.study.set_user_attr("models", dict(now))

    def _adopt_items(self) -> None:
        """Freeze the study's items, or refuse to go on with others."""
        stored, now = self.store.items(), freeze(self.bench.objective, self.bench.splits)
        if not stored:
            self.store.save_items(now)
        elif what := difference(stored, now, self.bench.objective):
            raise StudyError(
                f"{self.folder}: the tasks' items have changed since the run began: {what}. "
                "Restore the task files, or choose another --out"
            )

    def search(self, timeout: float = math.inf) -> None:
        """Ask and tell until the study has its trials: one at work for each worker.

        Whoever has lost its race makes room for the next at once; nobody waits for the others.

        Args:
            timeout: Seconds of this session after which no trial but the first is begun.

        Raises:
            StudyError: One of the study's own models does not work.
        """
        evaluations = sum(self.store.scored()[0].values())
        total, items = self.spec.search.trials, self.spec.objective.items.search
        after = concluding_evaluations(self.spec, RACED * total * items)
        self.output.start(total, self.finished(), evaluations, after)
        self._enqueue_warm_starts()
        self._try_baselines()
        race = self._race()
        while True:
            while self.scorer.idle and self._goes_on(timeout):
                self._advance(self._begin(), race)
            self._ask_ahead()
            if not self._waiting:
                break
            self.output.racing(self._racing(race))
            block, failure = self.scorer.finish()
            for turn in self._waiting.pop(block):
                if failure is None:
                    self._advance(turn, race)
                else:
                    self._fail(turn, failure)
        finished = self.finished()
        if self._exhausted(finished):
            self.output.note(
                f"stopped after {len(finished)} trials: no recipe is expected to be better by "
                "what the select items could tell; with search.stop: false it goes on"
            )
        elif len(finished) < self.spec.search.trials:
            self.output.note("the time is up; run it again to go on searching")

    def _try_baselines(self) -> None:
        """Ask each model the study starts from, and the average of them, a first block.

        Raises:
            StudyError: One does not work.
        """
        inputs = baselines(self.bench.space)
        with suppress(*FAILURES):  # it is said below whose they are
            self.scorer.ask(inputs.values(), "search", 1)
        right = 0.0
        for name, recipe in inputs.items():
            try:
                right += self.sheet(recipe, "search", 1).mean
            except FAILURES as error:
                raise StudyError(f"{name} alone: {error}") from error
        if right == 0:
            self.output.note(
                f"neither the base nor a donor has one of the first {self.ends('search')[0]} "
                "search items right; if they should, look at how the task asks them (its "
                "doc_to_text, apply_chat_template)"
            )

    @property
    def _turns(self) -> list[Turn]:
        """The trials that wait for a block."""
        return [turn for turns in self._waiting.values() for turn in turns]

    @property
    def _at_work(self) -> set[int]:
        """Their numbers."""
        return {turn.trial.number for turn in self._turns}

    def _goes_on(self, timeout: float) -> bool:
        """Whether another trial is to be begun beside those at work."""
        finished = self.finished()
        begun = len(finished) + len(self._at_work)
        in_time = time.perf_counter() - self.store.opened <= timeout
        wanted = self._left_over() or not self._exhausted(finished)
        return begun < self.spec.search.trials and wanted and (in_time or not begun)

    def _exhausted(self, finished: Sequence[FrozenTrial]) -> bool:
        """Whether the search stops by itself."""
        return self.spec.search.stop and exhausted(finished, len(self.bench.tasks_of("select")))

    def _begin(self) -> Turn:
        """The next trial, before it is asked anything."""
        trial = self._ask()
        recipe = to_recipe(self.bench.space, trial.params)
        trial.set_user_attr("recipe", recipe.key)
        return Turn(trial, recipe, ItemScores((), (), self.bench.weights))

    def _advance(self, turn: Turn, race: Race) -> None:
        """Have a trial asked one more block; tell it, if there is no hope or no block left."""
        while race.hopeful(self.goals(turn.sheet)):
            items = len(turn.sheet.answers) + 1
            if lacking := self.scorer.lacking(turn.recipe, "search", items):
                block = Block(turn.recipe.key, "search", lacking[0])
                if block not in self._waiting:  # else for another trial of the same recipe
                    self.scorer.begin(turn.recipe, "search", lacking[0])
                self._waiting.setdefault(block, []).append(turn)
                return
            turn.sheet = self.sheet(turn.recipe, "search", items)
        self._tell(turn, race)

    def _racing(self, race: Race) -> list[RaceProgress]:
        """The trials at work, first come first."""
        ends = self.ends("search")
        return [
            RaceProgress(
                turn.trial.number,
                turn.recipe.merge_method,
                sum(end <= len(turn.sheet.answers) for end in ends),
                len(ends),
                race.lead(self.goals(turn.sheet)),
            )
            for turn in sorted(self._turns, key=lambda turn: turn.trial.number)
        ]

    def _ask_ahead(self) -> None:
        """Let workers who would be idle ask what the trials at work may need next.

        At the end of a search the longest trial would keep all but one of them waiting.
        """
        if not self.scorer.idle:
            return
        for recipe in {turn.recipe.key: turn.recipe for turn in self._turns}.values():
            for number in self.scorer.lacking(recipe, "search"):
                block = Block(recipe.key, "search", number)
                if self.scorer.idle and block not in self._waiting:
                    self.scorer.begin(recipe, "search", number)
                    self._waiting[block] = []

    def _fail(self, turn: Turn, error: Exception) -> None:
        """Tell a trial that its recipe cannot be built or asked."""
        turn.trial.set_user_attr("error", str(error))
        self._told(self.study.tell(turn.trial, state=TrialState.FAIL))

    def _tell(self, turn: Turn, race: Race) -> None:
        """Tell a trial what its recipe is worth, and how sure that is."""
        trial, sheet = turn.trial, turn.sheet
        self._note_faults(trial, turn.recipe, len(sheet.answers))
        missed = self.missed({"search": sheet})
        estimate = race.finish(self.goals(sheet), missed)
        trial.set_user_attr("variance", estimate.variance)
        trial.set_user_attr("items", len(sheet.answers))
        by_task = race.by_task(self.goals(sheet))
        trial.set_user_attr("tasks", {task: [*astuple(one)] for task, one in by_task.items()})
        trial.set_user_attr("told", len(self.finished()))
        if self.spec.objective.has_constraints:
            trial.set_constraint("floors", missed)
        self._told(self.study.tell(trial, estimate.value))

    def _told(self, trial: FrozenTrial) -> None:
        self.study.set_user_attr("seconds", self.seconds())
        self.output.trial(trial)
        for work in self.after_trial:
            work()

    def best_donor(self) -> str:
        """The donor that is believed to be best after a race among the donors."""
        donors = self.spec.models_but_base
        recipes = baselines(self.bench.space)

        def ask(some: Sequence[int], items: int) -> Floats:
            return self.answers([recipes[donors[one]] for one in some], "search", items)

        best = elect(
            JointPosterior.vague(len(donors)), self.strata("search"), ask, self.ends("search")
        )
        return donors[best]

    def _race(self) -> Race:
        """The race as the finished trials have left it; the best donor is there first."""
        race = Race(self.strata_of_goals("search"), front=self.spec.search.front)
        best = self.best_donor()
        recipe = baselines(self.bench.space)[best]
        sheet = self.sheet(recipe, "search")
        self._report_faults(best, recipe)
        # Floors may follow the base: it is asked all items here, while nobody else is at work.
        race.finish(self.goals(sheet), self.missed({"search": sheet}))
        for trial in self._that_count(race):
            sheet = self.sheet_of(trial)
            race.finish(self.goals(sheet), self.missed({"search": sheet}))
        return race

    def _that_count(self, race: Race) -> list[FrozenTrial]:
        """The trials that a race depends on, as they were told.

        They have answered everything, and with one goal they are the panel, or as good as it but
        for rounding.
        """
        size = len(self.bench.splits.search)
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        trials = [trial for trial in trials if trial.user_attrs["items"] == size]
        if not race.front and len(trials) > race.panel:
            ranks = [rank(trial) for trial in trials]
            last = sorted(ranks)[race.panel - 1]
            within = (last[0], last[1] + 1e-9 * max(1.0, abs(last[1])))
            trials = [trial for trial, own in zip(trials, ranks, strict=True) if own <= within]
        return sorted(trials, key=lambda trial: trial.user_attrs["told"])

    def answers(self, recipes: Sequence[Recipe], split: Split, items: int | None = None) -> Floats:
        """What k recipes answer to the first m items of a split, all asked together: (k, m)."""
        self.scorer.ask(recipes, split, items)
        return np.array([self.sheet(recipe, split, items).answers for recipe in recipes])

    def sheet(self, recipe: Recipe, split: Split, items: int | None = None) -> ItemScores:
        """A recipe's answers to the first items of a split, in whole blocks; None: to all."""
        answers = self.scorer.answers(recipe, split, items)
        asked = self.bench.items_of(split)[: len(answers)]
        return ItemScores.of(asked, answers, self.bench.weights)

    def sheet_of(self, trial: FrozenTrial) -> ItemScores:
        """What a trial was told on."""
        return self.sheet(
            to_recipe(self.bench.space, trial.params), "search", trial.user_attrs["items"]
        )

    def strata(self, split: Split) -> Strata:
        """The tasks of a split's items."""
        return Strata(self.bench.tasks_of(split), self.bench.weights)

    def missed(self, asked: Mapping[Split, ItemScores]) -> float:
        """By how much a recipe's answers to the first items of splits miss the study's limits."""
        all_asked = sum(asked.values(), start=ItemScores((), (), self.bench.weights))
        return shortfall(all_asked, self.floors(asked), self.spec.objective.max_mean_tokens)

    def floors(self, asked: Mapping[Split, ItemScores]) -> dict[str, float]:
        """The least that a recipe which gave these answers has to reach in tasks.

        A floor that follows the base is of the base's answers to the same items.
        """
        constraints = self.spec.objective.constraints
        floors = {task: f for task, f in constraints.items() if isinstance(f, float)}
        if below := {t: f for t, f in constraints.items() if isinstance(f, BelowBase)}:
            base = baselines(self.bench.space)[self.spec.base_model]
            same = [self.sheet(base, split, len(one.answers)) for split, one in asked.items()]
            means = sum(same, start=ItemScores((), (), self.bench.weights)).by_task
            floors |= {
                task: mean - below[task].margin for task, mean in means.items() if task in below
            }
        return floors

    def goals(self, sheet: ItemScores) -> Floats:
        """A sheet's values in the goals of the search: its answers, and what they cost."""
        return sheet.with_cost if self.spec.search.cost else np.array(sheet.answers)

    def strata_of_goals(self, split: Split) -> Strata:
        """The goals of such values."""
        if not self.spec.search.cost:
            return self.strata(split)
        return Strata(tasks_with_cost(self.bench.items_of(split)), {**self.bench.weights, COST: 0})

    def ends(self, split: Split) -> list[int]:
        """How many items of a split have been asked after each of its blocks."""
        return self.scorer.ends(split)

    def _faults(self, recipe: Recipe, items: int | None = None) -> list[tuple[str, str]]:
        """Task and reason of each of the first search items whose answer could not be judged."""
        answers = self.scorer.answers(recipe, "search", items)
        asked = zip(self.bench.tasks_of("search"), answers, strict=False)
        return [(task, answer.fault) for task, answer in asked if answer.fault is not None]

    def _note_faults(self, trial: Trial, recipe: Recipe, items: int) -> None:
        if faults := self._faults(recipe, items):
            first = ": ".join(faults[0])
            trial.set_user_attr("faults", f"{len(faults)} answers not judged, e.g. {first}")

    def _report_faults(self, name: str, recipe: Recipe) -> None:
        """Say what could not be judged of a model the study starts from.

        Raises:
            StudyError: Nothing of a task could be: that is not the model's doing.
        """
        faults = self._faults(recipe)
        asked = Counter(self.bench.tasks_of("search"))
        for task, count in Counter(task for task, _ in faults).items():
            reason = next(reason for at, reason in faults if at == task)
            if count == asked[task]:
                raise StudyError(f"{name} alone: task {task!r}: no answer can be judged: {reason}")
            self.output.note(
                f"{name} alone: task {task!r}: {count} of {asked[task]} answers could not be "
                f"judged and count 0, the first: {reason}"
            )

    def finished(self) -> list[FrozenTrial]:
        """Trials that were told, with a value or an error."""
        return _finished(self.study)

    def candidates(self) -> list[Candidate]:
        """Every recipe that has a search score, in the order of their first trials."""
        found: dict[str, Candidate] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            key = trial.user_attrs["recipe"]
            first = found[key].number if key in found else trial.number
            found[key] = Candidate(self.bench.space, first, trial)
        return list(found.values())

    def beliefs(self) -> tuple[list[Candidate], JointPosterior]:
        """Those that lead, in the order of their first trials, and what is believed of them."""
        leading = sorted(self.candidates(), key=lambda candidate: candidate.rank)[:MODELLED]
        leading.sort(key=lambda candidate: candidate.number)
        trials = [candidate.trial for candidate in leading]
        belief = believed(
            self.bench.space,
            [trial.params for trial in trials],
            np.array([candidate.value for candidate in leading]),
            np.array([trial.user_attrs["variance"] for trial in trials]),
        )
        return leading, belief

    def recipe_of(self, number: int) -> Recipe:
        """The recipe of a finished trial.

        Raises:
            StudyError: There is no such trial.
        """
        return to_recipe(self.bench.space, find_trial(self.folder, self.study, number).params)

    def seconds(self) -> Mapping[str, float]:
        """Time of all sessions so far: ask, build and total."""
        return {
            name: self._earlier.get(name, 0.0) + now
            for name, now in (
                ("ask", self._ask_seconds),
                ("build", self.scorer.build_seconds),
                ("total", time.perf_counter() - self._started),
            )
        }

    def _left_over(self) -> list[FrozenTrial]:
        """The trials that were at work when an earlier session was stopped."""
        trials, at_work = self.study.get_trials(deepcopy=False), self._at_work
        running = (trial for trial in trials if trial.state == TrialState.RUNNING)
        return [trial for trial in running if trial.number not in at_work]

    def _ask(self) -> Trial:
        """A trial that was at work when the run was stopped, or a new one."""
        start = time.perf_counter()
        trials, running = self.study.get_trials(deepcopy=False), self._left_over()
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        number = next((trial.number for trial in (*running, *waiting)), len(trials))
        search = self.spec.search
        self.study.sampler = make_sampler(
            search.sampler, self.bench.space, search.seed, number, front=search.front
        )
        distributions = dict(self.bench.space.distributions)
        if running:
            trial = Trial(self.study, running[0]._trial_id)
            for name, distribution in distributions.items():
                trial._suggest(name, distribution)
        else:
            trial = self.study.ask(distributions)
        self._ask_seconds += time.perf_counter() - start
        return trial

    def _enqueue_warm_starts(self) -> None:
        known = {trial.user_attrs.get("start") for trial in self.study.get_trials(deepcopy=False)}
        for label, point in warm_starts(self.bench.space):
            if label not in known:
                self.study.enqueue_trial(point, user_attrs={"start": label})


def find_trial(run: Path, study: Study, number: int) -> FrozenTrial:
    """A finished trial of a run's study.

    Raises:
        StudyError: There is no such trial.
    """
    trials = {trial.number: trial for trial in _finished(study)}
    if number not in trials:
        raise StudyError(f"{run} has no finished trial {number}; it has {len(trials)}, from 0 on")
    return trials[number]


def _finished(study: Study) -> list[FrozenTrial]:
    states = (TrialState.COMPLETE, TrialState.FAIL)
    return study.get_trials(deepcopy=False, states=states)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two studies, but for when the search ends."""
    found = []
    for name in sorted({*old, *new}):
        mine, theirs = new.get(name), old.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += _changes(theirs, mine, f"{where}{name}.")
        elif mine != theirs and f"{where}{name}" not in ("search.trials", "search.stop"):
            found.append(f"{where}{name} was {theirs!r} and is {mine!r}")
    return found


def export(run: Run, recipe: Recipe, out: Path, card: str) -> ExportCheck:
    """Have a recipe built once more, make sure that it answers as it did, and save it."""
    saved = run.scorer.save(recipe, out, card)
    if not out.is_dir():
        run.output.note(f"{out} lies on the machine {saved.machine}, whose worker has written it")
    return saved
