"""Searches replayed on a landscape: samplers, racers and selectors in any combination.

A sampler proposes points and is told an estimate of each. A racer decides on how many blocks of the
search items the candidates of a cohort are evaluated. A selector picks the recipe to export and
estimates its score. They share a ``Replay``, which evaluates recipes and counts that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import optuna

from landscape import Floats, Items, Landscape
from merge_engine.recipe.recipe import Recipe
from objectives.items import Split, blocks
from objectives.scores import Interval, bootstrap, score_interval
from search.proposing.gp import posterior_of
from search.proposing.recipes import to_recipe
from search.proposing.samplers import Proposer
from search.proposing.space import Point, Space
from search.proposing.starts import UNIFORM, baselines, warm_starts
from search.racing.elimination import JointPosterior, successive_elimination
from search.racing.item_scores import ItemScores
from search.racing.race import PANEL, STOP_BELOW, Estimate, Race, Strata
from search.racing.verdict import SELECT_SHARE, verdict
from search.storing.trials import OpenTrial, TrialLog

COUNTS = {"search": 240, "select": 200, "test": 360}
BLOCK = 20


@dataclass
class Candidate:
    """A recipe and how many search items it was evaluated on; equal recipes are one candidate."""

    recipe: Recipe
    point: Point | None = None
    seen: int = 0
    estimate: Estimate | None = None
    answers: dict[str, Floats] = field(default_factory=dict)


class Replay:
    """One run's landscape and items, and how many item evaluations were spent.

    Args:
        landscape: The searched one.
        seed: Of the items.
    """

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self.landscape, self.space, self.seed = landscape, landscape.space, seed
        generator = np.random.default_rng((seed, 1))
        self.items: dict[str, Items] = {
            split: landscape.draw(count, generator) for split, count in COUNTS.items()
        }
        self.ends = {
            split: [block[-1] + 1 for block in blocks(range(count), BLOCK)]
            for split, count in COUNTS.items()
        }
        self.candidates: dict[str, Candidate] = {}
        self.evaluations = 0
        self.strata = {
            split: Strata(items.tasks, landscape.weights) for split, items in self.items.items()
        }

    def candidate(self, recipe: Recipe) -> Candidate:
        """Return the recipe's one candidate."""
        return self.candidates.setdefault(recipe.key, Candidate(recipe))

    def evaluate(self, candidate: Candidate, count: int) -> Floats:
        """Evaluate the first ``count`` search items; those evaluated before cost nothing."""
        self.evaluations += max(0, count - candidate.seen)
        candidate.seen = max(candidate.seen, count)
        return self.answers(candidate, "search")[:count]

    def estimate(self, values: Floats) -> Estimate:
        """Return the weighted task mean of values of the first search items, and its variance."""
        return self.strata["search"].estimate(values)

    def scores(self, candidate: Candidate, split: Split) -> ItemScores:
        """Return all scores on a split, uncounted: selectors state their own cost."""
        answers = tuple(self.answers(candidate, split).tolist())
        return ItemScores(answers, self.items[split].tasks, self.landscape.weights)

    def complete(self) -> dict[str, Candidate]:
        """Return the candidates evaluated on all search items, by recipe key."""
        return {key: c for key, c in self.candidates.items() if c.seen == COUNTS["search"]}

    def answers(self, candidate: Candidate, split: Split) -> Floats:
        """Return the values of all items of a split, uncounted."""
        if split not in candidate.answers:
            answers = self.items[split].answers(candidate.recipe)
            candidate.answers[split] = answers.astype(np.float64)
        return candidate.answers[split]


class Sampler(Protocol):
    """Proposes points."""

    def ask(self) -> Point:
        """Return the next point; several may be open before the first is told."""

    def tell(self, estimate: Estimate) -> None:
        """Record the estimate of the first open point."""


