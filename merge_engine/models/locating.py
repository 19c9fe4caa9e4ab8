"""Locate a model's files: a folder, or the hub's cache, downloading what is missing."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from merge_engine.errors import MergeError
from merge_engine.models.model_folder import ADAPTER_WEIGHTS, WEIGHTS, list_files
from merge_engine.plain_files import is_text
from merge_engine.schema import find_file, find_folder

HUB_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken"),
    *("*.tokenizer", "bpe.codes", "README.md"),
    "*.py",  # copied to what is built, and not run
)
_PICKLED = ("pytorch_model*.bin", "adapter_model.bin")  # read where there are no safetensors
_SHOWN = 100  # characters of a wrong name
_LOG = logging.getLogger(__name__)


def is_hub_id(model: str) -> bool:
    """Return whether a string has the form ``org/name`` or ``org/name@revision``."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model) is not None


def is_local(model: str) -> bool:
    """Return whether a model, or a model and its adapter, can be read without a download."""
    if find_folder(model):
        return True
    if "+" in model:
        return all(map(is_local, model.split("+")))
    from huggingface_hub import snapshot_download

    name, revision = _parts(model)
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except OSError:
        return False
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", *_PICKLED))


def locate(model: str) -> Path:
    """Return the folder of a model; one named by a hub id is downloaded unless it is cached.

    Raises:
        MergeError: There is neither such a folder nor such a model.
    """
    if folder := find_folder(model):
        if not is_text(folder.absolute()):
            raise MergeError(f"model {model!r}: its path is not UTF-8 text; rename the folder")
        return folder
    if find_file(model):
        raise MergeError(f"model {model!r} is a file; name the folder it is in")
    if not is_hub_id(model):
        shown = model if len(model) <= _SHOWN else f"{model[:_SHOWN]}..."
        raise MergeError(
            f"model {shown!r}: no such folder, and not a hub id like org/name; check the path"
        )
    from huggingface_hub import snapshot_download

    name, revision = _parts(model)
    patterns = [*HUB_FILES, *_pickled_to_fetch(_hub_files(model))]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises some twenty kinds, all meaning "not got"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise MergeError(
            f"model {model!r}: no such folder, and not available from the hub ({reason}); check "
            "its name and the connection, and log in with `hf auth login` if it is gated or private"
        ) from None


def files_there(model: str, folder: Path) -> list[str]:
    """Return the paths of all files of a model, including those not downloaded from the hub."""
    return list_files(folder) if find_folder(model) else (_hub_files(model) or list_files(folder))


def _hub_files(model: str) -> list[str]:
    """List a model's files on the hub (empty if unreachable); warn if it was renamed."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or not is_hub_id(model):
        return []
    name, revision = _parts(model)
    try:
        found = HfApi().model_info(name, revision=revision)
    except Exception:  # `locate` reports it, unless the cache has the model
        return []
    if found.id.lower() != name.lower():
        _LOG.warning("%s is now called %s on the hub; name it so from now on", name, found.id)
    return [file.rfilename for file in found.siblings or ()]


def _pickled_to_fetch(files: Iterable[str]) -> list[str]:
    """Return patterns of the ``.bin`` files of a repository that has no safetensors of the kind."""
    there = set(files)
    model, adapter = WEIGHTS[0], ADAPTER_WEIGHTS[0]
    lacking = (not {model, f"{model}.index.json"} & there, adapter not in there)
    return [pattern for pattern, lacks in zip(_PICKLED, lacking, strict=True) if there and lacks]


def _parts(model: str) -> tuple[str, str | None]:
    """Split a hub id into the repository and the revision."""
    name, _, revision = model.partition("@")
    return name, revision or None
