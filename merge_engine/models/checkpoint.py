"""Checkpoints in safetensors: headers first, then tensor by tensor.

A model is a folder or a hub id (``org/name`` or ``org/name@revision``), found through
huggingface_hub's cache and downloaded if the cache lacks it. ``base+adapter`` is a model with
a LoRA adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from merge_engine.errors import MergeError
from merge_engine.models.fingerprint import fingerprint
from merge_engine.models.lora import Adapter
from merge_engine.models.tensor_names import input_embedding, is_head_weight, layer_position
from merge_engine.numerics.statistics import all_finite

HUB_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken"),
    *("*.tokenizer", "bpe.codes", "README.md"),
    "*.py",  # copied to what is built, and not run
)
INDEX = "model.safetensors.index.json"
_RECOMPUTED = ".rotary_emb.inv_freq"  # buffers that old checkpoints store; no model reads them
DTYPES: Mapping[str, torch.dtype] = {  # by their names in safetensors headers
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
Reader = Callable[[str], Tensor]  # from a name, of a model or of a tensor, to a tensor


def is_hub_id(model: str) -> bool:
    """Return whether a string has the form ``org/name`` or ``org/name@revision``."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model) is not None


def is_local(model: str) -> bool:
    """Return whether a model, or a model and its adapter, can be read without a download."""
    if Path(model).expanduser().is_dir():
        return True
    if "+" in model:
        return all(map(is_local, model.split("+")))
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, local_files_only=True)
    except OSError:
        return False
    return any(Path(folder).glob("*.safetensors"))


