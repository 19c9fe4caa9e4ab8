"""Open models by their names: folders, hub ids, or ``base+adapter``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from merge_engine.errors import MergeError
from merge_engine.models.alignment import is_multimodal, text_type
from merge_engine.models.checkpoint import Adapted, Checkpoint
from merge_engine.models.size_check import check_layers
from merge_engine.schema import find_folder


def open_model(model: str) -> Checkpoint:
    """Open a model by its name: a folder, a hub id, or ``base+adapter``."""
    if "+" not in model or find_folder(model):
        return Checkpoint(model)
    cuts = [match.start() for match in re.finditer(r"\+", model)]
    cut = next((i for i in cuts if find_folder(model[:i])), cuts[0])
    return Adapted(model, model[:cut], model[cut + 1 :])


def open_models(models: Iterable[str]) -> dict[str, Checkpoint]:
    """Open models by name, in order.

    Raises:
        MergeError: One is missing, damaged or incomplete, or they are of different architectures.
    """
    checkpoints = {model: open_model(model) for model in models}
    first, *others = checkpoints.values()
    for other in others:
        for mine, theirs in zip(_kind(first, other), _kind(other, first), strict=True):
            if mine and theirs and str(mine).lower() != str(theirs).lower():
                raise MergeError(
                    f"models {first.model!r} and {other.model!r} are of different architectures: "
                    f"{mine} against {theirs}; only models of one can be merged"
                )
    for checkpoint in checkpoints.values():
        check_layers(checkpoint)
    return checkpoints


def _kind(checkpoint: Checkpoint, other: Checkpoint) -> tuple[object, ...]:
    """Return what two models must have in common; with a text-only one, only the text type."""
    config = checkpoint.config
    if is_multimodal(config) != is_multimodal(other.config):
        return (text_type(config),)
    return config.get("architectures"), config.get("model_type")
