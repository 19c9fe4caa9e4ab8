"""Searches replayed on a landscape: samplers, racers and selectors in any combination.

A sampler proposes points and is told an estimate of each. A racer decides how many blocks of the
search items the candidates of a cohort answer. A selector picks the recipe to export and says how
good it is. They share a ``Replay``, which hands out answers and counts them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import optuna

from landscape import Floats, Items, Landscape
from merge_engine.recipe import Recipe
from objectives.items import Split, blocks
from objectives.scores import Interval, bootstrap
from search.samplers import make_sampler
from search.selection import Sheet, ranked, verdict
from search.space import UNIFORM, Point, Space

COUNTS = {"search": 240, "select": 200, "test": 360}
BLOCK = 20


@dataclass(frozen=True)
class Estimate:
    """Of a candidate's value, with the variance that its items give it."""

    value: float
    variance: float


@dataclass
class Candidate:
    """A recipe and how many search items it has answered; equal recipes are one candidate."""

    recipe: Recipe
    seen: int = 0
    told: Estimate | None = None
    answers: dict[str, Floats] = field(default_factory=dict)


class Replay:
    """One run's landscape and items, and what has been asked of them.

    Args:
        landscape: What is searched.
        seed: Of the items.
    """

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self.landscape, self.space, self.seed = landscape, landscape.space, seed
        generator = np.random.default_rng((seed, 1))
        self.items: dict[str, Items] = {
            split: landscape.draw(count, generator) for split, count in COUNTS.items()
        }
        self.ends = [block[-1] + 1 for block in blocks(range(COUNTS["search"]), BLOCK)]
        self.candidates: dict[str, Candidate] = {}
        self.asked = 0
        tasks = np.array(self.items["search"].tasks)
        shares = {
            t: weight / sum(landscape.weights.values()) for t, weight in landscape.weights.items()
        }
        self._of_task = [(share, tasks == task) for task, share in shares.items()]

    def candidate(self, recipe: Recipe) -> Candidate:
        """The recipe's one candidate."""
        return self.candidates.setdefault(recipe.key, Candidate(recipe))

    def ask(self, candidate: Candidate, count: int) -> Floats:
        """The answers to the first ``count`` search items; those asked before cost nothing."""
        self.asked += max(0, count - candidate.seen)
        candidate.seen = max(candidate.seen, count)
        return self._all(candidate, "search")[:count]

    def estimate(self, values: Floats) -> Estimate:
        """Weighted task mean of numbers for the first search items, and its variance."""
        value = variance = 0.0
        for share, everywhere in self._of_task:
            of_task = values[everywhere[: len(values)]]
            count, mean = len(of_task), of_task.sum() / len(of_task)
            value += share * mean
            # One wrong and one right answer more: a few equal answers are not certainty.
            spread = ((of_task - mean) @ (of_task - mean) + 0.5) / (count + 2)
            variance += share**2 * spread / count
        return Estimate(float(value), float(variance))

    def sheet(self, candidate: Candidate, split: Split) -> Sheet:
        """All answers to a split, for selectors, who say themselves what that costs."""
        answers = tuple(self._all(candidate, split).tolist())
        return Sheet(answers, self.items[split].tasks, self.landscape.weights)

    def complete(self) -> dict[str, Candidate]:
        """Candidates with all search items."""
        return {key: c for key, c in self.candidates.items() if c.seen == COUNTS["search"]}

    def _all(self, candidate: Candidate, split: Split) -> Floats:
        if split not in candidate.answers:
            answers = self.items[split].answers(candidate.recipe)
            candidate.answers[split] = answers.astype(np.float64)
        return candidate.answers[split]


class Sampler(Protocol):
    """Proposes points."""

    def ask(self) -> Point:
        """The next point; several may be asked for before the first is told."""

    def tell(self, estimate: Estimate) -> None:
        """What came of the point asked first of those not told yet."""


