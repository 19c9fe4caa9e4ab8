"""Write a checkpoint that any library can load: weights, config, tokenizer, recipe.

It is written under another name and renamed when complete, so a folder that exists is complete;
its checksums tell whether it still is. Only files with known names are copied from the reference,
and links that leave its folder are refused, because a checkpoint may be published.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.building.checksums import write_checksums
from merge_engine.building.weights_writer import (
    SHARD_BYTES,
    begin_weights,
    write_json,
    write_weights,
)
from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_folder import read_json
from merge_engine.models.vocabulary import Vocabulary
from merge_engine.recipe.recipe import Recipe
from merge_engine.replacing import new_folder

RECIPE = "mergekit_config.yml"  # in a checkpoint, as mergekit calls it
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*vocab*", "*.model", "*.spm", "*.tiktoken", "*.tokenizer", "tekken.json", "merges.txt"),
    *("bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "normalizer.json", "word_*.json"),
    "additional_chat_templates/*.jinja",
)
# Files of image, sound and video processors, which the result's tokenizer does not replace.
PROCESSOR_FILES = ("*processor_config.json", "audio_tokenizer*")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint besides the weights."""

    # The model whose config, generation config and tokenizer files are copied.
    reference: Checkpoint
    recipe: Recipe  # stored as RECIPE
    config: Mapping[str, Any] | None = None  # used instead of the reference's
    generation_config: Mapping[str, Any] | None = None  # used instead of the reference's
    tokenizer: Any = None  # used instead of the reference's
    text: str | None = None  # stored instead of the recipe's YAML: that of several stages

    @classmethod
    def of(
        cls,
        reference: Checkpoint,
        recipe: Recipe,
        vocabulary: Vocabulary | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> CheckpointFiles:
        """Return the files of a result with this vocabulary; None: with the reference's."""
        if vocabulary is None:
            return cls(reference, recipe, config, None, tokenizer)
        return cls(
            reference,
            recipe,
            vocabulary.resize(config or reference.config),
            vocabulary.renumber(reference.generation_config) or None,
            tokenizer or vocabulary.tokenizer,
        )


def files_to_copy(
    reference: Checkpoint, config: Mapping[str, Any], *, tokenizer: bool = True
) -> list[tuple[Path, Path]]:
    """List the files of a reference that its results need, and their paths in a checkpoint.

    ``config`` is the result's; its tokenizer is the reference's, or else one of its own.

    Raises:
        MergeError: One is a link that leads out of the reference's folder.
    """
    found = [
        *_matching(reference.tokenizer_folder, TOKENIZER_FILES if tokenizer else ()),
        *_matching(reference.folder, [*PROCESSOR_FILES, "generation_config.json"]),
    ]
    configs = [read_json(file) for file, _ in found if file.name.endswith("config.json")]
    if any("auto_map" in each for each in (config, *configs)):  # to classes of the model's own
        found += _matching(reference.folder, ["*.py"])
    return found


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]],
    out: Path,
    *,
    shapes: Mapping[str, Tensor],
    files: CheckpointFiles,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder, tensor by tensor.

    Args:
        tensors: Names and values, in the dtype to write; iterated once, in any order.
        out: The folder to make.
        shapes: Tensors of the same shapes and dtypes, for instance on the meta device.
        files: The other files.
        shard_bytes: Limit of a file's tensors, unless a single one takes more.

    Raises:
        MergeError: ``out`` exists, cannot be made, or another process is writing it.
        OSError: Writing failed, for instance on a full disk; ``out`` does not exist then.
    """
    _files_to_copy(files)  # raises before anything is written
    with new_folder(out) as partial:
        write_weights(tensors, shapes, partial, shard_bytes)
        _write_others(files, shapes, partial)
        write_checksums(partial)


def write_outline(out: Path, shapes: Mapping[str, Tensor], files: CheckpointFiles) -> None:
    """Write a model folder without values: enough to plan with, and a sparse file on disk."""
    out.mkdir(parents=True)
    begin_weights(shapes, out, SHARD_BYTES)
    _write_others(files, shapes, out)


def _write_others(files: CheckpointFiles, shapes: Mapping[str, Tensor], folder: Path) -> None:
    reference = files.reference
    floats = (each.dtype for each in shapes.values() if each.dtype.is_floating_point)
    dtype = str(next(floats, torch.float32)).removeprefix("torch.")
    config = dict(files.config or reference.config) | {"dtype": dtype}
    for key in ("torch_dtype", "quantization_config"):  # dtype's older name; of other weights
        config.pop(key, None)
    write_json(config, folder / "config.json")
    if files.generation_config is not None:
        write_json(files.generation_config, folder / "generation_config.json")
    if files.tokenizer is not None:
        files.tokenizer.save_pretrained(folder)
    for source, name in _files_to_copy(files):
        target = folder / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    (folder / RECIPE).write_text(files.text or files.recipe.to_yaml(), encoding="utf-8")


def _files_to_copy(files: CheckpointFiles) -> list[tuple[Path, Path]]:
    config = files.config or files.reference.config
    return files_to_copy(files.reference, config, tokenizer=files.tokenizer is None)


def _matching(folder: Path, patterns: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """Yield a model's files that match a pattern, and their paths in its folder.

    Raises:
        MergeError: One is a link to a file of another folder.
    """
    own = folder.resolve()
    if own.parent.name == "snapshots":  # of the hub's cache, whose files are links to blobs
        own = own.parent.parent
    for file in (file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        if not file.resolve().is_relative_to(own):
            raise MergeError(
                f"{file} is a link to {file.resolve()}, outside of the model's folder, and would "
                "be copied into the checkpoint; put the file itself there, or remove the link"
            )
        yield file, file.relative_to(folder)
