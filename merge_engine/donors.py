"""Where tensors live: a model's checkpoint in safetensors, read tensor by tensor.

A model is a folder or a hub id (``org/name`` or ``org/name@revision``), found through
huggingface_hub's cache and downloaded if the cache lacks it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_engine.recipe import RecipeError
from merge_engine.statistics import Magnitudes
from merge_engine.stream import Stream, compiling_pays

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_RECOMPUTED = ".rotary_emb.inv_freq"  # buffers that old checkpoints store; no model reads them
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def locate(model: str) -> Path:
    """The folder of a model, from the hub's cache or the hub itself if it is an id.

    Raises:
        RecipeError: There is neither such a folder nor such a model.
    """
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        raise RecipeError(f"model {model!r}: no such folder, and not a hub id like org/name")
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES))
        )
    except Exception as error:  # the hub client raises some twenty kinds, all meaning "not got"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise RecipeError(
            f"model {model!r}: no such folder, and not to be had from the hub ({reason})"
        ) from None


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lives and what it looks like, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """One model's tensors on disk: headers are read at once, tensors when asked for."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.folder = locate(model)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's ``config.json``."""
        try:
            return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RecipeError(f"model {self.model!r}: config.json: {error}") from None

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that make up the model, by name; an untied copy of a tied head left out."""
        found: dict[str, TensorInfo] = {}
        for file in self._files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  not a mapping
                part = handle.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise RecipeError(
                        f"{file}: {name!r} has the dtype {part.get_dtype()}, which is "
                        "quantised; merge the full-precision model"
                    )
                found[name] = TensorInfo(file, tuple(part.get_shape()), dtype)
        tied = self.config.get("tie_word_embeddings", False)
        return {
            name: info
            for name, info in sorted(found.items())
            if not name.endswith(_RECOMPUTED) and not (tied and name == "lm_head.weight")
        }

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU.

        Raises:
            RecipeError: It is not there or its bytes are not.
        """
        try:
            tensor: Tensor = self._open(self.tensors[name].file).get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise RecipeError(f"model {self.model!r}: cannot read {name!r}: {error}") from None
        return tensor

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            if missing := [name for name in names if not (self.folder / name).is_file()]:
                raise RecipeError(
                    f"{index}: names {missing[0]!r}, which is missing; fetch it again"
                )
            return [self.folder / name for name in names]
        if (single := self.folder / "model.safetensors").is_file():
            return [single]
        has_pickles = any(self.folder.glob("*.bin"))
        raise RecipeError(
            f"model {self.model!r}: no model.safetensors in {self.folder}"
            + ("; it has only .bin files: convert it to safetensors" if has_pickles else "")
        )

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise RecipeError(f"{file}: damaged or cut short: {error}") from None
        return self._handles[file]

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}


class Family:
    """Checkpoints of one shape, and what depends on them alone.

    The first model is the reference: it says which tensors there are.
    """

    def __init__(self, models: Iterable[str], compiled: bool | None = None) -> None:
        """Open the models and compare their tensors' names and shapes with the first one's.

        Args:
            models: Folders or hub ids, the reference first.
            compiled: Whether to compile kernels; None: if that pays for models of this size.

        Raises:
            RecipeError: A model is missing or damaged, or is not of the reference's shape.
        """
        self.checkpoints = {model: Checkpoint(model) for model in models}
        self.reference = next(iter(self.checkpoints.values()))
        for checkpoint in self.checkpoints.values():
            _check_same_shape(self.reference, checkpoint)
        self.stream = Stream(compiling_pays(self.parameters) if compiled is None else compiled)
        self._grams: dict[tuple[object, ...], Tensor] = {}
        self._magnitudes: dict[tuple[str, str, str], Magnitudes] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of every member."""
        return tuple(self.reference.tensors)

    @cached_property
    def layer_filters(self) -> tuple[str, ...]:
        """For each layer the piece of its tensors' names that no other layer's have."""
        found = {
            int(m[1]): m[0].strip(".") + "." for name in self.names if (m := _LAYER.search(name))
        }
        return tuple(found.get(layer, "") for layer in range(max(found, default=-1) + 1))

    def depth(self, name: str) -> float:
        """Where a tensor stands: 0 first layer or outside the layers, 1 last or only layer."""
        if (layer := layer_of(name)) is None:
            return 0.0
        last = len(self.layer_filters) - 1
        return layer / last if last > 0 else 1.0

    @property
    def parameters(self) -> int:
        """How many numbers a member has."""
        return sum(math.prod(info.shape) for info in self.reference.tensors.values())

    def read(self, model: str, name: str) -> Tensor:
        """A member's tensor as stored, on the CPU."""
        return self.checkpoints[model].read(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """What the members' dtypes of one tensor promote to."""
        dtypes = [checkpoint.tensors[name].dtype for checkpoint in self.checkpoints.values()]
        result = dtypes[0]
        for dtype in dtypes[1:]:
            result = torch.promote_types(result, dtype)
        return result

    def gram(
        self, name: str, models: tuple[str, ...], origin: str | None, dim: int | None = None
    ) -> Tensor:
        """Inner products of the models' tensors, less ``origin``'s if given.

        They depend on the members alone, so each is computed once.

        Returns:
            (n, n) over all elements; with ``dim`` (rows, n, n), each over that dimension alone,
            the rows in the tensor's order with ``dim`` and the last dimension swapped. float64.
        """
        if (key := (name, models, origin, dim)) not in self._grams:
            tensors = [self.read(model, name) for model in models]
            start = self.read(origin, name) if origin else torch.zeros_like(tensors[0])
            gram = _gram([_rows(tensor, dim) for tensor in tensors], _rows(start, dim))
            self._grams[key] = gram if dim is not None else gram.sum(0)
        return self._grams[key]

    def magnitudes(self, name: str, donor: str, base: str) -> Magnitudes:
        """Order statistics of a donor's task vector; sorted once, on first use."""
        if (key := (name, donor, base)) not in self._magnitudes:
            delta = self.read(donor, name).float() - self.read(base, name).float()
            self._magnitudes[key] = Magnitudes.of(delta)
        return self._magnitudes[key]


def layer_of(name: str) -> int | None:
    """The layer a tensor's name says it belongs to; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _rows(tensor: Tensor, dim: int | None) -> Tensor:
    """The tensor as rows along ``dim``, or as one row: (rows, width)."""
    if dim is None or not tensor.dim():
        return tensor.reshape(1, -1)
    return tensor.transpose(dim, -1).reshape(-1, tensor.shape[dim])


def _gram(tensors: list[Tensor], start: Tensor, chunk: int = 1 << 20) -> Tensor:
    """Inner products row by row, (rows, n, n), in float64 and in pieces that fit the cache."""
    rows, width = start.shape
    total = torch.zeros(rows, len(tensors), len(tensors), dtype=torch.float64)
    for column in range(0, width, chunk):
        step = max(1, chunk // width)
        for row in range(0, rows, step):
            part = (slice(row, row + step), slice(column, column + chunk))
            block = (
                torch.stack([t[part].double() for t in tensors], 1) - start[part].double()[:, None]
            )
            total[part[0]] += block @ block.mT
    return total


def _check_same_shape(reference: Checkpoint, other: Checkpoint) -> None:
    pair = f"models {reference.model!r} and {other.model!r}"
    mine, theirs = reference.tensors, other.tensors
    if missing := sorted(set(mine) ^ set(theirs)):
        owner = reference if missing[0] in mine else other
        raise RecipeError(
            f"{pair} are of different architectures: only {owner.model!r} has {missing[0]!r}"
            + (f" and {len(missing) - 1} more tensors differ" if missing[1:] else "")
        )
    for name in mine:
        if mine[name].shape != theirs[name].shape:
            raise RecipeError(
                f"{pair} differ in the shape of {name!r}: {list(mine[name].shape)} against "
                f"{list(theirs[name].shape)}; merge models fine-tuned from one base"
            )