class Racer(Protocol):
    """Decides how many items candidates answer."""

    cohort: int  # candidates raced against one another

    def race(self, replay: Replay, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Ask the candidates and estimate their values."""


@dataclass(frozen=True)
class Export:
    """What a system ends with: a recipe, what it says of it, and whether it beats the donors."""

    recipe: Recipe
    reported: Interval
    verdict: Literal["better", "not better"] | None = None


class Selector(Protocol):
    """Picks the recipe to export. It does not change what the search goes on with."""

    def cost(self, replay: Replay) -> int:
        """Item evaluations it will need to decide."""

    def select(self, replay: Replay) -> Export:
        """The choice, and what it says of it."""


class OptunaSampler:
    """A sampler of ``search.samplers``, made anew for every trial as a run does."""

    def __init__(self, name: str, space: Space, seed: int) -> None:
        self.name, self.space, self.seed = name, space, seed
        self.study = optuna.create_study(direction="maximize")
        self.waiting: list[optuna.Trial] = []
        self.asked = 0
        for _, point in space.warm_starts():
            self.study.enqueue_trial(point)

    def ask(self) -> Point:
        self.study.sampler = make_sampler(self.name, self.space, self.seed, self.asked)
        self.asked += 1
        trial = self.study.ask(self.space.distributions())
        self.waiting.append(trial)
        return trial.params

    def tell(self, estimate: Estimate) -> None:
        trial = self.waiting.pop(0)
        trial.set_user_attr("variance", estimate.variance)
        self.study.tell(trial, estimate.value)


class WeightsCma:
    """CMA-ES over the weights of one method, from the uniform average, as mergekit-evolve does.

    Start and width are its published defaults (x0 = 1/n, sigma0 = 1/6); weights are kept at or
    above zero, and within the space's scale.
    """

    def __init__(self, method: str, space: Space, seed: int) -> None:
        import cma  # here alone: the other systems do without

        k = len(space.donors)
        self.method, self.space = method, space
        options = {"seed": seed + 1, "verbose": -9, "bounds": [0, None]}
        self.strategy = cma.CMAEvolutionStrategy([1 / k] * k, 1 / 6, options)
        self.proposed: list[Floats] = []
        self.values: list[float] = []

    def ask(self) -> Point:
        if len(self.values) == len(self.proposed):
            if self.values:
                self.strategy.tell(self.proposed, [-value for value in self.values])
            self.proposed, self.values = self.strategy.ask(), []
        weights = self.proposed[len(self.values)]
        most = self.space.scale[1] / max(weights.mean(), self.space.scale[1])
        return self.space.point(self.method, tuple(weights * most))

    def tell(self, estimate: Estimate) -> None:
        self.values.append(estimate.value)


@dataclass
class FixedItems:
    """Every candidate answers the first ``count`` search items."""

    count: int = COUNTS["search"]
    cohort: int = 1

    def race(self, replay: Replay, candidates: Sequence[Candidate]) -> list[Estimate]:
        return [replay.estimate(replay.ask(c, self.count)) for c in candidates]


def difference_estimate(replay: Replay, candidate: Candidate, reference: Candidate) -> Estimate:
    """The reference's value on all items, plus the paired difference on those seen."""
    everything = replay.estimate(replay.ask(reference, COUNTS["search"]))
    seen = candidate.seen
    mine, theirs = (replay.ask(c, seen) for c in (candidate, reference))
    difference = replay.estimate(mine - theirs)
    return Estimate(everything.value + difference.value, everything.variance + difference.variance)


@dataclass
class Halving:
    """Successive halving on items: the best third of a cohort goes on to three times as many.

    The best of the complete candidates is the reference of the others' difference estimates.
    """

    rungs: tuple[int, ...] = (40, 120, COUNTS["search"])
    cohort: int = 9
    keep: float = 1 / 3

    def race(self, replay: Replay, candidates: Sequence[Candidate]) -> list[Estimate]:
        left = list({id(candidate): candidate for candidate in candidates}.values())
        for rung in self.rungs:
            means = [replay.estimate(replay.ask(c, rung)).value for c in left]
            best = np.argsort(-np.array(means), kind="stable")
            if rung < COUNTS["search"]:
                left = [left[i] for i in best[: max(1, round(len(left) * self.keep))]]
        reference = max(replay.complete().values(), key=lambda c: complete_value(replay, c))
        return [difference_estimate(replay, candidate, reference) for candidate in candidates]


@dataclass
class PairedRace:
    """A candidate is stopped when it is behind the incumbent, by a paired z-test at every block.

    The incumbent is the best complete candidate. ``critical`` is one-sided, per look.
    """

    critical: float = 2.33
    first: int = 2 * BLOCK
    cohort: int = field(default=1, init=False)
    incumbent: Candidate | None = field(default=None, init=False)

    def race(self, replay: Replay, candidates: Sequence[Candidate]) -> list[Estimate]:
        return [self._race(replay, candidate) for candidate in candidates]

    def _race(self, replay: Replay, candidate: Candidate) -> Estimate:
        if self.incumbent is None:
            self.incumbent = candidate
        for end in replay.ends:
            mine = replay.ask(candidate, end)
            behind = replay.estimate(replay.ask(self.incumbent, end) - mine)
            if end >= self.first and behind.value > self.critical * behind.variance**0.5:
                return difference_estimate(replay, candidate, self.incumbent)
        if complete_value(replay, candidate) > complete_value(replay, self.incumbent):
            self.incumbent = candidate
        return replay.estimate(mine)


def complete_value(replay: Replay, candidate: Candidate) -> float:
    """The mean over all search items of a candidate that has answered them."""
    return replay.estimate(replay.ask(candidate, COUNTS["search"])).value


class LuckyMaximum:
    """The highest mean that was seen is the winner, and that mean is the result."""

    def cost(self, replay: Replay) -> int:
        return 0

    def select(self, replay: Replay) -> Export:
        told = [c for c in replay.candidates.values() if c.told]
        most = max(candidate.seen for candidate in told)
        finished = [candidate for candidate in told if candidate.seen == most]
        winner = max(finished, key=lambda candidate: candidate.told.value)
        answers = replay.ask(winner, most).tolist()
        tasks = replay.items["search"].tasks[:most]
        return Export(winner.recipe, bootstrap(answers, tasks, replay.landscape.weights))


@dataclass(frozen=True)
class FreshItems:
    """What a run concludes with: the best few on fresh items, the winner tested once on others."""

    finalists: int = 8

    def cost(self, replay: Replay) -> int:
        return COUNTS["select"] * (self.finalists + len(replay.space.donors))

    def select(self, replay: Replay) -> Export:
        searched = {key: replay.sheet(c, "search") for key, c in replay.complete().items()}
        best = ranked(searched, {})[: self.finalists]
        known = replay.candidates
        both = {key: searched[key] + replay.sheet(known[key], "select") for key in best}
        winner = known[ranked(both, {})[0]]
        test = replay.sheet(winner, "test")
        rivals = [
            test.minus(replay.sheet(replay.candidate(recipe), "test"), replay.seed)
            for name, recipe in replay.space.baselines().items()
            if name != UNIFORM
        ]
        reported = bootstrap(test.answers, test.tasks, test.weights, seed=replay.seed)
        return Export(winner.recipe, reported, verdict(rivals))


@dataclass(frozen=True)
class System:
    """A search: who proposes, who decides how much is asked, who picks.

    Args:
        sampler: Made from a space and a seed.
        racer: Made for every run.
        selector: Has no state.
        baselines: Base, donors and average answer all search items first.
    """

    sampler: Callable[[Space, int], Sampler]
    racer: Callable[[], Racer]
    selector: Selector
    baselines: bool = True


@dataclass(frozen=True)
class End:
    """Where a run stands when its budget is spent: item evaluations and recipes so far."""

    export: Export
    asked: int
    recipes: int


def run(system: System, landscape: Landscape, seed: int, budgets: Sequence[int]) -> list[End]:
    """Search, and at each budget of item evaluations, ascending, export as if it were the end."""
    replay = Replay(landscape, seed)
    sampler, racer = system.sampler(landscape.space, seed), system.racer()
    if system.baselines:
        for recipe in landscape.space.baselines().values():
            replay.ask(replay.candidate(recipe), COUNTS["search"])
    ends = []
    for budget in sorted(budgets):
        while replay.asked + system.selector.cost(replay) < budget:
            points = [sampler.ask() for _ in range(racer.cohort)]
            candidates = [replay.candidate(landscape.space.recipe(point)) for point in points]
            for candidate, estimate in zip(candidates, racer.race(replay, candidates), strict=True):
                candidate.told = estimate
                sampler.tell(estimate)
        asked = replay.asked + system.selector.cost(replay)
        ends.append(End(system.selector.select(replay), asked, len(replay.candidates)))
    return ends
