"""Check that a resumed run still has the same study, models and items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from merge_engine.errors import first_error
from merge_engine.recipe.recipe import Recipe
from objectives.base import Objective
from objectives.items import Splits
from search.storing.address import Storage
from search.storing.folder import DATABASE, has_run
from search.storing.intact import reading_stored
from search.storing.result import PATHS, RESULT, Result
from search.storing.snapshot import difference, snapshot_items
from search.storing.store import Store
from search.storing.trials import WHERE, TrialLog, TrialRecord
from search.study.spec import StudyError, StudySpec

MAY_CHANGE = ("search.trials", "search.stop")  # they only decide when a search ends


def check_run(folder: Path, spec: StudySpec, storage: Storage) -> None:
    """Refuse a folder with another study's run, before anything slow starts."""
    if (folder / DATABASE).is_file():
        check_same(folder, TrialLog(Store(storage).study()), spec)


def check_same(folder: Path, log: TrialLog, spec: StudySpec) -> None:
    """Refuse a study that differs from the one stored with the run."""
    stored = log.header().get("spec")
    with reading_stored(WHERE):
        changed = _changes(stored, spec.model_dump(mode="json")) if stored else []
    if changed:
        raise StudyError(
            f"{folder} is the run of another study: {'; '.join(changed)}. "
            "Choose another --out, set it back, or start over with --force-new"
        )


def check_models(folder: Path, log: TrialLog, models: Mapping[str, str]) -> None:
    """Store the fingerprint of each model's weights, or refuse to go on with other weights."""
    stored = log.header().get("models", {})
    with reading_stored(WHERE):
        changed = [name for name, now in models.items() if stored.get(name, now) != now]
    if changed:
        raise StudyError(
            f"{folder}: the weights of {', '.join(changed)} have changed since the run "
            "began. Restore them, choose another --out, or start over with --force-new"
        )
    log.set_header(models=dict(models))


def check_items(folder: Path, store: Store, objective: Objective, splits: Splits) -> None:
    """Store the snapshots of the study's items, or refuse to go on with other items."""
    stored, now = store.items(), snapshot_items(objective, splits)
    if not stored:
        store.save_items(now)
    elif what := difference(stored, now, objective):
        raise StudyError(
            f"{folder}: the tasks' items have changed since the run began: {what}. "
            "Restore the task files, or choose another --out"
        )


def stored_spec(folder: Path, url: str | None = None) -> StudySpec:
    """Read the study a run folder belongs to.

    Raises:
        StudyError: There is no run in it, or another version of this program made it.
    """
    if not has_run(folder):
        raise StudyError(f"{folder}: no run here (no {DATABASE}); give the folder of a run")
    header = stored_log(folder, url).header()
    if "spec" not in header:
        raise StudyError(f"{folder}: the run was stopped before it began; run it again")
    try:
        return StudySpec.model_validate(header["spec"])
    except ValidationError as error:
        raise StudyError(
            f"{folder}: another version of mergesearch made this run ({first_error(error)}); "
            "use that version, or begin another run"
        ) from None


def stored_log(folder: Path, url: str | None = None) -> TrialLog:
    """Read the trials of a run folder's study, which has begun."""
    return TrialLog(Store(Storage.of(folder, url), begun=True).study())


def check_result(folder: Path, result: Result, trials: Iterable[TrialRecord]) -> None:
    """Refuse a result whose winner is not the recipe of its trial: it is another run's."""
    recipes = {trial.number: trial.recipe for trial in trials}
    winner = result.winner
    if recipes.get(winner.trial) != Recipe.model_validate(winner.recipe).key:
        raise StudyError(
            f"{folder / RESULT}: its winner is not trial {winner.trial} of this run; run the study "
            f"again to rewrite it and {PATHS}"
        )


def find_trial(folder: Path, log: TrialLog, number: int) -> TrialRecord:
    """Find a finished trial by its number."""
    trials = {trial.number: trial for trial in log.finished()}
    if number not in trials:
        raise StudyError(
            f"{folder} has no finished trial {number}; it has {len(trials)}, from 0 on"
        )
    return trials[number]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Describe how two studies differ, except in when the search ends."""
    found = []
    for name in sorted({*old, *new}):
        mine, theirs = new.get(name), old.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += _changes(theirs, mine, f"{where}{name}.")
        elif mine != theirs and f"{where}{name}" not in MAY_CHANGE:
            found.append(f"{where}{name} was {theirs!r} and is {mine!r}")
    return found
