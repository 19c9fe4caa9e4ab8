"""Find the weight files in a model's folder, or say what it has instead."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from merge_engine.errors import MergeError, reading
from merge_engine.plain_files import is_there

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in transformers' order of preference
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that would silently be left out if something else had their names.
_SETTINGS = (
    *("config.json", "generation_config.json", "adapter_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
_JSON_BYTES = 1 << 29  # at most; the largest vocabularies have tens of megabytes
_NAME = 200  # characters of a name in a message
_LISTED = 10_000  # files of a folder that are looked at to say what it holds
_FULL = "name the model in transformers' format that"
_OTHERS = (  # what may be there instead of weights, by its path, and the way out
    (r"adapter_config\.json", "it is an adapter: name it with its base, as 'BASE+{model}'"),
    (
        r"snapshots/([^/]+)/.*",
        "it is a model's folder in the hub's cache: name {folder}/snapshots/{part}",
    ),
    (r"(checkpoint-\d+)/.*", "it holds a training's checkpoints: name {folder}/{part}"),
    (
        r"(.+)/(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)",
        "it is not a model's folder, and holds one: name {folder}/{part}",
    ),
    (
        r"adapter_model\.(safetensors|bin)",
        "it holds {path} without the adapter_config.json of such a file: fetch that, too",
    ),
    (
        r".*\.(incomplete|part|crdownload|aria2)",
        "it holds {path}, of a download that has not ended: fetch it again",
    ),
    (
        r".*\.(zip|tar|tgz|gz|bz2|xz|zst|7z|rar)",
        "it holds {path}: unpack that, and name the folder with the model",
    ),
    (r".*\.gguf", f"it holds {{path}}, which is in the GGUF format: {_FULL} it was made from"),
    (
        r"(.*/)?consolidated[^/]*\.(pth|pt|safetensors)",
        f"it holds {{path}}, in its authors' own format: {_FULL} they publish beside it",
    ),
    (
        r"zero_to_fp32\.py|(.*/)?[^/]*optim_states\.pt",
        "it holds {path}, of a DeepSpeed ZeRO checkpoint: run zero_to_fp32.py there",
    ),
    (
        r"(.*/)?[^/]*\.distcp|pytorch_model_fsdp[^/]*",
        "it holds {path}, of an FSDP checkpoint: join it with `accelerate merge-weights`",
    ),
    (
        r"tf_model[^/]*\.h5|flax_model[^/]*\.msgpack|.*\.ckpt\.index",
        "it holds {path}, of another framework: save it from PyTorch",
    ),
    (
        r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)",
        "it holds {path} without the index of such files: fetch that, too",
    ),
    (
        r"[^/]*\.(safetensors|bin|pth|pt|ckpt|onnx|npz)",
        "it holds {path}, which is not a weight file's name: save the model with save_pretrained",
    ),
)


@dataclass(frozen=True)
class Weights:
    """The files with a model's weights."""

    files: tuple[Path, ...]
    index: Path | None = None  # of a model in several files
    file_of: Mapping[str, str] = field(default_factory=dict)  # by tensor, of such a model


def check_settings(folder: Path) -> None:
    """Refuse the folder of a model or an adapter whose settings files are not regular files.

    Raises:
        MergeError: One is a folder, a pipe or a link to nothing.
    """
    for name in _SETTINGS:
        is_there(folder / name)


def find_weights(folder: Path) -> Weights | None:
    """Return the files that transformers would load; None if there are none.

    Safetensors come before ``.bin``, and one file before an index, which may be of an earlier save.

    Raises:
        MergeError: An index is damaged, or a file that it names is missing or not a regular file.
    """
    for name in WEIGHTS:
        if is_there(single := folder / name):
            return Weights((single,))
        if is_there(index := folder / f"{name}.index.json"):
            return _indexed(index)
    return None


def _indexed(index: Path) -> Weights:
    files = read_json(index).get("weight_map")
    if not (files and isinstance(files, dict) and all(type(f) is str for f in files.values())):
        raise MergeError(
            f"{index}: its 'weight_map' is not a mapping of tensors to files; fetch it again"
        )
    names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise MergeError(
            f"{index}: names {outside[0]!r}, which is outside its folder; fetch it again"
        )
    kind = Path(index.name.removesuffix(".index.json")).suffix
    if others := [name for name in names if Path(name).suffix != kind]:
        raise MergeError(
            f"{index}: names {others[0][:_NAME]!r}, which is not a {kind} file; fetch it again"
        )
    if missing := [name for name in names if not is_there(index.parent / name)]:
        raise MergeError(f"{index}: names {missing[0][:_NAME]!r}, which is missing; fetch it again")
    return Weights(tuple(index.parent / name for name in names), index, files)


def find_adapter(folder: Path) -> Path:
    """Return the file with an adapter's weights: safetensors, unless there is a ``.bin`` alone."""
    first, second = (folder / name for name in ADAPTER_WEIGHTS)
    return second if not is_there(first) and is_there(second) else first


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        MergeError: It is damaged, or has a key twice.
    """
    with reading(f"{file}: damaged or cut short"):
        if (size := file.stat().st_size) > _JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        found = json.loads(
            file.read_text(encoding="utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=_number,
        )
    if not isinstance(found, dict):
        raise MergeError(f"{file}: damaged: expected a JSON object; fetch it again")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's pairs as a mapping; of a repeated key, libraries would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} comes twice")
    return found


def _number(name: str) -> float:
    """Return what Python's JSON has besides JSON's numbers: infinity, which some configs have."""
    if name == "NaN":
        raise ValueError("it has NaN for a number")
    return float(name)


def list_files(folder: Path) -> list[str]:
    """Return paths below a folder, relative to it: four levels, as in the hub's cache."""
    levels = chain.from_iterable(folder.glob("/".join("*" * depth)) for depth in range(1, 5))
    found: list[str] = []
    with contextlib.suppress(OSError):  # folders may vanish, or be unreadable
        found.extend(path.relative_to(folder).as_posix() for path in islice(levels, _LISTED))
    return found


def way_out(paths: Iterable[str], model: str, folder: Path) -> str:
    """Return what a folder without weights contains instead, and what to do."""
    found = sorted(paths, key=lambda path: [int(n) for n in re.findall(r"-(\d+)/", path)])
    for pattern, advice in _OTHERS:
        if matches := [match for path in found if (match := re.fullmatch(pattern, path))]:
            last = matches[-1]  # of a training's checkpoints the latest
            part = next(iter(last.groups()), None)
            return advice.format(model=model, folder=folder, path=last[0], part=part)
    return "fetch it again"
