"""Measure free memory, within the limits of a container; parse and format sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

ROOT = Path("/")
_SIZE = re.compile(r"\s*\d*\.?\d+\s*[a-z]*\s*", re.IGNORECASE)
_NO_LIMIT = 1 << 60  # cgroup v1 says "none" with a number near 2**63
# Files of a control group, by version: its limit, what it uses, and the statistics of its page
# cache, which is given up when memory runs short.
_FILES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def free_bytes(device: str, share: float = 1.0) -> int:
    """Return the bytes free on a device; "auto": on all GPUs.

    ``share`` is the part of a GPU that this process may use.
    """
    if device == "auto":
        return sum(free_bytes(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return int(min(free, share * total))
    return min([int(psutil.virtual_memory().available), *_free_in_groups(ROOT)])


def total_bytes(device: str) -> int:
    """Return the bytes of a device's memory, in use or not; "auto": of all GPUs."""
    if device == "auto":
        return sum(total_bytes(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[1])
    return int(psutil.virtual_memory().total)


def reserve_share(device: str, share: float) -> None:
    """Limit this process to its ``share`` of a GPU."""
    if share < 1 and device != "auto" and torch.device(device).type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, torch.device(device))


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "24GB" or "512 MiB"; raise ValueError if it is invalid."""
    try:
        return TypeAdapter(ByteSize).validate_python(text if _SIZE.fullmatch(text) else "")
    except ValidationError:
        raise ValueError(f"{text!r} is not a size; write it like 24GB or 512MiB") from None


def format_size(size: int) -> str:
    """Return a number of bytes as text, such as "1.5 GiB"."""
    return ByteSize(size).human_readable(separator=" ")


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield the free bytes of each memory-limited control group of this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version, mounts = 1, ["sys/fs/cgroup/memory"]
        elif not controllers:
            version, mounts = 2, ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        else:
            continue
        inner = Path(path.lstrip("/"))
        for mount in mounts:  # a container sees its own group at the root, whatever its path says
            for group in (inner, *inner.parents):
                if (free := _free_in(root / mount / group, version)) is not None:
                    yield free


def _free_in(group: Path, version: int) -> int | None:
    """Return the bytes that a control group has left; None if it has no limit."""
    limit, used, cached = _FILES[version]
    try:
        most = (group / limit).read_text().strip()
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = sum(int(stat.get(name, 0)) for name in cached)
        return max(0, int(most) - int((group / used).read_text()) + cache)
    except (OSError, ValueError):
        return None
