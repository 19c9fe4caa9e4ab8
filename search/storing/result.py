"""result.json: the outcome of a run. All means are in the tasks' own unit.

It may be published, so it calls local models ``./name``; paths.json, which is private, has their
paths.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, model_validator

from merge_engine.errors import first_error
from merge_engine.methods import METHODS
from merge_engine.recipe.recipe import Recipe
from merge_engine.replacing import replace_text
from merge_engine.schema import FrozenModel
from objectives.scores import Interval, score_interval
from search.racing.item_scores import ItemScores
from search.storing.intact import reading_stored
from search.study.public_names import renamed
from search.study.spec import StudyError
from search.wording import bracketed, percent

RESULT = "result.json"
PATHS = "paths.json"  # paths of the folders that a result names
PACKAGES = ("mergesearch", "torch", "transformers", "lm_eval", "optuna", "safetensors")

# Keys of `Result` in files of earlier versions.
_FORMER_NAMES = {"believed_score": "posterior_mean", "items_asked": "split_evaluations"}

Kind = TypeVar("Kind", bound=BaseModel)


class _Mean(FrozenModel):
    """A weighted mean over the tasks, with its interval."""

    mean: float
    ci95: tuple[float, float]  # ends of its 95 % interval

    @property
    def interval(self) -> Interval:
        """The mean with its 95 % interval."""
        return Interval(self.mean, *self.ci95)


class Score(_Mean):
    """A model's score on the items of a split."""

    tasks: dict[str, float]  # mean of each task
    # Mean number of tokens generated for an item; None: no task generates text.
    tokens: float | None = None

    @classmethod
    def of(cls, scores: ItemScores, seed: int) -> Self:
        """Summarise scores: task means, and the 95 % interval of their weighted mean."""
        interval = score_interval(scores.values, scores.tasks, scores.weights, seed=seed)
        return cls(
            mean=interval.mean,
            ci95=(interval.low, interval.high),
            tasks=scores.by_task,
            tokens=scores.mean_tokens,
        )


class Difference(_Mean):
    """The winner's lead: its mean less another model's, paired by test item."""

    @classmethod
    def of(cls, interval: Interval) -> Self:
        """Convert an interval."""
        return cls(mean=interval.mean, ci95=(interval.low, interval.high))


class Baseline(FrozenModel):
    """A model the winner is compared with, and the winner's lead over it."""

    test: Score
    difference: Difference


class Donor(Baseline):
    """A donor, evaluated like the winner: under the study's chat template, if it uses one."""

    # The same under the donor's own chat template; None: it has no other, or none is used.
    own_template: Baseline | None = None


class DonorDifference(Difference):
    """The winner's lead over the donor that had the best posterior mean on the search items."""

    donor: str  # its name in the study
    own_template: bool = False  # it was best under its own chat template
    # Number of test items that would show a lead of this size with a power of 80 %; None: these
    # have shown it, or the lead is not positive.
    items_to_decide: int | None


def _checked_recipe(mapping: dict[str, Any]) -> dict[str, Any]:
    if (method := Recipe.model_validate(mapping).merge_method) not in METHODS:
        raise ValueError(f"unknown merge_method {method!r}")
    return mapping


class Winner(FrozenModel):
    """A chosen recipe, the trial that first proposed it, and its test score."""

    recipe: Annotated[dict[str, Any], AfterValidator(_checked_recipe)]
    trial: int
    test: Score


class Untuned(Winner):
    """The recipe without tuned weights that had the highest posterior mean after the search."""

    difference: Difference  # the winner's lead over it: what tuning has gained

    @property
    def text(self) -> str:
        """What tuning has gained, as a sentence."""
        lead = self.difference.interval
        return (
            f"Tuning gained {bracketed(lead, '+')} points over the best recipe without tuned "
            f"weights, {self.recipe['merge_method']} of trial {self.trial}, on the same test items"
            + ("." if lead.low > 0 else ": it is not shown to have helped.")
        )


class Seconds(FrozenModel):
    """Time of all sessions of a run: building, evaluating (``score``), proposing, in total."""

    build: float
    score: float
    ask: float
    total: float


class AtEdge(FrozenModel):
    """A recipe's parameter, in a result the winner's, that lies at an edge of its range."""

    name: str  # as in the study
    value: float
    range: tuple[float, float]  # as it was searched
    wider: tuple[float, float]  # what to search next

    @property
    def text(self) -> str:
        """What it means and what to do, as sentences."""
        low, high = (f"{end:.4g}" for end in self.range)
        wider = ", ".join(f"{end:.4g}" for end in self.wider)
        return (
            f"The winner's {self.name}, {self.value:.4g}, lies at the edge of [{low}, {high}]: a "
            f"better recipe may lie beyond. Write `{self.name}: [{wider}]` under `search` in "
            "study.yaml to look there."
        )


