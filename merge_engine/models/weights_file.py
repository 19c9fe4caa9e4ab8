"""Open weight files, safetensors or pickled by PyTorch, to be read tensor by tensor."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from merge_engine.errors import MergeError, reading
from merge_engine.plain_files import is_there

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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LFS = b"version https://git-lfs"  # start of a Git LFS pointer


def open_weights(file: Path) -> Any:
    """Open a file to be read with ``keys``, ``get_slice`` and ``get_tensor``, as of ``safe_open``.

    Raises:
        MergeError: It is missing or damaged, or a pickle of more than tensors by name.
    """
    if not is_there(file):
        raise MergeError(f"{file}: missing; fetch it again")
    if _is_pointer(file):
        raise MergeError(
            f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder, or "
            "fetch it with `hf download`"
        )
    if file.suffix != ".safetensors":
        return PickledFile(file)
    with reading(f"{file}: damaged or cut short"):
        return safe_open(file, framework="pt", device="cpu")


class OpenFiles:
    """Open weight files, memory-mapped; a file that has become shorter is not read.

    Reading a mapped page beyond a file's end would end the process.
    """

    def __init__(self) -> None:
        self._opened: dict[Path, tuple[Any, int]] = {}  # with the size when it was opened

    def open(self, file: Path) -> Any:
        """Return a file opened by ``open_weights``, at the first call only.

        Raises:
            MergeError: It cannot be opened, or was cut short or removed since then.
        """
        if file not in self._opened:
            self._opened[file] = open_weights(file), file.stat().st_size
        opened, size = self._opened[file]
        if not file.is_file() or file.stat().st_size < size:
            raise MergeError(
                f"{file}: was cut short or removed while it was read; restore it, and repeat the "
                "command"
            )
        return opened

    def close(self) -> None:
        """Close all files: until then, their mapped pages count as this process's memory."""
        self._opened.clear()


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:  # reported when it is opened
        return False


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: str  # as in safetensors headers, or torch's name where those have none

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the name of the dtype."""
        return self.dtype


class PickledFile:
    """A ``.bin`` file of ``torch.save``, with the methods of an open safetensors file.

    A zip file, which PyTorch has written since 1.6, is mapped; an older one is read whole. Only
    tensors and plain containers are unpickled: no code in the file is run.

    Raises:
        MergeError: It is damaged, or holds something else than tensors by name.
    """

    def __init__(self, file: Path) -> None:
        self._tensors = _tensors_in(file, _load(file))

    def keys(self) -> Iterable[str]:
        """Return the names of the tensors."""
        return self._tensors.keys()

    def get_slice(self, name: str) -> Header:
        """Return a tensor's shape and dtype without reading it."""
        tensor = self._tensors[name]
        text = str(tensor.dtype).removeprefix("torch.")
        return Header(tuple(tensor.shape), _NAMES.get(tensor.dtype, text))

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, contiguous; KeyError if there is none of that name."""
        return self._tensors[name].detach().contiguous()


def read_rows(opened: Any, name: str, rows: Sequence[int]) -> Tensor:
    """Read some rows of a tensor of an open file: (rows, *)."""
    part = opened.get_slice(name)
    if isinstance(part, Header):  # the file is in memory, or mapped
        tensor: Tensor = opened.get_tensor(name)
        return tensor[[*rows]]
    return torch.cat([part[row : row + 1] for row in rows])


def _load(file: Path) -> object:
    try:
        return torch.load(
            os.fspath(file), map_location="cpu", weights_only=True, mmap=can_be_mapped(file)
        )
    except Exception as error:  # whatever a damaged pickle makes PyTorch stumble over
        text = str(error)
        if wanted := re.search(r"GLOBAL (\w+(?:\.\w+)+)\s", text):
            raise MergeError(
                f"{file}: asks to run {wanted[1]!r}, which is not a tensor; nothing of it was run: "
                "use the model's safetensors, or save its state_dict() alone"
            ) from None
        cause = re.search(r"WeightsUnpickler error:\s*(.+)", text)
        reason = (cause[1] if cause else text or repr(error)).strip().splitlines()[0]
        raise MergeError(
            f"{file}: damaged, cut short or not of torch.save: {reason[:200]}; fetch it again"
        ) from None


def can_be_mapped(file: Path) -> bool:
    """Return whether it is a safetensors file, or a zip file whose records are not compressed."""
    if file.suffix == ".safetensors":
        return True
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())


def _tensors_in(file: Path, found: object) -> Mapping[str, Tensor]:
    """Return what was unpickled, which has to be plain tensors by name."""
    if not isinstance(found, Mapping):
        raise MergeError(
            f"{file}: holds a {type(found).__name__}, not tensors by name; save the model's "
            "state_dict()"
        )
    for name, value in found.items():
        if isinstance(value, Mapping):
            raise MergeError(
                f"{file}: {name!r} in it is a mapping of its own, as in a trainer's checkpoint; "
                f"save the model's tensors alone, as torch.save(checkpoint[{name!r}], ...)"
            )
        if not isinstance(name, str) or type(value) not in (Tensor, torch.nn.Parameter):
            raise MergeError(
                f"{file}: {name!r} in it is a {type(value).__name__}, not a tensor; save the "
                "model's state_dict() alone"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise MergeError(
                f"{file}: {name!r} is {value.layout} on {value.device.type}, not a dense tensor "
                "with values; save the model again"
            )
    return found
