"""The model card of an exported checkpoint: README.md in the Hub's format, and its upload."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import locate
from merge_engine.recipe.recipe import Recipe
from objectives.base import printable
from search.storing.folder import CARD, Interrupted
from search.storing.result import OtherTrial, Result, Score, ScoreTable, package_versions
from search.study.spec import StudyError, StudySpec
from search.wording import bracketed, percent

TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ["merge", "mergekit", "mergesearch"]
BUSY = (408, 429)  # what a server says that would do it later
LICENCE = ("license", "license_name", "license_link")


def model_card(
    name: str,
    spec: StudySpec,
    recipe: Recipe,
    result: Result | None,
    other: OtherTrial | None = None,
) -> str:
    """The card of a checkpoint, as text.

    Args:
        name: Of the model.
        spec: The study's.
        recipe: The checkpoint's.
        result: The run's, if it has one.
        other: The recipe's trial, if it is not the winner.
    """
    models = recipe.models_read
    test = other.test if other else result.winner.test if result else None
    parts = dict.fromkeys(part for model in models for part in _parts(model))
    found = {_public(part): _licence(part) for part in parts}
    on_hub = [_public(part) for part in parts if not Path(part).is_absolute()]
    data = ModelCardData(
        base_model=on_hub or None,  # a folder's name might be that of somebody's model there
        base_model_relation="merge" if on_hub else None,
        library_name="transformers",
        tags=TAGS,
        model_name=name,
        eval_results=_eval_results(test) if test else None,
        **_shared(list(found.values())),
    )
    scores = ScoreTable.of_result(result, other) if result else None
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=_cell(name),
        recipe=recipe,
        yaml=recipe.to_yaml(),
        folders=any(Path(model).is_absolute() for model in models),
        donors=[_name(source.model) for source in recipe.donors],
        base=_name(recipe.base_model or models[0]),
        result=result,
        other=other,
        lead=result and result.difference_to_best_donor,
        best=scores and result and _cell(scores.donor_name(result.difference_to_best_donor.donor)),
        table=_table(scores) if scores and test else None,
        items=spec.objective.items.test,
        licences={_cell(part): _cell(_words(licence)) for part, licence in found.items()},
        seed=result.seed if result else spec.search.seed,
        versions=", ".join(
            f"{package} {version}"
            for package, version in (result.versions if result else package_versions()).items()
        ),
        percent=percent,
        bracketed=bracketed,
    )
    return str(card)


def _table(scores: ScoreTable) -> str:
    """Format test scores as a Markdown table."""
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
    """A model, and its adapter if it has one."""
    return [model] if Path(model).is_dir() else model.split("+")


def _public(part: str) -> str:
    """A hub id; of a folder its name alone, which tells no path of the machine."""
    return Path(part).name if Path(part).is_absolute() else part.partition("@")[0]


def _name(model: str) -> str:
    return _cell("+".join(map(_public, _parts(model))))


def _cell(text: str) -> str:
    """Text that breaks no line and no cell of a table."""
    return printable(text).replace("|", r"\|")


def _licence(model: str) -> Mapping[str, str]:
    """What a model's own card says of its licence; nothing if it has none that can be read."""
    try:
        data = ModelCard.load(locate(model) / CARD, ignore_metadata_errors=True).data.to_dict()
    except (MergeError, OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in LICENCE if isinstance(data.get(key), str)}


def _shared(licences: Sequence[Mapping[str, str]]) -> Mapping[str, Any]:
    """The licence of all, if there is one."""
    first = licences[0]
    return first if "license" in first and all(one == first for one in licences) else {}


def _words(licence: Mapping[str, str]) -> str:
    return " ".join(licence[key] for key in LICENCE if key in licence)


def push(checkpoint: Path, recipe: Path, repo: str, *, private: bool) -> str:
    """Upload a checkpoint with its card, and the recipe, in one commit; returns the address.

    Args:
        checkpoint: Its folder.
        recipe: The recipe's file.
        repo: Its id on the Hub, made if there is none.
        private: Whether a repository that is made is seen by its owners alone.

    Raises:
        StudyError: It is no id, there is no token, or the Hub refuses.
        Interrupted: The Hub cannot be reached, or fails.
    """
    api = HfApi()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise StudyError(f"{repo}: {error}; write it like org/name") from None
    if get_token() is None:
        raise StudyError(
            "there is no token of the Hub; log in with `hf auth login`, or set HF_TOKEN"
        )
    files = [file for file in checkpoint.iterdir() if file.is_file() and file.suffix != ".partial"]
    additions = [CommitOperationAdd(file.name, file) for file in [*files, recipe]]
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.create_commit(
            url.repo_id, additions, commit_message="Upload a merge found by mergesearch"
        )
    except HfHubHTTPError as error:
        if error.response.status_code >= 500 or error.response.status_code in BUSY:
            raise Interrupted(f"{api.endpoint} fails: {_first_line(error)}") from None
        raise StudyError(
            f"{api.endpoint} refuses {repo}: {_first_line(error)}; log in with `hf auth login`, "
            "with a token that may write there"
        ) from None
    except json.JSONDecodeError as error:
        raise Interrupted(f"{api.endpoint} gives no answer to be read: {error}") from None
    except ValueError as error:  # the id or the card, before anything is sent
        raise StudyError(f"{repo}: {' '.join(str(error).split())}") from None
    except Exception as error:  # whatever the client's transport calls it
        raise Interrupted(f"{api.endpoint} cannot be reached: {_first_line(error)}") from None
    return str(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
