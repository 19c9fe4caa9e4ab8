"""Searches replayed on a landscape: the program's own run on simulated workers, or a rival's.

All systems share the search loop of ``search.running``. A rival takes the place of its proposer,
and may have every candidate evaluated on all search items instead of racing it. A selector picks
the recipe to export and estimates its score.
"""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from landscape import Landscape
from merge_engine.recipe.recipe import Recipe
from objectives.scores import Interval, bootstrap, score_interval
from search.proposing.space import Point, Space
from search.proposing.starts import UNIFORM, baselines, warm_starts
from search.racing.verdict import SELECT_SHARE, verdict
from search.running.baselines import try_baselines
from search.running.conclusion import conclude
from search.running.run import Run
from search.running.search_loop import SearchLoop, search
from search.storing.trials import OpenTrial, TrialLog, TrialRecord, candidates
from simulated import COUNTS, simulated_context, simulated_run

MANY = 1_000_000  # trials: the budget ends a search
FINALISTS = 8
RAM = Path("/dev/shm")  # a search's database is written there, if there is such a folder


class Rival(Protocol):
    """Proposes points."""

    def ask(self) -> Point:
        """Return the next point."""

    def tell(self, trial: TrialRecord) -> None:
        """Record a complete trial, in the order of the points."""


class RivalProposer:
    """A rival in the place of the run's own ``Proposer``."""

    def __init__(self, rival: Rival, space: Space) -> None:
        self.rival, self.space = rival, space
        self._told = 0

    def ask(
        self, log: TrialLog, open_now: Collection[int] = (), space: Space | None = None
    ) -> OpenTrial:
        complete = log.complete()
        for trial in complete[self._told :]:
            self.rival.tell(trial)
        self._told = len(complete)
        log.enqueue(self.rival.ask())
        return log.open(self.space.distributions)


@dataclass(frozen=True)
class Export:
    """The recipe a system ends with.

    Args:
        recipe: Its choice.
        reported: Its interval of the recipe's score.
        evaluations: Items evaluated to choose.
        verdict: Whether it beats the donors.
        finalists: Recipes it chose among, if not among all.
    """

    recipe: Recipe
    reported: Interval
    evaluations: int = 0
    verdict: Literal["better", "not better"] | None = None
    finalists: tuple[Recipe, ...] = ()


class Selector(Protocol):
    """Picks the recipe to export."""

    def cost(self, run: Run) -> int:
        """Return how many item evaluations it may need to decide."""

    def select(self, run: Run) -> Export:
        """Choose on a copy of the run, with which nothing else is done."""


class LuckyMaximum:
    """The highest mean on the search items wins, and that mean is reported."""

    def cost(self, run: Run) -> int:
        return 0

    def select(self, run: Run) -> Export:
        complete = run.log.complete()
        most = max(trial.items for trial in complete)
        winner = max((t for t in complete if t.items == most), key=lambda trial: trial.value)
        scores = run.scores_of(winner)
        reported = bootstrap(scores.values, scores.tasks, scores.weights)
        return Export(run.recipe_of(winner), reported)


class FreshItems:
    """The highest means are evaluated on all select items; the winner is tested once on others."""

    def cost(self, run: Run) -> int:
        return COUNTS["select"] * (FINALISTS + len(run.context.space.donors))

    def select(self, run: Run) -> Export:
        known = [one.trial for one in candidates(run.log.complete())]
        best = sorted((t for t in known if t.items == COUNTS["search"]), key=lambda t: t.sort_key)
        recipes = [run.recipe_of(trial) for trial in best[:FINALISTS]]
        fresh = run.scores.evaluate(recipes, "select")
        searched = [run.scores.stored(recipe, "search") for recipe in recipes]
        means = [(one + other).mean for one, other in zip(searched, fresh, strict=True)]
        winner = recipes[max(range(len(means)), key=means.__getitem__)]
        known = baselines(run.context.space)
        rivals = [recipe for name, recipe in known.items() if name != UNIFORM]
        test, *others = run.scores.evaluate([winner, *rivals], "test")
        seed = run.spec.search.seed
        reported = score_interval(test.values, test.tasks, test.weights, seed=seed)
        better = verdict([test.minus(other, seed) for other in others])
        return Export(winner, reported, self.cost(run), better, tuple(recipes))


class Concluded:
    """The run's own conclusion: the highest posterior means race on fresh select items."""

    def cost(self, run: Run) -> int:
        return int(SELECT_SHARE * run.store.evaluations()[0]["search"])

    def select(self, run: Run) -> Export:
        ranked, _ = run.ranked_candidates()
        finalists = tuple(run.recipe_of(one.trial) for one in ranked[:FINALISTS])
        result, recipe = conclude(run)
        test = result.winner.test
        return Export(
            recipe,
            Interval(test.mean, *test.ci95),
            result.split_evaluations["select"],
            result.verdict,
            finalists,
        )


