"""What the models of a run write to the same prompts, side by side.

The prompts are somebody's own, or test items that the winner gained or lost against the best
donor. What an answer is worth was stored when it was asked; its words are asked for again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from merge_engine.recipe.recipe import Recipe
from merge_engine.schema import FrozenModel
from objectives.base import printable
from search.proposing.starts import baselines
from search.showing.charts import shortened
from search.storing.result import Result, read_json, short_names

if TYPE_CHECKING:
    from objectives.entries import PromptEntry
    from search.running.run import Run

FILE = "samples.json"
ITEMS = 6  # gained, and as many lost, that are asked for
MOST = 1500  # letters shown of a text


class ModelResponse(FrozenModel):
    """What a model wrote or chose, and what that was worth if it is an item's answer."""

    name: str
    model: str
    text: str | None
    value: float | None = None

    @property
    def title(self) -> str:
        """Whose it is, and what it was worth."""
        return self.name if self.value is None else f"{self.name} ({self.value:.3g})"


class Sample(FrozenModel):
    """A prompt, and what each model says to it; untrusted text.

    ``task`` and ``item`` (a row of the task's data) are those of a test item, which the winner
    has ``change``; None where the prompt is somebody's own.
    """

    prompt: str
    responses: list[ModelResponse]
    task: str | None = None
    item: int | None = None
    change: Literal["gained", "lost"] | None = None
    right: str | None = None

    @property
    def title(self) -> str:
        """Where the prompt is from."""
        return "prompt" if self.task is None else f"{self.task}, item {self.item}: {self.change}"


class Samples(FrozenModel):
    """What a run keeps of them: ``trial`` is the winner's."""

    version: Literal[1] = 1
    trial: int
    samples: list[Sample]


class _Model(NamedTuple):
    """Somebody whose words are asked for."""

    name: str
    model: str
    recipe: Recipe


def of_prompts(run: Run, result: Result, prompts: PromptEntry) -> list[Sample]:
    """What base, donors and winner write to prompts, which are shown as the models see them.

    Raises:
        ObjectiveError: A prompt cannot be asked.
    """
    models = _models(run, result)
    said = [run.workers.call("respond", one.recipe, prompts) for one in models]
    return [
        Sample(
            prompt=of_prompt[0].prompt or "",
            responses=[
                ModelResponse(name=one.name, model=one.model, text=words.text)
                for one, words in zip(models, of_prompt, strict=True)
            ],
        )
        for of_prompt in zip(*said, strict=True)
    ]


def of_items(run: Run, result: Result, count: int) -> list[Sample]:
    """What they say to test items that the winner gained and lost, ``count`` of each at most.

    Items whose answers have no words are left out.
    """
    models, best = _models(run, result), result.difference_to_best_donor.donor
    values = [one.values for one in run.scores.evaluate([one.recipe for one in models], "test")]
    before, after = values[[one.model for one in models].index(best)], values[-1]
    places = changed(run.context.tasks_of("test"), before, after, count)
    if not places:
        return []
    numbers = [run.context.splits.test[place] for place in places]
    prompts = [each.prompt for each in run.context.objective.snapshots(numbers)]
    said = [run.workers.call("respond", one.recipe, numbers) for one in models]
    samples = []
    for at, place in enumerate(places):
        item = run.context.objective.items[numbers[at]]
        responses = [
            ModelResponse(name=one.name, model=one.model, text=words[at].text, value=answers[place])
            for one, words, answers in zip(models, said, values, strict=True)
        ]
        if any(response.text is not None for response in responses):
            sample = Sample(
                prompt=prompts[at],
                responses=responses,
                task=item.task,
                item=item.doc_id,
                change="gained" if after[place] > before[place] else "lost",
                right=said[-1][at].target,
            )
            samples.append(sample)
    return samples


def changed(
    tasks: Sequence[str], before: Sequence[float], after: Sequence[float], count: int
) -> list[int]:
    """Places of n items answered better, then of those answered worse, at most ``count`` of each.

    Large changes come before small ones, and tasks take turns.
    """
    found = []
    for sign in (1, -1):
        gains = [sign * (now - then) for then, now in zip(before, after, strict=True)]
        by_task = defaultdict(list)
        for place in sorted(range(len(gains)), key=lambda place: -gains[place]):
            if gains[place] > 0:
                by_task[tasks[place]].append(place)
        turns = [place for turn in zip_longest(*by_task.values()) for place in turn]
        found += [place for place in turns if place is not None][:count]
    return found


def read_samples(folder: Path, result: Result) -> list[Sample]:
    """What a run has kept of its winner.

    Raises:
        StudyError: Another version of this program wrote it.
    """
    kept = read_json(folder / FILE, Samples)
    return kept.samples if kept and kept.trial == result.winner.trial else []


def shown(text: str) -> str:
    """Untrusted text, shortened, with its lines; what else is not printable is spelled out."""
    return shortened("\n".join(map(printable, text.split("\n"))), MOST)


def _models(run: Run, result: Result) -> list[_Model]:
    """The base, the donors, and last the winner."""
    recipes = baselines(run.context.space)
    names = {run.spec.base_model: "base"} | short_names(run.spec.models_but_base, "/")
    models = [_Model(name, model, recipes[model]) for model, name in names.items()]
    winner = Recipe.model_validate(result.winner.recipe)
    return [*models, _Model("winner", f"trial {result.winner.trial}", winner)]
