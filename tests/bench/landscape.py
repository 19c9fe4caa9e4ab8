"""Landscapes to measure a search on: every recipe's value on every item, and its true score.

Items are a sample of a population, and the truth is the population's mean, known exactly:

* ``Tabulated``: the answers of real merged models. The population is the table's items, of which a
  run draws with replacement. A recipe beside the table's is answered by a surrogate.
* ``Planted``: a smooth value per method with a known best recipe; items are fresh draws of a
  two-parameter item-response model. ``null`` landscapes have nothing to find.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

from merge_engine.recipe.recipe import Recipe
from search.proposing.space import Space, coarse_to_fine

Bits = NDArray[np.bool_]
Floats = NDArray[np.float64]
GOLDEN = (5**0.5 - 1) / 2


class Items(Protocol):
    """Items drawn for one run: n of them, evenly over the tasks in any part of their order."""

    tasks: tuple[str, ...]

    def answers(self, recipe: Recipe) -> Bits:
        """Return which of the n items the recipe's model gets right."""


class Landscape(Protocol):
    """A search space, and every recipe's true score."""

    space: Space
    weights: Mapping[str, float]
    best: float

    def draw(self, count: int, generator: np.random.Generator) -> Items:
        """Draw items of the population."""

    def truth(self, recipe: Recipe) -> float:
        """Return the weighted task mean of the recipe's model over the whole population."""