class Result(FrozenModel):
    """The outcome of a run: verdict, winner, front, baselines and costs."""

    version: Literal[1] = 1  # of this format
    # "better" where the winner's leads over base and every donor are above zero.
    verdict: Literal["better", "not better"]
    winner: Winner  # the chosen recipe
    # The Pareto front over the tasks, as it was before the test; empty without ``search.front``.
    front: list[Winner] = Field(default=[])
    donors: dict[str, Donor]
    # Least means of constrained tasks; the winner was chosen for meeting them on other items.
    floors: dict[str, float] = Field(default={})
    edges: list[AtEdge] = Field(default=[])  # of the ranges, where the winner lies
    base: Baseline
    uniform: Baseline  # the uniform average of the donors
    # If the winner's weights were tuned; None: they were not, or no untuned recipe is left.
    untuned: Untuned | None = None
    difference_to_best_donor: DonorDifference  # the lead that the verdict's sentence names
    search_score: float  # the winner's estimate on the search items, which it was chosen on
    posterior_mean: float  # its posterior mean after the search, without that optimism
    # Its mean on the select items it was evaluated on; None: it had no rival.
    select_score: float | None
    trials: int  # how many are complete
    failed_trials: int  # how many have failed
    item_evaluations: int  # of all splits
    split_evaluations: dict[str, int]  # item evaluations of each split
    times_tested: int  # winners evaluated on the test items; several if the run was extended
    seconds: Seconds  # where the time went
    seed: int  # of the study
    versions: dict[str, str]  # of the packages the numbers depend on

    @model_validator(mode="before")
    @classmethod
    def _with_present_names(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {_FORMER_NAMES.get(name, name): value for name, value in raw.items()}

    @model_validator(mode="after")
    def _best_donor_is_known(self) -> Self:
        if self.difference_to_best_donor.donor not in self.donors:
            raise ValueError("difference_to_best_donor: its donor is not among the donors")
        return self

    @property
    def verdict_text(self) -> str:
        """The verdict as a clause."""
        if self.verdict == "better":
            return "The winner is better than its base and every donor"
        return "The winner is not shown to be better than its base and every donor"

    @property
    def floors_text(self) -> str | None:
        """Whether the winner meets each floor on the test items; None: there are no floors."""
        if not self.floors:
            return None
        means = self.winner.test.tasks
        each = [
            f"{task} {percent(means[task])} "
            f"(floor {percent(floor)}: {'met' if means[task] >= floor else 'not met'})"
            for task, floor in self.floors.items()
        ]
        return f"Floors on the test items: {', '.join(each)}."


def write_result(run: Path, result: Result, names: Mapping[str, str]) -> None:
    """Write a result, with folders by their public ``names``, and their paths beside it."""
    text = json.dumps({name: path for path, name in names.items()}, indent=2)
    replace_text(run / PATHS, text + "\n", private=True)
    text = json.dumps(renamed(result.model_dump(mode="json"), names), indent=2)
    replace_text(run / RESULT, text + "\n")


def read_result(run: Path) -> Result | None:
    """Read the result of a run folder, with folders by their paths; None: there is none yet."""
    return read_json(run / RESULT, Result, read_paths(run))


def read_paths(run: Path) -> dict[str, str]:
    """Read the paths of the folders that a result names; empty if unknown."""
    with suppress(OSError, ValueError, TypeError):
        if (run / PATHS).is_file():  # opening a pipe would block
            return TypeAdapter(dict[str, str]).validate_json((run / PATHS).read_bytes())
    return {}


def read_json(file: Path, kind: type[Kind], names: Mapping[str, str] = {}) -> Kind | None:
    """Read a JSON file of a run folder, if it is there, with ``names`` in it replaced.

    Raises:
        StudyError: It is damaged, or another version of this program wrote it.
    """
    if not file.is_file():
        return None
    try:
        with reading_stored(file):
            found = renamed(json.loads(file.read_bytes()), names)
        return kind.model_validate_json(json.dumps(found))
    except ValidationError as error:
        raise StudyError(
            f"{file} is not valid in this version of mergesearch ({first_error(error)}); finish "
            "the run again, or remove it"
        ) from None


def package_versions() -> dict[str, str]:
    """Return the versions of the packages the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