CONCLUDED = Concluded()


@dataclass(frozen=True)
class System:
    """A search.

    Args:
        sampler: Name of one of the program's own; or a rival, made from a space and a seed.
        selector: Has no state.
        raced: Candidates are raced; else each is evaluated on all search items.
        items: Number of search items.
        baselines: Evaluating base, donors and average counts; else that of the trials alone.
        front: The Pareto front is searched (``search.front``).
        space: Changes the landscape's space.
    """

    sampler: str | Callable[[Space, int], Rival] = "auto"
    selector: Selector = CONCLUDED
    raced: bool = True
    items: int = COUNTS["search"]
    baselines: bool = True
    front: bool = False
    space: Callable[[Space], Space] = lambda space: space

    def evaluations(self, run: Run) -> int:
        """Count the evaluations of search items so far."""
        if self.baselines:
            return run.store.evaluations()[0]["search"]
        return sum({trial.recipe: trial.items for trial in run.log.complete()}.values())

    def search(self, run: Run, after_trial: Callable[[Run], None]) -> None:
        """Run trials until ``after_trial`` raises an error."""
        if isinstance(self.sampler, str) and self.raced:
            search(run, after_trial=[after_trial])
            return
        space = run.context.space
        if isinstance(self.sampler, str):
            for label, point in warm_starts(space):
                run.log.enqueue(point, start=label)
        if self.baselines:
            try_baselines(run)
        loop = SearchLoop(run, math.inf, [after_trial])
        if not self.raced:
            loop.race.should_continue = lambda values: len(values) < loop.race.strata.size
        if not isinstance(self.sampler, str):
            loop.proposer = RivalProposer(self.sampler(space, run.spec.search.seed), space)
            loop.starts_pending, loop.tuner.ended = False, True  # a rival proposes all trials
        loop.work()


@dataclass(frozen=True)
class End:
    """A run when its budget is spent: item evaluations and recipes so far.

    ``dropped`` is how much better than every finalist the best recipe tried truly is.
    """

    export: Export
    evaluations: int
    recipes: int
    dropped: float


class _StopSearch(Exception):  # noqa: N818
    """The search is over."""


def watch(system: System, landscape: Landscape, seed: int, goes_on: Callable[[Run], bool]) -> None:
    """Search until ``goes_on``, which is called after each trial, returns False."""
    name = system.sampler if isinstance(system.sampler, str) else "random"
    settings = {"sampler": name, "trials": MANY, "stop": False, "seed": seed, "front": system.front}
    counts = COUNTS | {"search": system.items}
    block = 20 if system.raced else system.items
    context = simulated_context(
        landscape, (seed, 1), counts, search=settings, objective={"block": block}
    )
    context = dataclasses.replace(context, space=system.space(context.space))

    def after_trial(run: Run) -> None:
        if not goes_on(run):
            raise _StopSearch

    folders = tempfile.TemporaryDirectory(dir=RAM if RAM.is_dir() else None)
    with folders as folder, suppress(_StopSearch):
        system.search(simulated_run(Path(folder) / "run", context), after_trial)


def select(selector: Selector, run: Run) -> Export:
    """Export as if the search were over, on a copy of the run."""
    with tempfile.TemporaryDirectory(dir=run.folder.parent) as folder:
        copy = shutil.copytree(run.folder, Path(folder) / "run")
        return selector.select(simulated_run(copy, run.context))


def replay(
    system: System, landscape: Landscape, seed: int, budgets: Sequence[int], *, trials: bool = False
) -> list[End]:
    """Search, and at each budget, ascending, export as if it were the end.

    Args:
        system: Searches.
        landscape: Is searched.
        seed: Of the system and of the items.
        budgets: In item evaluations, those of the selector among them.
        trials: Budgets are numbers of trials instead.
    """
    left, ends = sorted(budgets), list[End]()

    def goes_on(run: Run) -> bool:
        while left and spent(run) >= left[0]:
            left.pop(0)
            export = select(system.selector, run)
            known = {trial.recipe for trial in run.log.complete()}
            if system.baselines:
                known |= run.store.recipes("search")
            evaluations = system.evaluations(run) + export.evaluations
            ends.append(End(export, evaluations, len(known), dropped(landscape, run, export)))
        return bool(left)

    def spent(run: Run) -> int:
        if trials:
            return len(run.log.finished())
        return system.evaluations(run) + system.selector.cost(run)

    watch(system, landscape, seed, goes_on)
    return ends


def dropped(landscape: Landscape, run: Run, export: Export) -> float:
    """Return how much better than every finalist the best recipe tried truly is."""
    tried = [run.recipe_of(one.trial) for one in candidates(run.log.complete())]
    best, best_left = (
        max(map(landscape.truth, recipes)) for recipes in (tried, export.finalists or tried)
    )
    return best - best_left
