"""Write tensors to safetensors files one by one, in any order.

Each goes to its offset in files whose headers are written first, so memory holds one of them,
whatever the model's size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.models.weights_file import DTYPES

SHARD_BYTES = 5_000_000_000  # of a file's tensors at most, as in mergekit
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Tensor],
    folder: Path,
    shard_bytes: int,
) -> None:
    """Write tensors into one file, or into shards with an index."""
    offsets = begin_weights(shapes, folder, shard_bytes)
    for name, tensor in tensors:
        path, offset = offsets.pop(name)
        with path.open("r+b") as opened:
            opened.seek(offset)
            opened.write(_bytes(tensor, like=shapes[name]))
    assert not offsets, f"{next(iter(offsets))} is in shapes and not in tensors"


def begin_weights(
    shapes: Mapping[str, Tensor], folder: Path, shard_bytes: int
) -> dict[str, tuple[Path, int]]:
    """Write files of the right size without values, and an index if there are several.

    ``shapes`` are tensors of the right shapes and dtypes. Returns each tensor's file and offset.
    """
    shards = _shards(shapes, shard_bytes)
    count = len(shards)
    files = [
        "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        for number in range(1, count + 1)
    ]
    offsets: dict[str, tuple[Path, int]] = {}
    for file, names in zip(files, shards, strict=True):
        offsets |= _write_header(folder / file, {name: shapes[name] for name in names})
    if count > 1:
        weight_map = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        total = sum(tensor.nbytes for tensor in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(index, folder / "model.safetensors.index.json")
    return offsets


def _shards(shapes: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in shapes.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_header(file: Path, shapes: Mapping[str, Tensor]) -> dict[str, tuple[Path, int]]:
    """Begin a safetensors file; return each tensor's offset in it.

    The format: the header's length in 8 bytes, the header in JSON, the tensors without gaps. Dtypes
    of more bytes come first, so that each tensor starts at a multiple of its element size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(shapes, key=lambda name: -shapes[name].element_size()):
        tensor, start = shapes[name], offset
        offset += tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, offset],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, begin + offset)
    return {name: (file, begin + header[name]["data_offsets"][0]) for name in shapes}


def _bytes(tensor: Tensor, like: Tensor) -> memoryview:
    assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_json(contents: Mapping[str, Any], file: Path) -> None:
    """Write a file of JSON as transformers does."""
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
