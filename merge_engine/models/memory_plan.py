"""What a study can hold in memory, component by component, and where the donors live.

They stay on the device that builds (on a CPU: in memory) as far as there is room beside the rest,
for a GPU then in pinned host memory; the others are mapped from disk, and what the system's page
cache cannot hold is read again for every candidate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import psutil
import torch

from merge_engine.errors import MergeError
from merge_engine.methods import METHODS, Elementwise, preparation
from merge_engine.models.checkpoint import TensorInfo
from merge_engine.models.free_memory import format_size, free_bytes, total_bytes
from merge_engine.models.measurements import CACHED_FROM, MEASURING, TEMPORARIES
from merge_engine.models.placement import Budget, Placed
from merge_engine.models.shared_packs import can_share
from merge_engine.numerics.noise import LEVELS
from merge_engine.numerics.order_statistics import TABLE
from merge_engine.numerics.packing import ROWS, WIDTH
from merge_engine.numerics.transfer import STAGED

USABLE: Final = 0.9  # of what is free: estimates are off, and allocators need some
LATER: Final = 64 << 20  # bytes of prompts, and of modules that are imported later
RANKS: Final = "ranks and masks"  # name of a component
COMPILING: Final = 96 << 20  # of torch's compiler, once it has run


@dataclass(frozen=True)
class Allowance:
    """How much memory one process may use."""

    limit: int | None = None  # bytes on each device; None: all that is free
    sharers: int = 1  # number of processes that share the host, and one copy of the donors
    joins: bool = False  # the others have taken their memory: what is free is this one's
    share: float = 1.0  # part of the GPU that is this one's
    engine: float = 0.0  # part of the device that an engine beside the live model takes


@dataclass(frozen=True)
class Models:
    """Models that are merged in a study."""

    tensors: Mapping[str, TensorInfo]  # shape and dtype of each tensor of the result
    count: int  # the base included
    dtype: torch.dtype  # of the live model
    methods: Collection[str] = ()  # names of those that may be tried
    compiled: bool = False  # whether kernels are
    unmapped: int = 0  # bytes of a model's files that are read whole


@dataclass(frozen=True)
class ForwardPasses:
    """Bytes that the live model takes beside its weights, while it is one's turn."""

    scoring: int = 0  # logits, activations, and keys and values of a batch
    tuning: int = 0  # gradients and activations that go backward


