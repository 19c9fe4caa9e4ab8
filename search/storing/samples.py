"""samples.json: responses of a finished run's models to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from merge_engine.replacing import replace_text
from merge_engine.schema import FrozenModel
from search.storing.result import Result, read_json
from search.study.spec import StudyError

FILE: Final = "samples.json"


class ModelResponse(FrozenModel):
    """A model's response to a prompt, untrusted text."""

    name: str  # of the model in tables
    model: str  # its folder or id, or the winner's trial
    text: str | None  # what it generated, or the choice it took; None: the item has no text
    value: float | None = None  # its stored score, of a test item

    @property
    def title(self) -> str:
        """The model's name, and its score on the item."""
        return self.name if self.value is None else f"{self.name} ({self.value:.3g})"


class Sample(FrozenModel):
    """A prompt, untrusted text, and each model's response to it."""

    prompt: str  # as the models read it
    responses: list[ModelResponse]  # of base, donors and winner
    task: str | None = None  # of the test item that the prompt is; None: the user gave the prompt
    item: int | None = None  # the item's row in the task's data
    # Whether the winner gained or lost the item against the best donor.
    change: Literal["gained", "lost"] | None = None
    right: str | None = None  # the item's target

    @property
    def title(self) -> str:
        """The item's task and row, or "prompt"."""
        return "prompt" if self.task is None else f"{self.task}, item {self.item}: {self.change}"


class Samples(FrozenModel):
    """The file: samples of a run, and the trial of the winner they are of."""

    version: Literal[1] = 1
    trial: int
    samples: list[Sample]


def read_samples(folder: Path, result: Result) -> list[Sample]:
    """Read the samples of a run's winner; empty if damaged, or of an earlier winner."""
    try:
        kept = read_json(folder / FILE, Samples)
    except StudyError:  # they will be generated again
        return []
    return kept.samples if kept and kept.trial == result.winner.trial else []


def store_samples(folder: Path, result: Result, samples: Sequence[Sample]) -> None:
    """Store samples of prompts, or of items, replacing those of the same kind."""
    kinds = {sample.task is None for sample in samples}
    others = [one for one in read_samples(folder, result) if (one.task is None) not in kinds]
    kept = Samples(trial=result.winner.trial, samples=[*others, *samples])
    replace_text(folder / FILE, kept.model_dump_json(indent=2) + "\n", private=True)