class Racer(Protocol):
    """Decides on how many items candidates are evaluated."""

    cohort: int  # candidates raced against one another

    def start(self, replay: Replay) -> None:
        """Evaluate the baselines before the search: base, donors and their average."""

    def race(self, replay: Replay, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Evaluate the candidates and estimate their values."""


@dataclass(frozen=True)
class Export:
    """The recipe a system ends with.

    Args:
        recipe: Its choice.
        reported: Its interval of the recipe's score.
        evaluations: Items evaluated to choose.
        verdict: Whether it beats the donors.
        finalists: Whom it chose among, if not among all.
    """

    recipe: Recipe
    reported: Interval
    evaluations: int
    verdict: Literal["better", "not better"] | None = None
    finalists: tuple[Recipe, ...] = ()


class Selector(Protocol):
    """Picks the recipe to export. It does not change what the search goes on with."""

    def cost(self, replay: Replay) -> int:
        """Item evaluations it may need to decide."""

    def select(self, replay: Replay) -> Export:
        """The choice, and what it says of it."""


class StudySampler:
    """A sampler of ``search.proposing.samplers``, asked for trials as a run does."""

    def __init__(self, name: str, space: Space, seed: int, *, front: bool = False) -> None:
        self.proposer = Proposer(name, space, seed, front=front)
        self.log = TrialLog(optuna.create_study(direction="maximize"))
        self.open: list[OpenTrial] = []
        for label, point in warm_starts(space):
            self.log.enqueue(point, start=label)

    def ask(self) -> Point:
        self.open.append(self.proposer.ask(self.log, [trial.number for trial in self.open]))
        return self.open[-1].point

    def tell(
        self,
        estimate: Estimate,
        tasks: Mapping[str, Estimate] = MappingProxyType({}),
        *,
        items: int = 0,
        violation: float | None = None,
    ) -> None:
        trial = self.open.pop(0)
        trial.tell(estimate, tasks, items=items, order=trial.number, violation=violation)


@dataclass
class FixedItems:
    """Every candidate is evaluated on the first ``count`` search items."""

    count: int = COUNTS["search"]
    cohort: int = 1

    def start(self, replay: Replay) -> None:
        for recipe in baselines(replay.space).values():
            replay.evaluate(replay.candidate(recipe), self.count)

    def race(self, replay: Replay, candidates: Sequence[Candidate]) -> list[Estimate]:
        return [replay.estimate(replay.evaluate(c, self.count)) for c in candidates]


@dataclass
class Raced:
    """As a run does: the donors among themselves, then one candidate after another."""

    stop_below: float = STOP_BELOW
    panel: int = PANEL
    cohort: int = field(default=1, init=False)

    def start(self, replay: Replay) -> None:
        self.contest = Race(replay.strata["search"], stop_below=self.stop_below, panel=self.panel)
        known = baselines(replay.space)
        for recipe in known.values():
            replay.evaluate(replay.candidate(recipe), BLOCK)
        donors = [replay.candidate(known[donor]) for donor in replay.space.donors]
        ends = replay.ends["search"]
        best = successive_elimination(
            JointPosterior.vague(len(donors)),
            self.contest.strata,
            lambda some, end: np.stack([replay.evaluate(donors[one], end) for one in some]),
            ends,
        )
        self.contest.record(replay.evaluate(donors[best], ends[-1]))

    def race(self, replay: Replay, candidates: Sequence[Candidate]) -> list[Estimate]:
        return [self._race(replay, candidate) for candidate in candidates]

    def _race(self, replay: Replay, candidate: Candidate) -> Estimate:
        for end in replay.ends["search"]:
            answers = replay.evaluate(candidate, end)
            if end >= candidate.seen and not self.contest.should_continue(answers):
                break
        return self.contest.record(answers)


class LuckyMaximum:
    """The highest mean that was seen is the winner, and that mean is the result."""

    def cost(self, replay: Replay) -> int:
        return 0

    def select(self, replay: Replay) -> Export:
        evaluated = [c for c in replay.candidates.values() if c.estimate]
        most = max(candidate.seen for candidate in evaluated)
        finished = [candidate for candidate in evaluated if candidate.seen == most]
        winner = max(finished, key=lambda candidate: candidate.estimate.value)
        answers = replay.evaluate(winner, most).tolist()
        tasks = replay.items["search"].tasks[:most]
        return Export(winner.recipe, bootstrap(answers, tasks, replay.landscape.weights), 0)


@dataclass(frozen=True)
class FreshItems:
    """The best few on fresh items, all of them; the winner tested once on others."""

    finalists: int = 8

    def cost(self, replay: Replay) -> int:
        return COUNTS["select"] * (self.finalists + len(replay.space.donors))

    def select(self, replay: Replay) -> Export:
        searched = {key: replay.scores(c, "search") for key, c in replay.complete().items()}
        best = sorted(searched, key=lambda key: -searched[key].mean)[: self.finalists]
        known = replay.candidates
        both = {key: searched[key] + replay.scores(known[key], "select") for key in best}
        winner = known[max(both, key=lambda key: both[key].mean)]
        return tested(replay, winner, self.cost(replay))


@dataclass(frozen=True)
class Elected:
    """As a run does: the highest posterior means race on fresh items."""

    finalists: int = 8
    share: float = SELECT_SHARE

    def cost(self, replay: Replay) -> int:
        return int(self.share * replay.evaluations)

    def select(self, replay: Replay) -> Export:
        evaluated = [(c, c.estimate) for c in replay.candidates.values() if c.estimate]
        posterior = posterior_of(
            replay.space,
            [candidate.point or {} for candidate, _ in evaluated],
            np.array([estimate.value for _, estimate in evaluated]),
            np.array([estimate.variance for _, estimate in evaluated]),
        )
        best = np.argsort(-posterior.means, kind="stable")[: self.finalists].tolist()
        counts: dict[int, int] = {}

        def evaluate(some: Sequence[int], end: int) -> Floats:
            counts.update(dict.fromkeys(some, end))
            of_some = [replay.answers(evaluated[best[one]][0], "select") for one in some]
            return np.stack(of_some)[:, :end]

        winner = successive_elimination(
            posterior[best],
            replay.strata["select"],
            evaluate,
            replay.ends["select"],
            budget=self.cost(replay),
        )
        export = tested(replay, evaluated[best[winner]][0], sum(counts.values()))
        return replace(export, finalists=tuple(evaluated[index][0].recipe for index in best))


def tested(replay: Replay, winner: Candidate, evaluations: int) -> Export:
    """The winner and its donors on the test items."""
    test = replay.scores(winner, "test")
    rivals = [
        test.minus(replay.scores(replay.candidate(recipe), "test"), replay.seed)
        for name, recipe in baselines(replay.space).items()
        if name != UNIFORM
    ]
    reported = score_interval(test.values, test.tasks, test.weights, seed=replay.seed)
    return Export(winner.recipe, reported, evaluations, verdict(rivals))


@dataclass(frozen=True)
class System:
    """A search: sampler, racer and selector.

    Args:
        sampler: Made from a space and a seed.
        racer: Made for every run.
        selector: Has no state.
        baselines: Base, donors and average are evaluated first.
    """

    sampler: Callable[[Space, int], Sampler]
    racer: Callable[[], Racer]
    selector: Selector
    baselines: bool = True


@dataclass(frozen=True)
class End:
    """Where a run stands when its budget is spent: item evaluations and recipes so far.

    ``dropped`` is how much better than every finalist the best recipe tried truly is.
    """

    export: Export
    evaluations: int
    recipes: int
    dropped: float


def run(
    system: System, landscape: Landscape, seed: int, budgets: Sequence[int], *, trials: bool = False
) -> list[End]:
    """Search, and at each budget, ascending, export as if it were the end.

    Args:
        system: That searches.
        landscape: The searched one.
        seed: Of the system and of the items.
        budgets: In item evaluations.
        trials: Budgets are numbers of trials instead.
    """
    replay = Replay(landscape, seed)
    sampler, racer = system.sampler(landscape.space, seed), system.racer()
    if system.baselines:
        racer.start(replay)
    ends: list[End] = []
    tried = 0
    for budget in sorted(budgets):
        while (tried if trials else replay.evaluations + system.selector.cost(replay)) < budget:
            points = [sampler.ask() for _ in range(racer.cohort)]
            candidates = [replay.candidate(to_recipe(landscape.space, point)) for point in points]
            tried += len(points)
            for candidate, point, estimate in zip(
                candidates, points, racer.race(replay, candidates), strict=True
            ):
                candidate.point, candidate.estimate = point, estimate
                sampler.tell(estimate)
        export = system.selector.select(replay)
        evaluations, recipes = replay.evaluations + export.evaluations, len(replay.candidates)
        ends.append(End(export, evaluations, recipes, dropped(replay, export)))
    return ends


def dropped(replay: Replay, export: Export) -> float:
    """How much better than every finalist the best recipe tried truly is."""
    evaluated = [candidate.recipe for candidate in replay.candidates.values() if candidate.estimate]
    best, best_left = (
        max(map(replay.landscape.truth, recipes), default=0.0)
        for recipes in (evaluated, export.finalists or evaluated)
    )
    return best - best_left
