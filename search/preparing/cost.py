"""About what a study will cost, from its items, its models' size and how quick the device is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from merge_engine.models.model_set import ModelSet
from merge_engine.models.tensor_names import layer_counts
from search.preparing.context import Hardware, StudyContext, torch_dtype
from search.racing.item_scores import SELECT_SHARE
from search.running.events import duration
from search.study.spec import StudySpec

ASKED: Final = 0.45  # share of the item evaluations that 100 trials take: others lose their races
WRITTEN: Final = 0.5  # share of the tokens a model may write that it does
OPERATIONS: Final = 100  # that a layer calls, each of which takes its time, however small it is
WRITING: Final = 1300  # operations more for each token of a block, which are no layer's
PASSES: Final = 2  # of the copies that a merge takes at least, methods being as they are
PROPOSAL: Final = 0.3  # seconds to propose a trial and to store what comes of it
SAMPLE: Final = 40  # items that speak for all


@dataclass(frozen=True)
class Speed:
    """What a device does.

    Args:
        flops: Floating-point operations a second, in large products.
        bandwidth: Bytes a second that are read, as many being written.
        operation: Seconds that the smallest operation of a model takes.
    """

    flops: float
    bandwidth: float
    operation: float


@dataclass(frozen=True)
class Cost:
    """What a study takes.

    Args:
        evaluations: Answers to single items, at most.
        seconds: With the usual share of them.
        most: With all of them.
        disk: Bytes that are left, nearly all in the checkpoint.
    """

    evaluations: int
    seconds: float
    most: float
    disk: int

    def __str__(self) -> str:
        return (
            f"cost: at most {self.evaluations:,} item evaluations, usually less than half of them; "
            f"about {duration(self.seconds)} (within a factor of 3; if all are asked "
            f"{duration(self.most)}) and {max(1, round(self.disk / 2**20)):,} MiB of disk"
        )


def estimate(bench: StudyContext, family: ModelSet, machine: Hardware, workers: int = 1) -> Cost:
    """Reckon what a study takes.

    A forward pass of t tokens through P parameters takes ``2 P t`` operations, or as long as the
    parameters are read; writing takes one pass a token, for a block of items together.
    """
    search, objective = bench.spec.search, bench.spec.objective
    members = len(family.checkpoints)
    searched = (search.trials + members + 1) * objective.items.search
    evaluations = searched + concluding(bench.spec, searched)
    dtype = torch_dtype(bench.space.dtype)
    speed = measure(machine.builds_on, dtype)
    layers = max(layer_counts(family.tensors).values(), default=1)
    size = family.parameters * dtype.itemsize

    def forward(tokens: float) -> float:
        work = 2 * family.parameters * tokens / speed.flops
        return max(work, size / speed.bandwidth) + layers * OPERATIONS * speed.operation

    shown = bench.objective.snapshots(bench.splits.search[:SAMPLE])
    written = [each for each in shown if each.max_new_tokens]
    texts = objective.block * len(written) / len(shown)
    block = forward(objective.block * sum(each.input_tokens for each in shown) / len(shown))
    steps = WRITTEN * max((each.max_new_tokens for each in written), default=0)
    block += steps * (forward(texts) + WRITING * speed.operation)
    build = PASSES * (members + 1) * size / speed.bandwidth
    build += len(family.tensors) * OPERATIONS * speed.operation

    def seconds(asked: float) -> float:
        scoring = asked * evaluations / objective.block * block
        return (scoring + search.trials * (build + PROPOSAL)) / workers

    return Cost(evaluations, seconds(ASKED), seconds(1), size)


def concluding(spec: StudySpec, searched: float) -> int:
    """How many item evaluations follow, at most, those of a search."""
    counts, finalists = spec.objective.items, spec.search.finalists
    winners, compared = (finalists if spec.search.front else 1), len(spec.models_but_base) + 2
    return (
        min(math.ceil(SELECT_SHARE * searched), finalists * counts.select)
        + (winners + compared) * counts.test
        + (counts.search + counts.select + counts.test)  # the winner's, again, before it is saved
    )


@cache
def measure(device: torch.device, dtype: torch.dtype) -> Speed:
    """Try a device for a fraction of a second."""
    side = 4096 if device.type == "cuda" else 512
    with torch.inference_mode():
        square = torch.ones(side, side, dtype=dtype, device=device)
        large = torch.ones(2**24, dtype=torch.uint8, device=device)
        other, small = torch.empty_like(large), torch.nn.Linear(8, 8, dtype=dtype, device=device)
        one = torch.ones(1, 8, dtype=dtype, device=device)
        return Speed(
            flops=2 * side**3 / _seconds(lambda: square @ square, device),
            bandwidth=len(large) / _seconds(lambda: other.copy_(large), device),
            operation=_seconds(lambda: small(one), device),
        )


def _seconds(work: Callable[[], object], device: torch.device, most: float = 0.05) -> float:
    """How long it takes, from as many times as fit."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    times, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < most:
        for _ in range(4):
            work()
        times += 4
        wait()
    return elapsed / times
