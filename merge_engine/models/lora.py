"""LoRA adapters as peft saves them: ``W + scale * B @ A``, computed when a tensor is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_engine.errors import MergeError
from merge_engine.models.model_folder import find_adapter
from merge_engine.models.weights_file import open_weights

_PREFIX = "base_model.model."
# Settings that change the formula, and the values with which it is the one above.
_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class Update:
    """A low-rank change of one weight."""

    down: str  # key of A in the adapter's file; (rank, in), of an embedding (rank, rows)
    up: str  # key of B; (out, rank), of an embedding (columns, rank)
    scale: float  # unitless factor of the product
    transposed: bool  # the product changes the weight's transpose, as for an embedding


class Adapter:
    """A LoRA adapter: which tensors of its base it changes, and how.

    Attributes:
        weights: The file with the matrices A and B.
        files: All that the changes depend on.
        shapes: Of the adapter's own tensors, by key.
        updates: Low-rank changes, by the name of the base's tensor.
        replaced: Keys of tensors that replace the base's, by the name of the base's tensor.

    Raises:
        MergeError: It is damaged, or not a plain LoRA adapter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = find_adapter(folder)
        self.files = (folder / "adapter_config.json", self.weights)
        self._handle: Any = None  # the open file
        self._config = self._read_config()
        file = self._open()
        self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        self.updates: dict[str, Update] = {}
        self.replaced: dict[str, str] = {}
        for key in self.shapes:
            self._add(key)

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: str) -> None:
        """Refuse changes of tensors that the base lacks or has in another shape."""
        for name, mine in self._changed():
            if mine != shapes.get(name):
                found = (
                    f"{name!r} of shape {list(mine)}, which in {base!r} has {list(shapes[name])}"
                    if name in shapes
                    else f"{name!r}, which is not in {base!r}"
                )
                raise MergeError(
                    f"adapter {self.folder}: changes {found}; it was trained on "
                    f"{self._config.get('base_model_name_or_path')!r}; name that one before the '+'"
                )

    def changes(self, name: str) -> bool:
        """Return whether the adapter changes a tensor of its base."""
        return name in self.updates or name in self.replaced

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """Return the base's tensor with the adapter's change: float32 if there is one."""
        if name in self.replaced:
            weight = self._open().get_tensor(self.replaced[name]).float()
        if name not in self.updates:
            return weight
        update = self.updates[name]
        down, up = (self._open().get_tensor(key).float() for key in (update.down, update.up))
        product = up @ down
        return weight.float().add(product.T if update.transposed else product, alpha=update.scale)

    def release(self) -> None:
        """Close the file."""
        self._handle = None

    def _read_config(self) -> dict[str, Any]:
        file, _ = self.files
        try:
            config = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise MergeError(f"{file}: {error}; expected a LoRA adapter as peft saves it") from None
        for key, supported in _SUPPORTED.items():
            if key in config and config[key] not in supported:
                raise MergeError(
                    f"{file}: {key} is {config[key]!r}, which cannot be added to a base here; "
                    "merge the adapter with peft (merge_and_unload) and name the result"
                )
        return config

    def _open(self) -> Any:
        if self._handle is None:
            self._handle = open_weights(self.weights)
        return self._handle

    def _add(self, key: str) -> None:
        """Record which tensor of the base a tensor of the adapter changes, and how."""
        name = key.removeprefix(_PREFIX)
        if match := re.fullmatch(r"(.*)\.lora_(embedding_)?A(?:\.weight)?", name):
            module, embedding = match[1], bool(match[2])
            up = key.replace(".lora_embedding_A", ".lora_embedding_B").replace(
                ".lora_A.", ".lora_B."
            )
            if up not in self.shapes or len(self.shapes[key]) != 2:
                raise MergeError(
                    f"{self.weights}: {key!r} is not one of a pair of matrices; fetch it again"
                )
            ranks = self.shapes[key][0], self.shapes[up][-1]
            if ranks[0] != ranks[1] or len(self.shapes[up]) != 2:
                raise MergeError(
                    f"{self.weights}: {key!r} and its B have ranks {ranks[0]} and {ranks[1]}; "
                    "fetch it again"
                )
            scale = self._scale(module, self.shapes[key][0])
            self.updates[f"{module}.weight"] = Update(key, up, scale, embedding)
        elif not re.search(r"\.lora_(embedding_)?B(\.weight)?$", name):
            self.replaced[name.replace(".base_layer.", ".")] = key

    def _scale(self, module: str, rank: int) -> float:
        patterns = self._config.get("alpha_pattern") or {}
        alphas = [a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module)]
        alpha = float(alphas[0] if alphas else self._config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _changed(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the base's tensors that are changed, with their shapes in training."""
        yield from ((name, self.shapes[key]) for name, key in self.replaced.items())
        for name, update in self.updates.items():
            shape = (self.shapes[update.up][0], self.shapes[update.down][1])
            yield name, shape[::-1] if update.transposed else shape
