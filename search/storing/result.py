"""result.json, the machine-readable truth of a run. All means are in the tasks' own unit."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from merge_engine.errors import first_error
from merge_engine.schema import FrozenModel
from objectives.scores import Interval
from search.study.spec import StudyError

PACKAGES = ("mergesearch", "torch", "transformers", "lm_eval", "optuna", "safetensors")
OTHERS = ("base", "uniform", "winner")  # who stands beside the donors in a table

Kind = TypeVar("Kind", bound=BaseModel)


class Score(FrozenModel):
    """A model on the test items: weighted mean with its 95 % interval, and each task's mean.

    ``tokens``: the mean number it wrote for an item; None where no task has it write.
    """

    mean: float
    ci95: tuple[float, float]
    tasks: dict[str, float]
    tokens: float | None = None


class Difference(FrozenModel):
    """The winner less another model on the same test items."""

    mean: float
    ci95: tuple[float, float]

    @classmethod
    def of(cls, interval: Interval) -> Difference:
        """From an interval."""
        return cls(mean=interval.mean, ci95=(interval.low, interval.high))


class Baseline(FrozenModel):
    """A model the winner is compared with."""

    test: Score
    difference: Difference


class DonorDifference(Difference):
    """As Difference, to the donor that was best on the search items.

    ``items_to_decide``: how many test items would show so large a difference, four times in five;
    None if these have shown it, or there is none to show.
    """

    donor: str
    items_to_decide: int | None


class Winner(FrozenModel):
    """The chosen recipe, the trial that first proposed it, and how it tests."""

    recipe: dict[str, Any]
    trial: int
    test: Score


class OtherTrial(NamedTuple):
    """A trial that is not the winner: its estimate on so many search items, its test if any."""

    number: int
    search_score: float | None
    items: int
    test: Score | None


class Seconds(FrozenModel):
    """Where the time went; ``total`` counts every session of the run."""

    build: float
    score: float
    ask: float
    total: float


class Result(FrozenModel):
    """What a run found.

    ``search_score`` is what the winner was told to be worth, on items it was chosen for, and
    ``believed_score`` that with the luck taken away; ``select_score`` is its mean on the select
    items it was asked, None if it had no rival. They are shown to be compared with
    ``winner.test``. ``front`` are the recipes of which none was believed to beat another on every
    task, before they were tested; none where the study does not look for them. ``floors`` are
    what the winner had to reach in tasks, on the test items; it was chosen for having reached them
    on others. ``items_asked`` counts the item evaluations of each split. ``times_tested`` is how
    many winners have been asked the test items so far: more than one if a finished run was
    extended.
    """

    version: Literal[1] = 1
    verdict: Literal["better", "not better"]
    winner: Winner
    front: list[Winner] = Field(default=[])
    donors: dict[str, Baseline]
    floors: dict[str, float] = Field(default={})
    base: Baseline
    uniform: Baseline
    difference_to_best_donor: DonorDifference
    search_score: float
    believed_score: float
    select_score: float | None
    trials: int
    failed_trials: int
    item_evaluations: int
    items_asked: dict[str, int]
    times_tested: int
    seconds: Seconds
    seed: int
    versions: dict[str, str]

    @property
    def says(self) -> str:
        """The verdict in words."""
        if self.verdict == "better":
            return "The winner is better than its base and every donor"
        return "The winner is not shown to be better than all it was made from"

    @property
    def floors_say(self) -> str | None:
        """What has become of the floors on the test items, in words; None where there are none."""
        if not self.floors:
            return None
        reached = self.winner.test.tasks
        each = [
            f"{task} {100 * reached[task]:.1f} "
            f"(floor {100 * floor:.1f}: {'kept' if reached[task] >= floor else 'missed'})"
            for task, floor in self.floors.items()
        ]
        return f"Floors on the test items: {', '.join(each)}."


def read_result(run: Path) -> Result | None:
    """The result of a run's folder, if it has one so far.

    Raises:
        StudyError: Another version of this program wrote it.
    """
    return read_json(run / "result.json", Result)


def read_json(file: Path, kind: type[Kind]) -> Kind | None:
    """What a run has left in a file, if it is there.

    Raises:
        StudyError: Another version of this program wrote it.
    """
    try:
        return kind.model_validate_json(file.read_bytes()) if file.is_file() else None
    except ValidationError as error:
        raise StudyError(
            f"{file} is none of this version of mergesearch ({first_error(error)}); finish the "
            "run again, or remove it"
        ) from None


def package_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def short_names(names: Iterable[str], separator: str) -> dict[str, str]:
    """The last part of each name where nothing else in a table is called so, else all of it."""
    short = {name: name.rsplit(separator, 1)[-1] for name in names}
    count = Counter([*short.values(), *OTHERS])
    return {name: last if count[last] == 1 else name for name, last in short.items()}
