"""Plan and build the stages of a file: recipes that may use one another's results."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from merge_engine.building.export import RECIPE, write_checkpoint, write_outline
from merge_engine.building.merging import built_tensors
from merge_engine.building.plan import Plan, plan_merge
from merge_engine.errors import MergeError
from merge_engine.numerics.kernel_runner import configure_compiler
from merge_engine.recipe.stages import Stage


@contextmanager
def planned(stages: Sequence[Stage]) -> Iterator[list[Plan]]:
    """Plan every stage before any is built; used results are outlines without values.

    Raises:
        MergeError: A stage cannot be built; the message says which.
    """
    with tempfile.TemporaryDirectory() as name:
        plans = []
        for stage in stages:
            plans.append(plan := _plan(stage, Path(name)))
            if stage is not stages[-1]:
                with _errors_of(stage):
                    write_outline(Path(name, stage.name), plan.shapes(), plan.files)
        yield plans


def build_stage(
    stage: Stage,
    folder: Path,
    out: Path,
    device: torch.device,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Build one stage into ``out``; the results that it uses are in ``folder``.

    ``say`` receives notes on models that do not fit one another.

    Returns:
        The number of its tensors.

    Raises:
        MergeError: It cannot be built; the message says which stage it is.
    """
    plan = _plan(stage, folder)
    if any(part.model_set.runner.compiled for part in plan.parts):
        configure_compiler()
    with _errors_of(stage):
        for note in plan.notes():
            say(note)
        tensors = built_tensors(plan, device)
        write_checkpoint(tensors, out, shapes=plan.shapes(), files=plan.files)
    return len(plan.names)


def is_built(stage: Stage, out: Path) -> bool:
    """Return whether ``out`` has a stage's result.

    Raises:
        MergeError: It has something else.
    """
    if not out.exists():
        return False
    file = out / RECIPE
    if not file.is_file() or file.read_text(encoding="utf-8") != stage.text:
        raise MergeError(
            f"{stage.where}: {out} exists and was built from something else; remove it, or choose "
            "another folder"
        )
    return True


def _plan(stage: Stage, folder: Path) -> Plan:
    with _errors_of(stage):
        plan = plan_merge(stage.placed(folder))
    return replace(plan, files=replace(plan.files, text=stage.text))


@contextmanager
def _errors_of(stage: Stage) -> Iterator[None]:
    """Prefix errors with the stage's file and document."""
    try:
        yield
    except MergeError as error:
        if stage.where in str(error):
            raise
        raise MergeError(f"{stage.where}: {error}") from error
