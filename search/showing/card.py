"""The model card of an exported checkpoint: README.md in the Hub's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from merge_engine.models.locating import locate
from merge_engine.recipe.recipe import Recipe
from objectives.base import printable
from search.showing.score_table import OtherTrial, ScoreTable
from search.storing.folder import CARD
from search.storing.result import Result, Score, package_versions
from search.study.public_names import public_names, public_recipe, without_paths
from search.study.spec import StudySpec
from search.wording import UNTUNED, bracketed, percent, shortened

TEMPLATE: Final = Path(__file__).with_name("card.md")
TAGS: Final = ["merge", "mergekit", "mergesearch"]
LICENCE: Final = ("license", "license_name", "license_link")
SCRIPT: Final = re.compile(r"\s*(javascript|vbscript|data):", re.I)  # what no link may be
LONGEST_FRONT: Final = 100_000  # characters of a card that are searched for its licence
LONGEST_LICENCE: Final = 200  # letters of a licence


def model_card(
    name: str,
    spec: StudySpec,
    recipe: Recipe,
    result: Result | None,
    other: OtherTrial | None = None,
) -> str:
    """Write the card of a checkpoint.

    ``other`` is the recipe's trial, where it is not the winner.
    """
    names, models = public_names(spec), recipe.models_read
    test = other.test if other else result.winner.test if result else None
    parts = dict.fromkeys(part for model in models for part in _parts(model))
    found = {_public(part): _licence(part) for part in parts}
    on_hub = [_public(part) for part in parts if not Path(part).is_absolute()]
    data = ModelCardData(
        base_model=on_hub or None,  # a folder may be named like another model on the Hub
        base_model_relation="merge" if on_hub else None,
        library_name="transformers",
        tags=TAGS,
        model_name=name,
        eval_results=_eval_results(test) if test else None,
        **_shared(list(found.values())),
    )
    scores = ScoreTable.of_result(result, other) if result else None
    versions = result.versions if result else package_versions()
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=_cell(name),
        recipe=recipe,
        yaml=public_recipe(recipe, names).to_yaml(),
        folders=any(Path(model).is_absolute() for model in models),
        donors=[_name(source.model) for source in recipe.donors],
        base=_name(recipe.base_model or models[0]),
        result=result,
        other=other,
        lead=result and result.difference_to_best_donor,
        best=scores and result and _cell(scores.best_donor(result.difference_to_best_donor).name),
        table=_table(scores) if scores and test else None,
        untuned=UNTUNED,
        items=spec.objective.items.test,
        licences={_cell(part): _cell(_words(licence)) for part, licence in found.items()},
        seed=result.seed if result else spec.search.seed,
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        percent=percent,
        bracketed=bracketed,
    )
    return without_paths(str(card), names)


def _table(scores: ScoreTable) -> str:
    tasks = [*scores.tasks]
    rows = [["", *tasks, "mean", "winner's lead"], ["---"] * (len(tasks) + 3)]
    for row in scores.rows:
        name = {"donor": f"donor {row.name}", "winner": "**winner**"}.get(row.kind, row.name)
        means = [percent(row.test.tasks[task]) for task in tasks]
        lead = bracketed(row.lead.interval, "+") if row.lead else ""
        rows.append([name, *means, bracketed(row.test.interval), lead])
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _eval_results(test: Score) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type="mean",
            metric_name="mean over the test items",
            metric_value=round(mean, 4),
        )
        for task, mean in test.tasks.items()
    ]


def _parts(model: str) -> list[str]:
    """Split a model's name into the model and its adapters."""
    return [model] if Path(model).is_dir() else model.split("+")


def _public(part: str) -> str:
    """Return a hub id, or the last part of a folder, which does not reveal this machine's paths."""
    return Path(part).name if Path(part).is_absolute() else part.partition("@")[0]


def _name(model: str) -> str:
    return _cell("+".join(map(_public, _parts(model))))


def _cell(text: str) -> str:
    return printable(text).replace("|", r"\|")


def _licence(model: str) -> Mapping[str, str]:
    """Read the licence from a model's own card; empty where it has no readable one."""
    with suppress(Exception):  # whatever is in it must not stop the run
        file = locate(model) / CARD
        if not file.is_file():
            return {}
        with file.open(encoding="utf-8") as opened:
            front = re.match(
                r"\ufeff?---\s*?\n(.*?)\n---\s*?(\n|$)", opened.read(LONGEST_FRONT), re.S
            )
        data = yaml.safe_load(front[1]) if front else {}
        return {
            key: shortened(printable(data[key]), LONGEST_LICENCE)
            for key in LICENCE
            if isinstance(data.get(key), str) and not SCRIPT.match(data[key])
        }
    return {}


def _shared(licences: Sequence[Mapping[str, str]]) -> Mapping[str, Any]:
    """Return the licence that all models share; empty where they differ."""
    first = licences[0]
    return first if "license" in first and all(one == first for one in licences) else {}


def _words(licence: Mapping[str, str]) -> str:
    return " ".join(licence[key] for key in LICENCE if key in licence)
