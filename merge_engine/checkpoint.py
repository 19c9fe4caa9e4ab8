"""A checkpoint on disk that anyone can load: weights, config, tokenizer, recipe.

It is written under another name and renamed when whole, so a folder that exists is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_engine.donors import Checkpoint
from merge_engine.recipe import Recipe, RecipeError

SHARD_BYTES = 5_000_000_000
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]],
    out: Path,
    *,
    like: Checkpoint,
    recipe: Recipe,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder, a shard at a time.

    Args:
        tensors: Names and values, in the dtype they are to have; read once, in order.
        out: The folder to make.
        like: The model whose config, tokenizer and generation config it gets.
        recipe: Stored beside it as ``mergekit_config.yml``.
        config: Another config than ``like``'s.
        shard_bytes: No file gets larger than this, unless by a single tensor.

    Raises:
        RecipeError: ``out`` exists.
    """
    if out.exists():
        raise RecipeError(f"{out} exists; choose another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = _write_weights(tensors, partial, shard_bytes)
    except BaseException:
        shutil.rmtree(partial)
        raise
    contents = dict(config or like.config) | {"dtype": str(dtype).removeprefix("torch.")}
    contents.pop("torch_dtype", None)  # the older name of the same key
    (partial / "config.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    for pattern in COPIED:
        for file in like.folder.glob(pattern):
            shutil.copyfile(file, partial / file.name)
    (partial / "mergekit_config.yml").write_text(recipe.to_yaml(), encoding="utf-8")
    partial.rename(out)


def _write_weights(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int
) -> torch.dtype:
    """Save the tensors, in one file or in shards with an index; returns the floats' dtype."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    dtype, total = torch.float32, 0

    def flush() -> None:
        shards.append(list(pending))
        save_file(pending, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.detach().cpu().contiguous()
        total += tensor.nbytes
        if tensor.dtype.is_floating_point:
            dtype = tensor.dtype
    flush()
    if len(shards) == 1:
        (folder / "1.safetensors").rename(folder / "model.safetensors")
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
    return dtype