@dataclass(frozen=True)
class MemoryPlan:
    """Most memory that a study holds at once, in bytes, and where it is.

    ``process`` and ``statistics`` are on the host, as are pinned packs; the rest is on ``device``.
    Of ``merging``, ``scoring`` and ``tuning`` one is in memory at a time.
    """

    device: str  # where the live model is
    free: int  # on the device for this process, what it holds already included
    process: int  # what it has in memory now, and what its libraries will take
    live: int  # the live model
    engine: int  # what writes texts instead, with a copy of the model
    donors: int  # all models as they are stored
    elementwise: int  # ranks and masks, which have a number for every element of a donor
    statistics: int  # what is kept of the donors' other statistics
    merging: int  # reading a pack, or measuring the largest tensor
    scoring: int  # see ``ForwardPasses``
    tuning: int
    budget: Budget  # for the donors, and for ranks and masks
    placed: Placed  # how they fit into it, about
    ranked: tuple[str, ...]  # methods that have ranks or masks, once they are tried
    # Device to which the live model's layers are copied, one by one, for forward passes.
    copied_to: str | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether device and host are one."""
        return _is_cpu(self.device)

    @property
    def held(self) -> int:
        """Bytes on the device that stay."""
        own = self.process + self.statistics if self.on_cpu else 0
        return own + self.live + self.engine + self.placed.device

    @property
    def peak(self) -> int:
        """Most bytes on the device at once."""
        return self.held + max(self.merging, self.scoring, self.tuning)

    @property
    def spare(self) -> int:
        """Bytes on the device that are left for forward passes."""
        return max(0, self.free - self.held - self.merging)

    def components(self) -> dict[str, int]:
        """Return the bytes of each component, by what it is called; none of them is empty."""
        on_disk = self.placed.disk / max(1, self.donors + self.elementwise)
        kept = max(0, 1 - on_disk)  # packs have gaps, which count on disk
        if self.on_cpu:
            kept /= self.budget.sharers
        found = {
            "process": self.process,
            "live model": self.live,
            "text engine": self.engine,
            "donors": round(kept * self.donors),
            RANKS: round(kept * self.elementwise),
            "statistics": self.statistics,
            "merging": self.merging,
            "scoring": self.scoring,
            "tuning": self.tuning,
        }
        return {name: size for name, size in found.items() if size}

    def __str__(self) -> str:
        once = f" (once {' or '.join(self.ranked)} is tried)" if self.ranked else ""
        parts = [
            f"{name} {format_size(size)}" + (once if name == RANKS else "")
            for name, size in self.components().items()
        ]
        text = (
            f"memory: up to {format_size(self.peak)} of {format_size(self.free)} free on "
            f"{self.device}: {', '.join(parts)} (merging, scoring, tuning: one at a time)"
        )
        if self.placed.pinned:
            text += f"; {format_size(self.placed.pinned)} of it in pinned host memory instead"
        if (sharers := self.budget.sharers) > 1:
            text += (
                f"; {sharers} workers share one copy of the donors on the host, 1/{sharers} each"
            )
        if self.placed.disk:
            text += f"; {format_size(self.placed.disk)} of models mapped from disk"
        if self.copied_to:
            text += f"; every forward pass copies the layers to {self.copied_to}, which is slow"
        return text


def plan_memory(
    models: Models,
    device: str,
    *,
    passes: ForwardPasses | None = None,
    allowed: Allowance | None = None,
) -> MemoryPlan:
    """Plan from the memory that is free now, of which a process may use what is ``allowed``.

    Args:
        models: What is merged.
        device: Where the live model is; "auto": on all GPUs.
        passes: What forward passes take.
        allowed: What this process may use; default: all that is free.

    Raises:
        MergeError: The live model and what is needed to merge and score do not fit.
    """
    sizes = [math.prod(info.shape) for info in models.tensors.values()]
    dtypes = [info.dtype for info in models.tensors.values()]
    stored = sum(n * dtype.itemsize for n, dtype in zip(sizes, dtypes, strict=True))
    methods, others = _elementwise(models.methods), models.count - 1
    ranked = [method for method in methods if method.elementwise_stat]
    kinds = {method.elementwise_stat for method in ranked}
    allowed, passes = allowed or Allowance(), passes or ForwardPasses()
    sharers = allowed.sharers if allowed.sharers > 1 and can_share() else 1
    plan = MemoryPlan(
        device=device,
        free=0,
        process=_resident()
        + LATER
        + COMPILING * models.compiled
        + (0 if _is_cpu(device) else 2 * STAGED),
        live=sum(sizes) * models.dtype.itemsize,
        engine=int(allowed.engine * total_bytes(device)) if allowed.engine else 0,
        donors=models.count * stored,
        elementwise=others * sum(sizes) * len(kinds),
        statistics=_statistics(sizes, others, methods),
        merging=max(
            _reading(sizes, stored) * (1 if _is_cpu(device) else 2 * models.count)
            + models.unmapped,
            _measuring(sizes, methods),
        ),
        scoring=passes.scoring,
        tuning=passes.tuning,
        budget=Budget(per_element=len(kinds), sharers=sharers),
        placed=Placed(),
        ranked=tuple(name for name in models.methods if METHODS[name] in ranked),
    )
    return _with_budget(plan, allowed)


def _with_budget(plan: MemoryPlan, allowed: Allowance) -> MemoryPlan:
    """Return the plan with what is free, and the budget that is left for the donors."""
    most = allowed.limit if allowed.limit is not None else 1 << 62
    loading = 1 if allowed.joins else allowed.sharers
    on_host = min(free_bytes("cpu") // loading + _resident(), most)
    free = on_host if plan.on_cpu else min(free_bytes(plan.device, allowed.share), most)
    least = plan.live + plan.engine + plan.merging + (plan.process if plan.on_cpu else 0)
    if least > free:  # batches can be smaller, and mapped statistics are read again
        way_out = "" if plan.on_cpu else ", or add --offload"
        raise MergeError(
            f"memory: the live model takes {format_size(plan.live)}, with all that merging needs "
            f"beside it {format_size(least)}, but {format_size(free)} are free on {plan.device}; "
            f"choose another --device or --memory, a smaller dtype, or fewer models{way_out}"
        )
    whole, sharers = plan.donors + plan.elementwise, plan.budget.sharers
    on_device = 0 if plan.device == "auto" else max(0, int(USABLE * free) - plan.peak)
    pinned = 0
    if not plan.on_cpu:
        pinned = max(0, int(USABLE * on_host) - plan.process - plan.statistics)
    parts = sharers if plan.on_cpu else 1
    first = min(whole, on_device * parts)
    second = min(whole - first, pinned * sharers)
    return replace(
        plan,
        free=free,
        budget=replace(plan.budget, device=on_device, pinned=pinned),
        placed=Placed(first // parts, second // sharers, whole - first - second),
    )


def _elementwise(methods: Collection[str]) -> list[Elementwise]:
    rows = [METHODS[name] for name in methods]
    return [row for row in rows if isinstance(row, Elementwise)]


def _statistics(sizes: Collection[int], donors: int, methods: Sequence[Elementwise]) -> int:
    """Return the bytes of what is kept of the donors' statistics.

    Those of large tensors are mapped from the cache on disk, whole where the system maps files in
    large pieces.
    """
    found = {method.prepare for method in methods}
    large = sum(size >= CACHED_FROM for size in sizes)
    small = sum(size for size in sizes if size < CACHED_FROM)
    total = 0
    if found & {preparation.ties, preparation.breadcrumbs}:
        total += donors * 16 * (large * TABLE + small)
    if preparation.sce in found:
        total += (16 + 8 * donors) * (large * TABLE + small)
    if preparation.dare in found:
        total += donors * 4 * LEVELS * len(sizes)
    return total


def _reading(sizes: Collection[int], stored: int) -> int:
    """Return the stored bytes of the largest pack, about."""
    whole = max(1, sum(sizes))
    return min(whole, max(*sizes, 0, ROWS * WIDTH)) * stored // whole


def _measuring(sizes: Collection[int], methods: Sequence[Elementwise]) -> int:
    """Return the bytes that statistics of the largest tensor take; small pieces are in float64."""
    if not any(method.prepare or method.elementwise_stat for method in methods):
        return 0
    return MEASURING * max(sizes, default=0) + min(TEMPORARIES, 16 * sum(sizes))


def _is_cpu(device: str) -> bool:
    return device != "auto" and torch.device(device).type == "cpu"


def _resident() -> int:
    """Return the bytes that this process has in memory."""
    return int(psutil.Process(os.getpid()).memory_info().rss)
