"""Responses of a run's models to the same prompts, for reading side by side.

The prompts are the user's own, or test items that the winner gained or lost against the best
donor. Scores of test items are the stored ones; responses are generated again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import Final, NamedTuple

from merge_engine.recipe.recipe import Recipe
from objectives.base import Response
from objectives.entries import PromptEntry
from search.proposing.starts import baselines
from search.running.evaluator import Evaluated, recipe_and_template, under_own_templates
from search.running.run import Run
from search.storing.result import Result
from search.storing.samples import ModelResponse, Sample
from search.wording import OWN_TEMPLATE, short_names

ITEMS: Final = 6  # gained, and as many lost, sampled at the end of a run


class _Model(NamedTuple):
    """A model that responds: its name in tables, its folder or id, and what is evaluated."""

    name: str
    model: str
    recipe: Evaluated

    def respond(self, run: Run, to: Sequence[int] | PromptEntry) -> list[Response]:
        """Generate responses to items or prompts."""
        recipe, donor = recipe_and_template(self.recipe)
        responses: list[Response] = run.workers.call("respond", recipe, to, donor)
        return responses


def of_prompts(run: Run, result: Result, prompts: PromptEntry) -> list[Sample]:
    """Generate the responses of base, donors and winner to prompts, templates applied."""
    models = _models(run, result)
    responses = [one.respond(run, prompts) for one in models]
    return [
        Sample(
            prompt=of_prompt[0].prompt or "",
            responses=[
                ModelResponse(name=one.name, model=one.model, text=response.text)
                for one, response in zip(models, of_prompt, strict=True)
            ],
        )
        for of_prompt in zip(*responses, strict=True)
    ]


def of_items(run: Run, result: Result, count: int) -> list[Sample]:
    """Generate responses to test items gained and lost, at most ``count`` of each.

    Items to which no model responds in text are left out.
    """
    models, best = _models(run, result), result.difference_to_best_donor.donor
    values = [one.values for one in run.scores.evaluate([one.recipe for one in models], "test")]
    before, after = values[[one.model for one in models].index(best)], values[-1]
    indices = changed(run.context.tasks_of("test"), before, after, count)
    if not indices:
        return []
    numbers = [run.context.splits.test[index] for index in indices]
    prompts = [each.prompt for each in run.context.objective.snapshots(numbers)]
    responses = [one.respond(run, numbers) for one in models]
    samples = []
    for row, index in enumerate(indices):
        item = run.context.objective.items[numbers[row]]
        of_item = [
            ModelResponse(name=one.name, model=one.model, text=texts[row].text, value=scores[index])
            for one, texts, scores in zip(models, responses, values, strict=True)
        ]
        if any(response.text is not None for response in of_item):
            sample = Sample(
                prompt=prompts[row],
                responses=of_item,
                task=item.task,
                item=item.doc_id,
                change="gained" if after[index] > before[index] else "lost",
                right=responses[-1][row].target,
            )
            samples.append(sample)
    return samples


def changed(
    tasks: Sequence[str], before: Sequence[float], after: Sequence[float], count: int
) -> list[int]:
    """Choose indices of n items whose score rose, then of those where it fell.

    At most ``count`` of each; large changes first, in turn from each task.
    """
    found = []
    for sign in (1, -1):
        gains = [sign * (now - then) for then, now in zip(before, after, strict=True)]
        by_task = defaultdict(list)
        for index in sorted(range(len(gains)), key=lambda index: -gains[index]):
            if gains[index] > 0:
                by_task[tasks[index]].append(index)
        in_turn = [index for some in zip_longest(*by_task.values()) for index in some]
        found += [index for index in in_turn if index is not None][:count]
    return found


def _models(run: Run, result: Result) -> list[_Model]:
    recipes = baselines(run.context.space)
    names = {run.spec.base_model: "base"} | short_names(run.spec.models_but_base, "/")
    models = [_Model(name, model, recipes[model]) for model, name in names.items()]
    best, own = result.difference_to_best_donor, under_own_templates(run.context)
    if best.own_template and best.donor in own:
        at = [one.model for one in models].index(best.donor)
        models[at] = _Model(f"{models[at].name} {OWN_TEMPLATE}", best.donor, own[best.donor])
    winner = Recipe.model_validate(result.winner.recipe)
    return [*models, _Model("winner", f"trial {result.winner.trial}", winner)]
