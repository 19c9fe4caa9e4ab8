"""Tensors that follow from the donors alone, kept on disk from one run to the next.

A file stands for one statistic of one tensor of some models. Its name is a digest of the models'
fingerprints, so files are never changed and never out of date: whoever wants room removes the
folder. It is a convenience and never an error: what is missing or damaged is computed again, and
what cannot be stored is not.

The folder has a limit, beyond which the files that were not used for longest are removed. It is
measured when a process first stores something and then each time it has stored another 64th of the
limit, so each process may go beyond by that much. Several may do so at once: a file that somebody
has mapped can be read to the end, and one that is gone is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from merge_engine.errors import MergeError
from merge_engine.models.memory_plan import parse_size

FORMAT = 2  # to be raised when a statistic is computed or stored in another way
PIECE = 1 << 16  # bytes
PIECES = 64  # of each file
MOST = 20 << 30  # bytes
SHARE = 10  # the folder takes no more than a tenth of the room it could have
LOOKS = 64  # times that the folder is measured while as much is stored as it may hold
_OURS = re.compile(r"[0-9a-f]{40}\.safetensors(\.\w+\.partial)?")
_left: dict[Path, int] = {}  # bytes that may be stored before a folder is measured again


def folder() -> Path:
    """``$MERGESEARCH_CACHE``, or ``mergesearch`` in the user's cache folder."""
    if own := os.environ.get("MERGESEARCH_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "mergesearch"


def own_limit() -> int | None:
    """The user's ``$MERGESEARCH_CACHE_LIMIT`` in bytes, if there is one.

    Raises:
        RecipeError: It is no size.
    """
    if not (text := os.environ.get("MERGESEARCH_CACHE_LIMIT")):
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise MergeError(f"$MERGESEARCH_CACHE_LIMIT: {error}") from None


def limit(held: int) -> int:
    """Bytes that the folder may hold.

    The user's own limit, or else 20 GiB, or a tenth of what is free on its disk and what the folder
    holds already, if that is less.

    Args:
        held: Bytes in the folder.
    """
    if (own := own_limit()) is not None:
        return own
    return min(MOST, (shutil.disk_usage(folder()).free + held) // SHARE)


def trim() -> int:
    """Remove the files that were not used for longest until the folder is within its limit.

    Only files that were stored here are counted and removed, whatever else is in the folder.

    Returns:
        The limit in bytes.
    """
    found = []
    for place in folder().glob("??/*"):
        if _OURS.fullmatch(place.name):
            with contextlib.suppress(OSError):  # another process has removed it
                status = place.stat()
                found.append((status.st_mtime_ns, status.st_size, place))
    held = sum(size for _, size, _ in found)
    most = limit(held)
    for _, size, place in sorted(found):
        if held <= most:
            break
        with contextlib.suppress(OSError):
            place.unlink()
        held -= size
    return most


def fingerprint(files: Iterable[Path], *, dated: bool = True) -> str:
    """What tells weights from others, without reading them all.

    Of each file its size, the safetensors header, and 64 pieces of 64 KiB at equal distances. A
    fine-tune may have changed nothing there, so the time of the last change counts as well: a
    copied model is measured again, which costs seconds, where a mistaken one would cost the study.

    Args:
        files: Of a model or an adapter.
        dated: Whether that time counts; without it a copy has the same fingerprint.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns if dated else ''} ".encode())
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if file.suffix == ".safetensors":
                digest.update(opened.read(length))
            last = max(0, status.st_size - PIECE)
            for start in sorted({last * number // (PIECES - 1) for number in range(PIECES)}):
                opened.seek(start)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()


def place_for(kind: str, tensors: Sequence[tuple[str, str]]) -> Path:
    """The file of one statistic.

    Args:
        kind: Which one, with all that it depends on besides the weights.
        tensors: A fingerprint and the name of the model's own tensor, for each model in order.
    """
    parts = [str(FORMAT), kind, *(part for tensor in tensors for part in tensor)]
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=20).hexdigest()
    return folder() / digest[:2] / f"{digest}.safetensors"


def kept(place: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors on the CPU: mapped into memory from a file, or made and stored there."""
    found = _load(place)
    if found is None:
        made = make()
        _store(place, made)
        found = _load(place) or made  # mapped, so that it takes no memory of the process's own
    return found


def _load(place: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(place, framework="pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):  # it is another's, or gone by now
        os.utime(place)
    return found


def _store(place: Path, tensors: dict[str, Tensor]) -> None:
    """Write under another name and rename: a file that exists is whole. Then make room."""
    with contextlib.suppress(OSError, SafetensorError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(".partial", f"{place.name}.", place.parent)
        os.close(handle)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            Path(partial).replace(place)
        finally:
            Path(partial).unlink(missing_ok=True)
        left = _left.get(folder(), 0) - place.stat().st_size
        _left[folder()] = left if left > 0 else trim() // LOOKS