def locate(model: str) -> Path:
    """Return the folder of a model; one named by a hub id is downloaded unless it is cached.

    Raises:
        MergeError: There is neither such a folder nor such a model.
    """
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    if folder.is_file():
        raise MergeError(f"model {model!r} is a file; name the folder it is in")
    if not is_hub_id(model):
        raise MergeError(
            f"model {model!r}: no such folder, and not a hub id like org/name; check the path"
        )
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    patterns = list(HUB_FILES)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client raises some twenty kinds, all meaning "not got"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise MergeError(
            f"model {model!r}: no such folder, and not to be had from the hub ({reason}); check "
            "its name and the connection, and log in with `hf auth login` if it is gated or private"
        ) from None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, shape and dtype, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """One model's files. The header of each is read once, tensors every time."""

    def __init__(self, model: str, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder or locate(model)
        self._handles: dict[Path, Any] = {}  # open files

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's ``config.json``."""
        return self._json("config.json")

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The model's ``generation_config.json``; empty if it has none."""
        name = "generation_config.json"
        return self._json(name) if (self.folder / name).is_file() else {}

    def _json(self, name: str) -> Mapping[str, Any]:
        file = self.folder / name
        if not file.is_file():
            raise self._missing(name)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MergeError(f"{file}: damaged or cut short: {error}; fetch it again") from None
        if not isinstance(found, dict):
            raise MergeError(f"{file}: damaged: expected a JSON object; fetch it again")
        return found

    def _missing(self, name: str) -> MergeError:
        """Return the error of a folder that lacks one of a model's files."""
        advice = "fetch it again"
        if (self.folder / "adapter_config.json").is_file():
            advice = f"it is an adapter: name it with its base, as 'BASE+{self.model}'"
        elif any(self.folder.glob("*.bin")):
            advice = "it has only .bin files: convert it to safetensors"
        return MergeError(f"model {self.model!r}: no {name} in {self.folder}; {advice}")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's tensors by name, sorted; a stored copy of a tied head is left out."""
        found: dict[str, TensorInfo] = {}
        for file in self._files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  not a mapping
                part = handle.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise MergeError(
                        f"{file}: {name!r} has the dtype {part.get_dtype()}, which is "
                        "quantised; merge the full-precision model"
                    )
                found[name] = TensorInfo(file, tuple(part.get_shape()), dtype)
        if lost := sorted(name for name in self._index if self._is_own(name) and name not in found):
            raise MergeError(
                f"{self.folder / INDEX}: lists {lost[0]!r}, which {self._index[lost[0]]!r} lacks; "
                "fetch both again"
            )
        return {name: info for name, info in sorted(found.items()) if self._is_own(name)}

    def _is_own(self, name: str) -> bool:
        tied = self.config.get("tie_word_embeddings", False)
        return not name.endswith(_RECOMPUTED) and not (tied and name == "lm_head.weight")

    def name_in(self, name: str) -> str | None:
        """Return the model's own name of a tensor that other models have; None if it lacks it.

        The head of a model with tied embeddings is its embedding.
        """
        if name in self.tensors:
            return name
        return input_embedding(self.tensors) if is_head_weight(name) else None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model's weights; a copy of the files has another fingerprint."""
        return fingerprint(self._files())

    @property
    def content_hash(self) -> str:
        """Identifies the model's weights; a copy of the files has the same hash."""
        return fingerprint(self._files(), dated=False)

    def must_have(self, name: str) -> bool:
        """Return whether the model is incomplete without a tensor.

        It is not without a bias, a head, or a kind of tensor that none of its layers has.
        """
        position = layer_position(name)
        if position is None:
            return name.endswith("weight") and not is_head_weight(name)
        return (position.stack, position.rest) in self._layer_kinds

    @cached_property
    def _layer_kinds(self) -> set[tuple[str, str]]:
        """Stack and name within the layer of every tensor in a layer."""
        positions = (layer_position(name) for name in self.tensors)
        return {(position.stack, position.rest) for position in positions if position}

    def read(self, name: str) -> Tensor:
        """Read a tensor as stored, on the CPU.

        Raises:
            MergeError: The tensor is missing, or its file is damaged.
        """
        try:
            tensor: Tensor = self._open(self.tensors[name].file).get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise MergeError(
                f"model {self.model!r}: cannot read {name!r}: {error}; fetch it again"
            ) from None
        return tensor

    def file_of(self, name: str) -> Path:
        """Return the file that a tensor's values come from."""
        return self.tensors[name].file

    def read_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of what ``read`` returns."""
        return self.tensors[name].dtype

    def release(self) -> None:
        """Close the files: until then what was read of them counts as this process's memory."""
        self._handles.clear()

    def _files(self) -> list[Path]:
        if names := sorted(set(self._index.values())):
            if missing := [name for name in names if not (self.folder / name).is_file()]:
                raise MergeError(
                    f"{self.folder / INDEX}: names {missing[0]!r}, which is missing; fetch it again"
                )
            return [self.folder / name for name in names]
        if (single := self.folder / "model.safetensors").is_file():
            return [single]
        raise self._missing("model.safetensors")

    @cached_property
    def _index(self) -> Mapping[str, str]:
        """File of each tensor of a sharded model; empty if it is in one file."""
        if not (self.folder / INDEX).is_file():
            return {}
        files = self._json(INDEX).get("weight_map")
        if not (files and isinstance(files, dict) and all(type(f) is str for f in files.values())):
            raise MergeError(
                f"{self.folder / INDEX}: its 'weight_map' is no mapping of tensors to "
                "files; fetch it again"
            )
        return files

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise MergeError(f"{file}: damaged or cut short: {error}; fetch it again") from None
        return self._handles[file]


class Adapted(Checkpoint):
    """A model with a LoRA adapter, named ``base+adapter``; no merged copy is stored."""

    def __init__(self, model: str, base: str, adapter: str) -> None:
        super().__init__(model, locate(base))
        self._adapter = Adapter(locate(adapter))
        self._adapter.check({name: info.shape for name, info in self.tensors.items()}, base)

    @cached_property
    @override
    def fingerprint(self) -> str:
        return f"{super().fingerprint}+{fingerprint(self._adapter.files)}"

    @property
    @override
    def content_hash(self) -> str:
        return f"{super().content_hash}+{fingerprint(self._adapter.files, dated=False)}"

    @override
    def read(self, name: str) -> Tensor:
        return self._adapter.apply(name, super().read(name))

    @override
    def file_of(self, name: str) -> Path:
        # NaN in the model's own tensor is not the adapter's fault.
        changed = self._adapter.changes(name) and all_finite(super().read(name))
        return self._adapter.weights if changed else super().file_of(name)

    @override
    def read_dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._adapter.changes(name) else super().read_dtype(name)

    @override
    def release(self) -> None:
        super().release()
        self._adapter.release()


def open_model(model: str) -> Checkpoint:
    """Open a model by its name: a folder, a hub id, or ``base+adapter``."""
    if "+" not in model or Path(model).expanduser().is_dir():
        return Checkpoint(model)
    cuts = [match.start() for match in re.finditer(r"\+", model)]
    cut = next((i for i in cuts if Path(model[:i]).expanduser().is_dir()), cuts[0])
    return Adapted(model, model[:cut], model[cut + 1 :])


def open_models(models: Iterable[str]) -> dict[str, Checkpoint]:
    """Open models by name, in order.

    Raises:
        MergeError: One is missing or damaged, or they are of different architectures.
    """
    checkpoints = {model: open_model(model) for model in models}
    first, *others = checkpoints.values()
    for other in others:
        for key in ("architectures", "model_type"):
            mine, theirs = first.config.get(key), other.config.get(key)
            if mine and theirs and mine != theirs:
                raise MergeError(
                    f"models {first.model!r} and {other.model!r} are of different architectures: "
                    f"{mine} against {theirs}; only models of one can be merged"
                )
    return checkpoints
