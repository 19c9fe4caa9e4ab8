"""Where the donors live while candidates are built, planned from the memory that is free.

They stay on the device that builds (on a CPU: in memory) if they fit beside the live model, else,
for a GPU, in pinned host memory, else they are mapped from disk, and what the system's page cache
cannot hold is read again for every candidate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import TensorInfo
from merge_engine.models.free_memory import free_bytes, said_size
from merge_engine.numerics.packing import ROWS, WIDTH

Tier = Literal["device", "pinned", "disk"]
USABLE = 0.7  # of what is free: activations, allocators and caches need the rest
_TIERS = {"device": "kept there", "pinned": "in pinned host memory", "disk": "mapped from disk"}
_SIZE = re.compile(r"\s*\d*\.?\d+\s*[a-z]*\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Allowance:
    """How much memory one process may use."""

    limit: int | None = None  # bytes on each device; None: all that is free
    sharers: int = 1  # number of processes that share the host
    share: float = 1.0  # part of the GPU that is this one's


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that a study needs, in bytes, and where the donors live."""

    device: str  # where the live model is
    live: int  # of the live model
    work: int  # most that merging one tensor takes besides: float32 copies of the largest
    donors: int  # of all models as they are stored
    free: int  # on the device, or what the user allows of it
    tier: Tier  # where the donors live
    # Device to which the live model's layers are copied, one by one, for forward passes.
    copied_to: str | None = None

    @property
    def spare(self) -> int:
        """Bytes on the device that are left for forward passes."""
        kept = self.donors if self.tier == "device" else 0
        return max(0, self.free - self.live - self.work - kept)

    def __str__(self) -> str:
        text = (
            f"memory: {said_size(self.live)} for the live model and up to {said_size(self.work)} "
            f"for merging its largest tensor, of {said_size(self.free)} free on {self.device}; "
            f"{said_size(self.donors)} of models {_TIERS[self.tier]}"
        )
        if self.copied_to:
            text += f"; every forward pass copies the layers to {self.copied_to}, which is slow"
        return text


def plan_memory(
    tensors: Mapping[str, TensorInfo],
    members: int,
    dtype: torch.dtype,
    device: str,
    allowed: Allowance | None = None,
) -> MemoryPlan:
    """Plan from the memory that is free now, of which a process may use what is ``allowed``.

    Raises:
        MergeError: The live model and merging its largest tensor do not fit.
    """
    sizes = {name: math.prod(info.shape) for name, info in tensors.items()}
    live = sum(sizes.values()) * dtype.itemsize
    donors = members * sum(sizes[name] * info.dtype.itemsize for name, info in tensors.items())
    largest = max(sizes.values(), default=0)
    on_cpu = device != "auto" and torch.device(device).type == "cpu"
    if not on_cpu:  # donors may be copied there pack by pack
        largest = max(largest, min(sum(sizes.values()), ROWS * WIDTH))
    work = 4 * (members + 2) * largest
    allowed = allowed or Allowance()
    most = allowed.limit if allowed.limit is not None else 1 << 62
    on_host = min(free_bytes("cpu") // allowed.sharers, most)
    free = on_host if on_cpu else min(free_bytes(device, allowed.share), most)
    if live + work > free:
        way_out = "" if on_cpu else ", or add --offload"
        raise MergeError(
            f"memory: the live model takes {said_size(live)} and merging its largest tensor "
            f"{said_size(work)}, but {said_size(free)} are free on {device}; choose another "
            f"--device or --memory, a smaller dtype, or fewer models{way_out}"
        )
    tier: Tier = "disk"
    if device != "auto" and live + work + donors <= USABLE * free:
        tier = "device"
    elif not on_cpu and donors <= USABLE * on_host:
        tier = "pinned"
    return MemoryPlan(device, live, work, donors, free, tier)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "24GB" or "512 MiB"; raise ValueError if it is none."""
    try:
        return TypeAdapter(ByteSize).validate_python(text if _SIZE.fullmatch(text) else "")
    except ValidationError:
        raise ValueError(f"{text!r} is no size; write it like 24GB or 512MiB") from None