def dealt_tasks(count: int, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return a task for each of ``count`` items, each task's share in any part of their order."""
    ends = np.cumsum([weight / sum(weights.values()) for weight in weights.values()])
    positions = (np.arange(count) * GOLDEN) % 1.0
    names = tuple(weights)
    return tuple(names[min(i, len(names) - 1)] for i in np.searchsorted(ends, positions, "right"))


def coordinates(space: Space, recipe: Recipe) -> Floats:
    """Return what a recipe's model depends on besides the method: weights, then parameters.

    Recipes that merge alike have equal coordinates, whichever points they were made of. There are k
    weights for each of the space's u units, over sqrt(u): a step in all counts as much as in one.
    """
    weights: list[float] = []
    for unit in space.units:
        values = recipe.values((*unit, "")[0], 0.0)
        weights += [weight / len(space.units) ** 0.5 for weight in _weights(space, recipe, values)]
    other = [np.mean(values[name]) for name in sorted(space.ranges) if name in values]
    return np.array([*weights, *other])


def _weights(space: Space, recipe: Recipe, values: Mapping[str, Any]) -> list[float]:
    models = [source.model for source in recipe.donors]
    weights = values.get("weight", (1 / len(models),) * len(models))
    scale = values.get("lambda_", 1 / (sum(weights) or 1.0) if values.get("normalize") else 1.0)
    weight = dict(zip(models, weights, strict=True))
    return [scale * weight.get(donor, 0.0) for donor in space.donors]


@dataclass(frozen=True)
class TableItems:
    """Rows of the table's items."""

    table: "Tabulated"
    numbers: NDArray[np.int64]
    tasks: tuple[str, ...]

    def answers(self, recipe: Recipe) -> Bits:
        return self.table.answers(recipe)[self.numbers]


class Tabulated:
    """The landscape of a tabulated study.

    The surrogate: a Gaussian process over all recipes, whose targets are the m items' answers. An
    item is right where the posterior mean is above the item's own threshold. Thresholds are fixed
    and spread around a half, so neighbours answer alike and the mean over items is nearly the
    posterior's.

    Args:
        space: Of the study.
        weights: Of its tasks.
        tasks: m names.
        recipes: n recipes.
        table: Their answers, (n, m).
    """

    def __init__(
        self,
        space: Space,
        weights: Mapping[str, float],
        tasks: Sequence[str],
        recipes: Sequence[Recipe],
        table: Bits,
    ) -> None:
        self.space, self.weights = space, weights
        self.tasks = np.array(tasks)
        self.recipes, self.table = recipes, table
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self.item_weights: Floats = np.array(
            [shares[task] / (self.tasks == task).sum() for task in tasks]
        )
        self._thresholds = np.random.default_rng(0).uniform(0.25, 0.75, len(tasks))
        self._known: dict[str, Bits] = {r.key: row for r, row in zip(recipes, table, strict=True)}
        self.methods = sorted({recipe.merge_method for recipe in recipes})
        self.where = np.array([self.features(recipe) for recipe in recipes])  # (n, d)
        self.kernel = fitted_kernel(self.where, table)
        self._process = process_of(self.kernel, self.where, table)

    @classmethod
    def load(cls, file: Path) -> "Tabulated":
        """Load a table of ``studies/landscapes/make_table.py``."""
        with np.load(file) as stored:
            space = json.loads(str(stored["space"]))
            tasks = [str(task) for task in stored["tasks"]]
            return cls(
                Space(**{name: _tuples(value) for name, value in space.items()}),
                json.loads(str(stored["weights"])),
                tasks,
                [Recipe.model_validate(recipe) for recipe in json.loads(str(stored["recipes"]))],
                np.unpackbits(stored["answers"], axis=1, count=len(tasks)) > 0,
            )

    def features(self, recipe: Recipe) -> Floats:
        """Return the surrogate's features of a recipe, (d): weights, parameters, method as one-hot.

        Weights are on a log scale, since a merge breaks down ever more slowly. A parameter that a
        method has not is at the end of its range: a density of 1 drops nothing.
        """
        found, k = coordinates(self.space, recipe), len(self.space.donors)
        ends = [high for _, (_, high) in sorted(self.space.ranges.items())]
        method = [float(recipe.merge_method == method) for method in self.methods]
        return np.array([*np.log1p(found[:k]), *found[k:], *ends[len(found) - k :], *method])

    def answers(self, recipe: Recipe) -> Bits:
        """Return the values of all m items: the table's if it is there, else the surrogate's."""
        if recipe.key not in self._known:
            self._known[recipe.key] = self.surrogate(self.features(recipe)[None])[0]
        return self._known[recipe.key]

    def surrogate(self, where: Floats) -> Bits:
        """Return the surrogate's values of items, (n, m), at features (n, d)."""
        return right(self._process, where, self._thresholds)

    def truth(self, recipe: Recipe) -> float:
        return float(self.answers(recipe) @ self.item_weights)

    def draw(self, count: int, generator: np.random.Generator) -> TableItems:
        tasks = dealt_tasks(count, self.weights)
        rows = {task: np.flatnonzero(self.tasks == task) for task in self.weights}
        numbers = np.array([generator.choice(rows[task]) for task in tasks])
        return TableItems(self, numbers, tasks)

    def held_out(self, folds: int = 5) -> Bits:
        """Answers (n, m) to the table's recipes by surrogates that have not seen them."""
        fold = np.random.default_rng(0).permutation(len(self.recipes)) % folds
        answers = np.empty_like(self.table)
        for out in range(folds):
            kept = fold != out
            process = process_of(self.kernel, self.where[kept], self.table[kept])
            answers[~kept] = right(process, self.where[~kept], self._thresholds)
        return answers

    @cached_property
    def best(self) -> float:
        """The highest truth that random steps from the best recipes of the table find."""
        generator = np.random.default_rng(0)
        values = self.table @ self.item_weights
        best, top = float(values.max()), self.where[np.argsort(-values)[:10]]
        k = len(self.space.donors)
        for width in (0.2, 0.1, 0.05, 0.02):
            near = np.repeat(top, 200, axis=0)
            near[:, :k] += width * generator.standard_normal((len(near), k))
            values = self.surrogate(near) @ self.item_weights
            best, top = max(best, float(values.max())), near[np.argsort(-values)[:10]]
        return best


def _tuples(value: Any) -> Any:
    """Return JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def fitted_kernel(where: Floats, answers: Bits) -> Kernel:
    """Lengths and noise of the process, fitted to some of the recipes and a few of the items."""
    generator = np.random.default_rng(0)
    rows = generator.permutation(len(where))[:150]
    items = generator.permutation(answers.shape[1])[:16]
    kernel = ConstantKernel(1.0, "fixed") * Matern(np.ones(where.shape[1]), (0.05, 20.0), nu=2.5)
    process = GaussianProcessRegressor(
        kernel + WhiteKernel(0.1, (1e-3, 1.0)), normalize_y=True, random_state=0
    )
    with warnings.catch_warnings():  # a length at its end: the coordinate does not matter
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(where[rows], answers[np.ix_(rows, items)].astype(np.float64)).kernel_


def process_of(kernel: Kernel, where: Floats, answers: Bits) -> GaussianProcessRegressor:
    """One process for all items, which share their kernel."""
    process = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=None)
    return process.fit(where, answers.astype(np.float64))


def right(process: GaussianProcessRegressor, where: Floats, thresholds: Floats) -> Bits:
    """Answers (n, m): where the posterior mean is above the item's threshold."""
    return process.predict(where) > thresholds


# A discrimination's spread: log-normal, as in fitted item-response models.
LOG_DISCRIMINATION = norm.ppf((np.arange(64) + 0.5) / 64) * 0.3
WAVES = 32
ROUGHNESS = 3.0  # waves per unit of weight: recipes 0.3 apart err apart


def share_right(ability: Floats) -> Floats:
    """The share of all items that an ability answers rightly: ``E[Phi(a (ability - b))]``.

    The expectation over difficulties ``b ~ N(0, 1)`` is exact, that over discriminations ``a`` is
    of 64 quantiles.
    """
    a = np.exp(LOG_DISCRIMINATION)
    return norm.cdf(np.outer(ability, a / np.sqrt(1 + a**2))).mean(axis=1)


ABILITIES = np.linspace(-6, 6, 2401)
SHARES = share_right(ABILITIES)


@dataclass(frozen=True)
class PlantedItems:
    """Draws of the item-response model, fields of shape (n) but ``own`` (n, WAVES)."""

    landscape: "Planted"
    discrimination: Floats
    difficulty: Floats
    shared: Floats
    own: Floats
    tasks: tuple[str, ...]

    def answers(self, recipe: Recipe) -> Bits:
        common = self.landscape.correlation
        ability = np.interp(self.landscape.truth(recipe), SHARES, ABILITIES)
        noise = common**0.5 * self.shared
        noise = noise + (1 - common) ** 0.5 * (self.own @ self.landscape.waves(recipe))
        return self.discrimination * (ability - self.difficulty) > noise


@dataclass(frozen=True)
class Planted:
    """A landscape made up: for each method a bell over the coordinates, on one floor.

    An item is right where ``a (ability - b) > noise``, with ability the one whose share of all
    items is the recipe's value. Luck is normal: a part of every recipe's alike, and a part that
    changes smoothly with the recipe, so that near recipes are right on the same items.

    Args:
        heights: Value at the top of each method's bell.
        centres: Coordinates of the tops.
        floor: Value far from every top.
        correlation: Of the noise of two recipes far apart.
        seed: Of how noise changes with the recipe.
        depths: Depth groups with weights of their own.
    """

    heights: Mapping[str, float]
    centres: Mapping[str, tuple[float, ...]]
    floor: float
    correlation: float = 0.9
    seed: int = 0
    depths: int = 1

    @cached_property
    def space(self) -> Space:
        ranges = {"density": (0.1, 1.0)}
        units = tuple((f"layers.{group}.",) for group in range(self.depths - 1))
        return Space(
            "base",
            ("a", "b", "c"),
            tuple(self.heights),
            (0.0, 1.5),
            ranges,
            units=(*units, ()),
            stages=coarse_to_fine(self.depths, 0),
        )

    @property
    def weights(self) -> dict[str, float]:
        return {"planted": 1.0}

    @property
    def best(self) -> float:
        return max(self.heights.values())

    def truth(self, recipe: Recipe) -> float:
        method = recipe.merge_method
        away = coordinates(self.space, recipe) - self.centres[method]
        bell = float(np.exp(-0.5 * (away**2).sum() / 0.7**2))
        return self.floor + (self.heights[method] - self.floor) * bell

    def draw(self, count: int, generator: np.random.Generator) -> PlantedItems:
        return PlantedItems(
            self,
            discrimination=np.exp(0.3 * generator.standard_normal(count)),
            difficulty=generator.standard_normal(count),
            shared=generator.standard_normal(count),
            own=generator.standard_normal((count, WAVES)),
            tasks=("planted",) * count,
        )

    def waves(self, recipe: Recipe) -> Floats:
        """A unit vector (WAVES) that turns smoothly with the recipe."""
        frequencies, phases = self._waves
        method = list(self.heights).index(recipe.merge_method)
        at = coordinates(self.space, recipe)
        wave = np.cos(frequencies[:, : len(at)] @ at + phases[method])
        return wave / np.linalg.norm(wave)

    @cached_property
    def _waves(self) -> tuple[Floats, Floats]:
        generator = np.random.default_rng(self.seed)
        frequencies = ROUGHNESS * generator.standard_normal((WAVES, 3 * self.depths + 1))
        return frequencies, generator.uniform(0, 2 * np.pi, (len(self.heights), WAVES))


METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def _planted(seed: int, floor: float, height: float, gap: float) -> Planted:
    generator = np.random.default_rng(seed)
    heights = dict(zip(generator.permutation(METHODS), height - gap * np.arange(4), strict=True))
    centres = {
        method: tuple(generator.uniform(0.3, 1.1, 3))
        + (() if method == "task_arithmetic" else (float(generator.uniform(0.3, 0.9)),))
        for method in METHODS
    }
    return Planted({m: float(heights[m]) for m in METHODS}, centres, floor, seed=seed)


def planted(seed: int) -> Planted:
    """Much to find: one of four methods is best, by 2 points; a bad merge halves the score."""
    return _planted(seed, floor=0.35, height=0.75, gap=0.02)


def planted_small(seed: int) -> Planted:
    """Little to find, as in the wild: all that merging can give is a few points."""
    return _planted(seed, floor=0.55, height=0.65, gap=0.01)


def _planted_in_depth(seed: int, slope: float, jitter: float) -> Planted:
    """As ``planted``, with four depth groups, where the best weights change with depth."""
    even = planted(seed)
    generator = np.random.default_rng((seed, 2))
    centres = {}
    for method, at in even.centres.items():
        slopes = generator.uniform(-slope, slope, 3)
        by_depth = np.array(at[:3]) + np.outer((np.arange(4) - 1.5) / 3, slopes)
        by_depth = np.maximum(by_depth + jitter * generator.standard_normal((4, 3)), 0.0)
        centres[method] = (*(by_depth / 2).flatten().tolist(), *at[3:])
    return replace(even, centres=centres, depths=4)


def planted_depth(seed: int) -> Planted:
    """The best weights drift with depth, and jump: the best without that loses some points."""
    return _planted_in_depth(seed, slope=1.0, jitter=0.1)


def planted_even(seed: int) -> Planted:
    """The best weights are the same in all depths, which the search does not know."""
    return _planted_in_depth(seed, slope=0.0, jitter=0.0)


def null_donor(seed: int) -> Planted:
    """Nothing to find: the best there is is donor a, as it is."""
    found = _planted(seed, floor=0.35, height=0.62, gap=0.01)
    heights = {method: min(height, 0.61) for method, height in found.heights.items()}
    return replace(
        found,
        heights=heights | {"task_arithmetic": 0.62},
        centres={**found.centres, "task_arithmetic": (1.0, 0.0, 0.0)},
    )


def null_flat(seed: int) -> Planted:
    """Nothing to find, and nothing to lose: every recipe is as good as any, on other items."""
    return _planted(seed, floor=0.6, height=0.6, gap=0.0)


def demo(seed: int) -> Tabulated:
    """The demo's study, tabulated; the same one for every seed."""
    return _table(Path(__file__).parents[2] / "studies" / "landscapes" / "demo.npz")


@cache
def _table(file: Path) -> Tabulated:
    return Tabulated.load(file)


LANDSCAPES: Mapping[str, Callable[[int], Landscape]] = {
    "demo": demo,
    "planted": planted,
    "planted_small": planted_small,
    "planted_depth": planted_depth,
    "planted_even": planted_even,
    "null_donor": null_donor,
    "null_flat": null_flat,
}
