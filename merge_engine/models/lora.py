"""LoRA adapters as peft saves them, applied to a base's tensor when it is read.

A module's weight becomes ``W + scale * B @ A``; with DoRA ``m * (W + scale * B @ A)``, divided by
its norms. Weights, or some of their rows, may also be stored whole.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import MergeError, reading
from merge_engine.models.adapter_config import read_adapter_config
from merge_engine.models.model_folder import check_settings, find_adapter, read_json
from merge_engine.models.quantised import FLOATS
from merge_engine.models.weights_file import OpenFiles

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save)(?=\.)")
_ADAPTER_NAME = re.compile(  # "default" if there is one; peft leaves it out
    r"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.default(?=\.|$)"
)
_LORA = re.compile(r"(.*)\.(lora_\w+?|trainable_tokens_delta)(\.(?:weight|bias))?")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken")


@dataclass(frozen=True)
class LowRank:
    """A product of matrices that is added to a weight."""

    down: str  # key of A in the adapter's file; (rank, in), of an embedding (rank, rows)
    up: str  # key of B; (out, rank), of an embedding (columns, rank)
    scale: float  # unitless factor of the product
    transposed: bool  # the product changes the weight's transpose, as for an embedding
    magnitude: str | None = None  # key of DoRA's norms, one for each row of the product

    def add_to(self, weight: Tensor, down: Tensor, up: Tensor, norms: Tensor | None) -> Tensor:
        """Return the changed weight; all are float32."""
        product = up @ down
        result = weight.add(product.T if self.transposed else product, alpha=self.scale)
        if norms is not None:
            dim = 0 if self.transposed else 1
            factor = norms.flatten() / torch.linalg.vector_norm(result, dim=dim)
            result *= factor.unsqueeze(dim)
        return result


@dataclass(frozen=True)
class Change:
    """An adapter's change of one tensor. The steps are applied in the order of the fields."""

    base: str | None = None  # key of a tensor that replaces the base's, which was resized
    saved: str | None = None  # key of a tensor that was trained in full
    low_rank: LowRank | None = None  # what is added to it
    bias: tuple[str, float] | None = None  # key of a tensor that is added to it, and its factor
    rows: tuple[str, tuple[int, ...]] | None = None  # key of rows that replace it, and which


