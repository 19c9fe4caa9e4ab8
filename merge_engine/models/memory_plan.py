"""Where the donors live while candidates are built, planned from what is free and said beforehand.

They stay on the device that builds (on a CPU: in memory) if they fit beside the live model, else,
for a GPU, in pinned host memory, else they are mapped from disk, and what the system's page cache
cannot hold is read again for every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from merge_engine.errors import MergeError
from merge_engine.numerics.packing import ROWS, WIDTH

if TYPE_CHECKING:
    from merge_engine.models.checkpoint import TensorInfo

Tier = Literal["device", "pinned", "disk"]
SPARE = 0.7  # of what is free: activations, allocators and caches need the rest
PLACES = {"device": "kept there", "pinned": "in pinned host memory", "disk": "mapped from disk"}


@dataclass(frozen=True)
class MemoryPlan:
    """What a study needs, in bytes, and where the donors go.

    Args:
        device: Where the live model is.
        live: The live model.
        work: Most that one tensor's merge needs besides: float32 copies of the largest.
        donors: All members as they are stored.
        free: On the device, or what the user allows of it.
        tier: Where the donors live.
    """

    device: str
    live: int
    work: int
    donors: int
    free: int
    tier: Tier

    def __str__(self) -> str:
        return (
            f"memory: {_gib(self.live)} for the live model and up to {_gib(self.work)} for merging "
            f"its largest tensor, of {_gib(self.free)} free on {self.device}; "
            f"{_gib(self.donors)} of models {PLACES[self.tier]}"
        )


def plan_memory(
    tensors: Mapping[str, TensorInfo],
    members: int,
    dtype: torch.dtype,
    device: str,
    limit: int | None = None,
    sharers: int = 1,
) -> MemoryPlan:
    """Plan from what is free now.

    Args:
        tensors: The family's.
        members: How many models it has.
        dtype: Of the live model.
        device: Where the live model is to be; "auto": on all GPUs together.
        limit: Bytes to use at the most, instead of all that is free.
        sharers: How many processes plan for the same host at once.

    Raises:
        RecipeError: The live model and the work on it do not fit.
    """
    sizes = {name: math.prod(info.shape) for name, info in tensors.items()}
    live = sum(sizes.values()) * dtype.itemsize
    donors = members * sum(sizes[name] * info.dtype.itemsize for name, info in tensors.items())
    largest = max(sizes.values(), default=0)
    on_cpu = device != "auto" and torch.device(device).type == "cpu"
    if not on_cpu:  # where donors may be copied to, page by page
        largest = max(largest, min(sum(sizes.values()), ROWS * WIDTH))
    work = 4 * (members + 2) * largest
    most = limit if limit is not None else 1 << 62
    on_host = min(_free("cpu") // sharers, most)
    free = on_host if on_cpu else min(_free(device), most)
    if live + work > free:
        raise MergeError(
            f"memory: the live model takes {_gib(live)} and merging its largest tensor "
            f"{_gib(work)}, but {_gib(free)} are free on {device}; choose another --device or "
            "--memory, a smaller dtype, or fewer models"
        )
    tier: Tier = "disk"
    if device != "auto" and live + work + donors <= SPARE * free:
        tier = "device"
    elif not on_cpu and donors <= SPARE * on_host:
        tier = "pinned"
    return MemoryPlan(device, live, work, donors, free, tier)


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GB", "512 MiB" or "1e9".

    Raises:
        ValueError: It is no such size.
    """
    units = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}
    word = text.strip().lower().replace(" ", "")
    number = word.rstrip("bikmgt")
    unit = word[len(number) :]
    power = units.get(unit[:1])
    if power is None or unit[1:] not in ("", "b", "ib"):
        raise ValueError(f"{text!r} is no size; write it like 24GB or 512MiB")
    try:
        size = float(number) * (1024 if "i" in unit else 1000) ** power
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise ValueError(f"{text!r} is no size; write it like 24GB or 512MiB")
    return int(size)


def _free(device: str) -> int:
    """Bytes free on a device."""
    if device == "auto":
        return sum(_free(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return int(psutil.virtual_memory().available)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
