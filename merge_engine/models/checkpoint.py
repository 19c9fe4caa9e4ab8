"""Checkpoints: headers first, then tensor by tensor.

A model is a folder or a hub id (``org/name`` or ``org/name@revision``). ``base+adapter`` is a model
with a LoRA adapter.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from merge_engine.errors import MergeError, reading
from merge_engine.models.adapter_fit import AdapterBase, fit
from merge_engine.models.architecture import load_config
from merge_engine.models.fingerprint import KnownFiles
from merge_engine.models.locating import files_there, locate
from merge_engine.models.lora import Adapter
from merge_engine.models.model_folder import (
    WEIGHTS,
    Weights,
    check_settings,
    find_weights,
    read_json,
    way_out,
)
from merge_engine.models.quantised import find_quantised
from merge_engine.models.tensor_names import input_embedding, is_head_weight, layer_position
from merge_engine.models.weights_file import DTYPES, OpenFiles, can_be_mapped, read_rows
from merge_engine.numerics.statistics import all_finite

# Buffers that old checkpoints store; no model reads them. Masks of attention have a bias's name.
_RECOMPUTED = re.compile(
    r"\.(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias|embeddings\.position_ids)$"
)
_MASK = re.compile(r"\.(attn|attention)\.bias$")
_WITH_MASKS = ("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "codegen", "imagegpt")
_ROWS = 64  # of a head that are compared with the embedding's
# Limits above what any model has, and below what breaks libraries.
_NAME_LENGTH, _LAYER, _ELEMENTS = 1000, 10_000, 1 << 48
# Modules that torch.compile, FSDP and activation checkpointing wrap around a model's own.
_WRAPPERS = re.compile(r"(?:^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Prefixes of all names of models that were wrapped: by DDP, DeepSpeed, Lightning, peft.
_PREFIXES = ("module.", "_forward_module.", "base_model.model.")
Reader = Callable[[str], Tensor]  # from a name, of a model or of a tensor, to a tensor


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, shape and dtype, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """One model's files. Headers are read once, tensors whenever they are asked for."""

    def __init__(self, model: str, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder or locate(model)
        check_settings(self.folder)
        self._opened = OpenFiles()

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the model's tokenizer, if it has one."""
        return self.folder

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's ``config.json``."""
        config = self._json("config.json")
        for key, kind, wanted in (
            ("text_config", dict, "mapping"),
            ("architectures", list, "list of names"),
        ):
            if not isinstance(config.get(key), kind | None):
                raise MergeError(
                    f"{self.folder / 'config.json'}: its {key} is not a {wanted}; fetch it again"
                )
        return config

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The model's ``generation_config.json``; empty if it has none."""
        name = "generation_config.json"
        return self._json(name) if (self.folder / name).is_file() else {}

    def _json(self, name: str) -> Mapping[str, Any]:
        if not (self.folder / name).is_file():
            raise self._missing(name)
        return read_json(self.folder / name)

    def _missing(self, name: str) -> MergeError:
        """Return the error of a folder that lacks one of a model's files."""
        advice = "fetch it again"
        if find_weights(self.folder) is None:
            advice = way_out(files_there(self.model, self.folder), self.model, self.folder)
        return MergeError(f"model {self.model!r}: no {name} in {self.folder}; {advice}")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's tensors by name, sorted; a stored copy of a tied head is left out."""
        found: dict[str, TensorInfo] = {}
        for name, (file, part) in self._headers().items():
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise MergeError(
                    f"{file}: {name!r} has the dtype {part.get_dtype()}, which cannot be merged; "
                    "save the model in float32, bfloat16 or float16"
                )
            found[name] = TensorInfo(file, _shape(file, name, part), dtype)
        listed = self._weights.file_of
        if lost := sorted(name for name in listed if self._is_own(name) and name not in found):
            raise MergeError(
                f"{self._weights.index}: lists {lost[0]!r}, which {listed[lost[0]]!r} lacks; "
                "fetch both again"
            )
        own = {
            name: info
            for name, info in sorted(found.items())
            if self._is_own(name) or (is_head_weight(name) and not self._is_embedding(name, found))
        }
        self.release()  # a file that cannot be mapped is in memory as long as it is open
        return own

    def _headers(self) -> dict[str, tuple[Path, Any]]:
        """Return each stored tensor's file and header; refuse what is not a model's own weights."""
        found: dict[str, tuple[Path, Any]] = {}
        for file in self._weights.files:
            handle = self._opened.open(file)
            own = {name: (file, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118
            if twice := sorted(found.keys() & own.keys()):
                raise MergeError(
                    f"{file}: has {twice[0]!r}, which {found[twice[0]][0].name} has as well; fetch "
                    "both again"
                )
            found |= own
        dtypes = {name: part.get_dtype() for name, (_, part) in found.items()}
        if quantised := find_quantised(dtypes, self.config):
            raise MergeError(
                f"model {self.model!r} is quantised ({quantised.kind}: it has "
                f"{quantised.tensor!r}); merge the full-precision model it was made from, or "
                f"{quantised.advice}"
            )
        wrappers = [f"{match[1]}." for name in found if (match := _WRAPPERS.search(name))]
        wrappers += [each for each in _PREFIXES if all(name.startswith(each) for name in found)]
        if found and wrappers:
            raise MergeError(
                f"model {self.model!r}: the names of its tensors have {wrappers[0]!r} in them, of "
                "a wrapper in training; save the model inside it (unwrap_model in accelerate, "
                "merge_and_unload in peft)"
            )
        return found

    def _is_own(self, name: str) -> bool:
        masked = _MASK.search(name) and self.config.get("model_type") in _WITH_MASKS
        recomputed = masked or _RECOMPUTED.search(name)
        return not recomputed and not (is_head_weight(name) and self._is_tied)

    def _is_embedding(self, head: str, found: Mapping[str, TensorInfo]) -> bool:
        """Return whether a stored head is a copy of the embedding, comparing some of its rows.

        transformers does not tie a different one, whatever the config says.
        """
        embedding = input_embedding(found)
        if embedding is None or found[embedding].shape != found[head].shape:
            return False
        last = found[head].shape[0] - 1
        rows = (
            sorted({last * number // (_ROWS - 1) for number in range(_ROWS)}) if last > 0 else [0]
        )
        mine, its = (
            read_rows(self._opened.open(found[n].file), n, rows) for n in (head, embedding)
        )
        return torch.equal(mine, its)

    @cached_property
    def _is_tied(self) -> bool:
        """Whether the head is the embedding, as config.json says, or else transformers' default."""
        said = self.config.get("tie_word_embeddings")
        if said is None:
            with contextlib.suppress(Exception):  # a config class raises its own
                said = getattr(load_config(self.folder), "tie_word_embeddings", False)
        return bool(said)

    def name_in(self, name: str) -> str | None:
        """Return the model's own name of a tensor; None if it lacks it.

        The head of a model with tied embeddings is its embedding.
        """
        if name in self.tensors:
            return name
        return input_embedding(self.tensors) if is_head_weight(name) else None

    @property
    def fingerprint(self) -> str:
        """Identifies the model's weights; a copy of the files has the same fingerprint."""
        return self._known_files.fingerprint

    def has_changed(self) -> bool:
        """Return whether the weights have changed since the fingerprint was first computed."""
        return self._known_files.have_changed()

    @cached_property
    def _known_files(self) -> KnownFiles:
        return KnownFiles(self._weights.files)

    def must_have(self, name: str) -> bool:
        """Return whether the model is incomplete without a tensor.

        Biases, the head, and kinds of tensors that none of its layers has are optional.
        """
        position = layer_position(name)
        if position is None:
            return name.endswith("weight") and not is_head_weight(name)
        return (position.stack, position.rest) in self.layer_kinds

    @cached_property
    def layer_kinds(self) -> set[tuple[str, str]]:
        """Stack and name within the layer of every tensor in a layer."""
        positions = (layer_position(name) for name in self.tensors)
        return {(position.stack, position.rest) for position in positions if position}

    def read(self, name: str) -> Tensor:
        """Read a tensor as stored, on the CPU.

        Raises:
            MergeError: The tensor is missing, or its file is damaged.
        """
        with reading(f"model {self.model!r}: cannot read {name!r}"):
            tensor: Tensor = self._opened.open(self.tensors[name].file).get_tensor(name)
        return tensor

    def file_of(self, name: str) -> Path:
        """Return the file that a tensor's values come from."""
        return self.tensors[name].file

    def read_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of what ``read`` returns."""
        return self.tensors[name].dtype

    def release(self) -> None:
        """Close the files: their mapped pages count as this process's memory until then."""
        self._opened.close()

    @property
    def unmapped(self) -> int:
        """Bytes of files that cannot be mapped: each is read whole when a tensor of it is."""
        return sum(f.stat().st_size for f in self._weights.files if not can_be_mapped(f))

    @cached_property
    def _weights(self) -> Weights:
        found = find_weights(self.folder)
        if found is None:
            raise self._missing(" or ".join(WEIGHTS))
        return found


class Adapted(Checkpoint):
    """A model with a LoRA adapter, named ``base+adapter``; no merged copy is stored."""

    def __init__(self, model: str, base: str, adapter: str) -> None:
        super().__init__(model, locate(base))
        self._base = Checkpoint(base, self.folder)
        self._adapter = Adapter(locate(adapter))
        shapes = {name: info.shape for name, info in self._base.tensors.items()}
        self._fitted = fit(
            self._adapter,
            AdapterBase(base, self.folder, self._base.config.get("model_type"), shapes),
        )

    @cached_property
    @override
    def tensors(self) -> Mapping[str, TensorInfo]:
        found = dict(self._base.tensors)
        for name, shape in self._fitted.shapes.items():
            found[name] = replace(self._base.tensors[self._base_name(name)], shape=shape)
        return dict(sorted(found.items()))

    @cached_property
    @override
    def config(self) -> Mapping[str, Any]:
        config = dict(self._base.config)
        if self._fitted.untied_head:
            config["tie_word_embeddings"] = False
        name = input_embedding(self._fitted.shapes)
        if name is None or self.tensors[name].shape == self._base.tensors[name].shape:
            return config
        return with_rows(config, self.tensors[name].shape[0])

    @cached_property
    @override
    def tokenizer_folder(self) -> Path:
        name = input_embedding(self.tensors)
        rows = self.tensors[name].shape[0] if name else 0
        return self._adapter.tokenizer(rows) or self._base.tokenizer_folder

    @cached_property
    @override
    def _known_files(self) -> KnownFiles:
        return KnownFiles([*self._base._weights.files, *self._adapter.files])

    def _base_name(self, name: str) -> str:
        """Return the base's tensor that one of the model's is made of."""
        return self._base.name_in(name) or name

    @override
    def read(self, name: str) -> Tensor:
        tensor = self._base.read(self._base_name(name))
        change = self._fitted.changes.get(name)
        return self._adapter.apply(change, tensor) if change else tensor

    @override
    def file_of(self, name: str) -> Path:
        # If the base's own tensor has NaN, the error should name the base.
        own = self._base_name(name)
        changed = name in self._fitted.changes and all_finite(self._base.read(own))
        return self._adapter.weights if changed else self._base.file_of(own)

    @override
    def read_dtype(self, name: str) -> torch.dtype:
        changed = name in self._fitted.changes
        return torch.float32 if changed else self._base.read_dtype(name)

    @override
    def release(self) -> None:
        self._base.release()
        self._adapter.release()


def _shape(file: Path, name: str, header: Any) -> tuple[int, ...]:
    """Return a tensor's shape; refuse a name or sizes that no model has."""
    shape = tuple(header.get_shape())
    position = layer_position(name) if len(name) <= _NAME_LENGTH else None
    size = math.prod(max(n, 1) for n in shape)
    named = 0 < len(name) <= _NAME_LENGTH and (position is None or position.layer <= _LAYER)
    if not named or size >= _ELEMENTS:
        raise MergeError(
            f"{file}: has a tensor {name[:50]!r} of shape {[*shape][:8]}, as no model has; fetch "
            "it again"
        )
    return shape


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a model's config with another number of rows in embedding and head."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and "vocab_size" in inner:
        return {**config, "text_config": with_rows(inner, rows)}
    return {**config, "vocab_size": rows}
