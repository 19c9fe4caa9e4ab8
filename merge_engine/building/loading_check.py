"""Check that transformers finds all of a model's tensors in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from merge_engine.building.live_tensors import missing_tensors
from merge_engine.errors import MergeError
from merge_engine.models.architecture import load_config, make_without_weights
from merge_engine.models.checkpoint import Checkpoint


def why_incomplete(folder: Path) -> str | None:
    """Return which tensors a model loaded from a folder would have random values for.

    None: none, or its class is not known here, or is code of its own, which is not run.
    """
    try:
        model = make_without_weights(load_config(folder), torch.float32)
    except Exception:  # each config and model class raises its own
        return None
    stored = Checkpoint(str(folder)).tensors
    try:
        missing = missing_tensors(model, {name: info.shape for name, info in stored.items()})
    except MergeError as error:
        return str(error)
    if not missing:
        return None
    return (
        f"a {type(model).__name__} needs {missing[0]!r}, one of {len(missing)} tensors that are "
        f"not in it; it has {next(iter(stored), None)!r}, one of {len(stored)}"
    )
