"""Other tools' samplers of recipes at their own settings, for ``replay``.

Evolution over one method's weights, as mergekit-evolve (``WeightsCma``, which needs the package
``cma``) and mergenetic (``WeightsGa``) do it, and Optuna's samplers as they come (``Stock``).
``Started`` lets any of them have our warm starts.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from landscape import Floats
from replay import Rival
from search.proposing.space import Point, Space
from search.proposing.starts import warm_starts
from search.storing.trials import TrialRecord


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

    def tell(self, trial: TrialRecord) -> None:
        self.values.append(trial.value)


class Stock:
    """A sampler of Optuna's, as anyone would make it.

    Args:
        make: From a seed.
        methods: All the space's if none.
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], methods: tuple[str, ...], space: Space, seed: int
    ) -> None:
        self.space = replace(space, methods=methods or space.methods)
        self.study = optuna.create_study(direction="maximize", sampler=make(seed))
        self.waiting: list[optuna.Trial] = []

    def ask(self) -> Point:
        self.waiting.append(self.study.ask(self.space.distributions))
        return self.waiting[-1].params

    def tell(self, trial: TrialRecord) -> None:
        self.study.tell(self.waiting.pop(0), trial.value)


class Started:
    """A rival that tries our warm starts first, without learning from them."""

    def __init__(self, make: Callable[[Space, int], Rival], space: Space, seed: int) -> None:
        self.rival = make(space, seed)
        self.starts = [point for _, point in warm_starts(space)]
        self.asked = self.told = 0

    def ask(self) -> Point:
        self.asked += 1
        return self.starts[self.asked - 1] if self.asked <= len(self.starts) else self.rival.ask()

    def tell(self, trial: TrialRecord) -> None:
        self.told += 1
        if self.told > len(self.starts):
            self.rival.tell(trial)


class WeightsGa:
    """A genetic algorithm over the weights of one method, in [0, 1], as mergenetic has it.

    pymoo's ``GA`` with mergenetic's arguments: tenths at random, binary tournaments, simulated
    binary crossover, polynomial mutation, no duplicates, and the best of parents and children
    live on. It goes on without end, beyond mergenetic's 5 or 7 generations.

    Deb and Agrawal 1995 (crossover); Deb et al. 2002, "NSGA-II" (mutation within bounds).
    """

    def __init__(self, population: int, method: str, space: Space, seed: int) -> None:
        self.size, self.method, self.space = population, method, space
        self.generator = np.random.default_rng(seed)
        self.parents = np.empty((0, len(space.donors)))
        self.values: list[float] = []
        self.children = self.generator.integers(11, size=(population, len(space.donors))) / 10
        self.told: list[float] = []
        self.asked = 0

    def ask(self) -> Point:
        if len(self.told) == self.size:
            everyone = np.vstack([self.parents, self.children])
            values = np.array(self.values + self.told)
            best = np.argsort(-values, kind="stable")[: self.size]
            self.parents, self.values = everyone[best], values[best].tolist()
            self.children, self.told, self.asked = self._offspring(), [], 0
        self.asked += 1
        return self.space.point(self.method, self.children[self.asked - 1].tolist())

    def tell(self, trial: TrialRecord) -> None:
        self.told.append(trial.value)

    def _offspring(self) -> Floats:
        """As many children as parents, each unlike anyone."""
        children = np.empty_like(self.parents[:0])
        while len(children) < self.size:
            pair = self.parents[[self._winner(), self._winner()]]
            for child in self.mutated(self.crossed(pair)):
                known = np.vstack([self.parents, children])
                if abs(known - child).max(axis=1).min() > 1e-16:
                    children = np.vstack([children, child])
        return children[: self.size]

    def _winner(self) -> int:
        """The better of two parents; they are sorted."""
        return int(self.generator.integers(len(self.parents), size=2).min())

    def crossed(self, pair: Floats, eta: float = 15, chance: float = 0.9) -> Floats:
        """Simulated binary crossover of two parents, (2, k), within [0, 1]."""
        if self.generator.random() > chance:
            return pair
        low, high = pair.min(axis=0), pair.max(axis=0)
        crossing = (self.generator.random(pair.shape[1]) < 0.5) & (high - low > 1e-14)
        gap = np.where(crossing, high - low, 1.0)
        u = self.generator.random(pair.shape[1])
        children = []
        for room, sign in ((low, -1), (1 - high, 1)):
            alpha = 2 - (1 + 2 * room / gap) ** -(eta + 1)
            spread = np.where(u <= 1 / alpha, u * alpha, 1 / np.maximum(2 - u * alpha, 1e-16)) ** (
                1 / (eta + 1)
            )
            children.append(0.5 * (low + high + sign * spread * gap))
        swapped = self.generator.random(pair.shape[1]) < 0.5
        both = np.where(swapped, children[::-1], children)
        return np.clip(np.where(crossing, both, pair), 0, 1)

    def mutated(self, some: Floats, eta: float = 20, chance: float = 0.9) -> Floats:
        """Polynomial mutation, (n, k): each weight with chance 1 / k, at most a half."""
        share = min(0.5, 1 / some.shape[1])
        moving = self.generator.random(some.shape) < share
        moving &= self.generator.random((len(some), 1)) < chance
        u = self.generator.random(some.shape)
        down = (2 * u + (1 - 2 * u) * (1 - some) ** (eta + 1)) ** (1 / (eta + 1)) - 1
        up = 1 - (2 * (1 - u) + (2 * u - 1) * some ** (eta + 1)) ** (1 / (eta + 1))
        return np.clip(some + np.where(moving, np.where(u < 0.5, down, up), 0), 0, 1)


class StockFront:
    """A sampler of Optuna's that looks for a front, as anyone would make it, after our warm starts.

    Args:
        make: From a seed.
        objectives: How many.
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], space: Space, seed: int, objectives: int
    ) -> None:
        self.space = space
        self.study = optuna.create_study(directions=["maximize"] * objectives, sampler=make(seed))
        for _, point in warm_starts(space):
            self.study.enqueue_trial(point)

    def ask(self) -> Point:
        self.trial = self.study.ask(self.space.distributions)
        return self.trial.params

    def tell(self, trial: TrialRecord) -> None:
        self.study.tell(self.trial, [estimate.value for estimate in trial.tasks.values()])
