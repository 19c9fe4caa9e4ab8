"""Checkpoints as transformers models and tokenizers, on the hardware that a run may use.

transformers takes seconds to import, so each function that needs it imports it: what is wrong with
a study is found before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merge_engine.building.builder import Builder
from merge_engine.errors import MergeError
from merge_engine.models.architecture import auto_class, load_config, make_without_weights
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_set import ModelSet
from merge_engine.models.vocabulary import load_tokenizer
from merge_engine.numerics.kernel_runner import configure_compiler
from merge_engine.recipe.recipe_file import load_recipe
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Hardware:
    """The device and memory that one worker may use."""

    device: str  # of the live model; "auto": spread over all GPUs
    memory: int | None = None  # limit in bytes; None: what is free
    compiled: bool = True  # kernels may be compiled, where that pays
    sharers: int = 1  # number of workers that share the host's memory

    @property
    def builds_on(self) -> torch.device:
        """Device on which candidates are merged and the donors' statistics computed."""
        return torch.device("cuda" if self.device == "auto" else self.device)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name such as "bfloat16"."""
    return getattr(torch, name)  # type: ignore[no-any-return]


def model_dtype(checkpoint: Checkpoint) -> str:
    """Return the name of the dtype that most of a checkpoint's numbers have."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + torch.Size(info.shape).numel()
    return max(sizes, key=lambda name: sizes[name])


def study_dtype(spec: StudySpec, reference: Checkpoint) -> str:
    """Return the name of the dtype in which a study's candidates are evaluated and exported."""
    return spec.dtype or model_dtype(reference)


def load_model(spec: StudySpec, checkpoint: Checkpoint, dtype: str, device: str) -> PreTrainedModel:
    """Load a checkpoint as a live model in evaluation mode.

    Raises:
        StudyError: transformers cannot use it, or it needs ``trust_remote_code``.
    """
    trusted = spec.trust_remote_code
    with _explained(checkpoint):
        auto = auto_class(load_config(checkpoint.folder, trust_remote_code=trusted))
        model: PreTrainedModel = auto.from_pretrained(
            checkpoint.folder,
            dtype=torch_dtype(dtype),
            device_map=device,
            trust_remote_code=trusted,
        )
    model.eval()
    return model


def load_without_weights(spec: StudySpec, checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """Make a checkpoint's model on the meta device, which holds no numbers.

    Raises:
        StudyError: transformers cannot use it, or it needs ``trust_remote_code``.
    """
    trusted = spec.trust_remote_code
    with _explained(checkpoint):
        config = load_config(checkpoint.folder, trust_remote_code=trusted)
        return make_without_weights(config, torch_dtype(dtype), trust_remote_code=trusted)


def load_study_tokenizer(spec: StudySpec, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer as the study allows."""
    with _explained(checkpoint):
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            checkpoint, trust_remote_code=spec.trust_remote_code
        )
    return tokenizer


def open_model_set(models: Sequence[str], candidates: int = 1) -> ModelSet:
    """Open models of which candidates are built, compiling kernels if that pays.

    Raises:
        MergeError: A model cannot be used, or is not of the others' shape.
    """
    model_set = ModelSet.open(models, candidates)
    if model_set.runner.compiled:
        configure_compiler()
    return model_set


def load_scored(spec: StudySpec, model: str, device: str) -> tuple[PreTrainedModel, Checkpoint]:
    """Load a checkpoint, hub id or recipe file as a live model in the study's dtype.

    Returns:
        The model, and the study's base, whose tokenizer every model is scored with.

    Raises:
        MergeError, StudyError: It cannot be loaded or built.
    """
    base = Checkpoint(spec.base_model)
    dtype = study_dtype(spec, base)
    if not model.endswith((".yaml", ".yml")):
        return load_model(spec, Checkpoint(model), dtype, device), base
    recipe, _ = load_recipe(Path(model))
    models = open_model_set(recipe.models_read)
    live = load_model(spec, models.reference, dtype, device)
    Builder(live, models).build(recipe)
    return live, base


@contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn transformers' complaints about a checkpoint into one sentence that says what to do."""
    try:
        yield
    except MergeError:
        raise
    except (ImportError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise StudyError(
                f"model {checkpoint.model!r} brings Python code of its own; read it, and if you "
                "trust it, set trust_remote_code: true in the study"
            ) from error
        reason = " ".join(str(error).split()).split(". ")[0]
        raise StudyError(
            f"{checkpoint.folder}: transformers cannot use it: {reason}; correct its "
            "config.json, or update transformers"
        ) from error