class Adapter:
    """A LoRA adapter and its changes of the base's tensors.

    Attributes:
        weights: The file with the adapter's tensors.
        files: All files that the changes depend on.
        shapes: Of the adapter's own tensors, by key.
        changes: Changes of the base's tensors, by their names in training.

    Raises:
        MergeError: It is damaged, or of a kind that cannot be computed here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_settings(folder)
        if not (folder / "adapter_config.json").is_file():
            raise MergeError(
                f"{folder}: no adapter: it has no adapter_config.json; what follows the '+' has to "
                "be a LoRA adapter's folder or id"
            )
        self.weights = find_adapter(folder)
        self.files = (folder / "adapter_config.json", self.weights)
        self._opened = OpenFiles()
        self.config = read_adapter_config(self.files[0])
        file = self._opened.open(self.weights)
        parts = {key: file.get_slice(key) for key in sorted(file.keys())}
        if not parts:
            raise MergeError(f"{self.weights}: has no tensors; fetch it again")
        if odd := [key for key, part in parts.items() if part.get_dtype() not in FLOATS]:
            raise self._damaged(odd[0], f"is of {parts[odd[0]].get_dtype()}, not of floats")
        self.shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
        self.changes: dict[str, Change] = {}
        self._add_all()

    def _add_all(self) -> None:
        """Record what each of the adapter's tensors changes."""
        parts: dict[str, dict[str, str]] = defaultdict(dict)  # keys of modules' parts, by module
        for key in self.shapes:
            name = _ADAPTER_NAME.sub(r".\1", key.removeprefix(_PREFIX))
            if match := _LORA.fullmatch(name):
                part = match[2] + (".bias" if match[3] == ".bias" else "")
                parts[_own_name(match[1])][part] = key
            else:
                self._add_whole(name, key)
        for module, keys in parts.items():
            self._add_parts(module, keys)

    def tokenizer(self, rows: int) -> Path | None:
        """Return the adapter's folder if it has a tokenizer whose tokens all have a row."""
        if not any(any(self.folder.glob(pattern)) for pattern in _TOKENIZER):
            return None
        return self.folder if _last_added_token(self.folder) < rows else None

    def apply(self, change: Change, weight: Tensor) -> Tensor:
        """Apply a change to a tensor of the base, in float32."""
        if key := change.saved or change.base:
            weight = self._read(key)
        weight = weight.float()
        if low := change.low_rank:
            norms = self._read(low.magnitude) if low.magnitude else None
            weight = low.add_to(weight, self._read(low.down), self._read(low.up), norms)
        if change.bias:
            weight = weight.add(self._read(change.bias[0]), alpha=change.bias[1])
        if change.rows:
            key, numbers = change.rows
            weight = weight.index_copy(0, torch.tensor(numbers), self._read(key))
        return weight

    def release(self) -> None:
        """Close the file."""
        self._opened.close()

    def _read(self, key: str) -> Tensor:
        tensor: Tensor = self._opened.open(self.weights).get_tensor(key)
        return tensor.float()

    def _change(self, name: str, **parts: Any) -> None:
        self.changes[name] = replace(self.changes.get(name, Change()), **parts)

    def _add_whole(self, name: str, key: str) -> None:
        """Record a tensor of the base that is stored whole."""
        own = _own_name(name)
        module = own.rpartition(".")[0]
        if ".modules_to_save." in name or (own == name and self.config.saves(module)):
            self._change(own, saved=key)
        else:
            self._change(own, base=key)

    def _add_parts(self, module: str, keys: dict[str, str]) -> None:
        """Record the change of a module that is stored in parts: matrices, norms, rows, a bias."""
        weight = f"{module}.weight"
        if rows := keys.pop("trainable_tokens_delta", None):
            self._change(weight, rows=(rows, self.config.token_rows(module)))
        if not keys:
            return
        embedding = "_embedding" if "lora_embedding_A" in keys else ""
        down, up = (keys.pop(f"lora{embedding}_{side}", None) for side in "AB")
        if down is None or up is None:
            raise self._damaged(next(iter([down, up, *keys.values()])), "is not one of a pair")
        rank = self._rank(down, up)
        with reading(f"{self.files[0]}: alpha_pattern or rank_pattern", "write simpler ones"):
            scale = self.config.scale(module, rank)
            wanted = self.config.rank(module)
        if wanted not in (None, rank):
            raise self._damaged(down, f"has the rank {rank}, and adapter_config.json says {wanted}")
        magnitude = keys.pop("lora_magnitude_vector", None)
        if self.config.use_dora != (magnitude is not None):
            raise self._damaged(down, f"does not go with use_dora: {self.config.use_dora}")
        self._change(weight, low_rank=LowRank(down, up, scale, bool(embedding), magnitude))
        if bias := keys.pop("lora_B.bias", None):
            self._change(f"{module}.bias", bias=(bias, scale))
        for key in keys.values():
            raise self._damaged(key, "is not a known part of LoRA")

    def _rank(self, down: str, up: str) -> int:
        """Return the rank of a pair of matrices."""
        first, second = self.shapes[down], self.shapes[up]
        if (len(first), len(second)) != (2, 2):
            raise self._damaged(down, f"and its B have shapes {[*first]} and {[*second]}")
        if first[0] != second[1]:
            raise self._damaged(down, f"and its B have ranks {first[0]} and {second[1]}")
        if not first[0]:
            raise self._damaged(down, "has the rank 0")
        return int(first[0])

    def _damaged(self, key: str | None, what: str) -> MergeError:
        return MergeError(f"{self.weights}: {key!r} {what}; fetch it again")


def _own_name(name: str) -> str:
    """Return a module's own name, without the wrappers that peft puts around it."""
    return _WRAPPERS.sub("", f"{name}.").removesuffix(".")


def _last_added_token(folder: Path) -> int:
    """Return the largest number of the tokens that were added to a tokenizer; -1: unknown."""
    for name in ("tokenizer.json", "added_tokens.json"):
        if (file := folder / name).is_file():
            with reading(f"{file}: damaged"):
                found = read_json(file)
                added = (
                    [token["id"] for token in found["added_tokens"]]
                    if name == "tokenizer.json"
                    else found.values()
                )
                return max(map(int, added), default=-1)
    return -1
