"""Split the items into search, select, test and tune: disjoint, stratified, reproducible."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from objectives.base import Item, ObjectiveError

Split = Literal["search", "select", "test", "tune"]

SPLITS: tuple[Split, ...] = get_args(Split)
MOST_TUNED: Final = 100  # default limit of tune items per task


@dataclass(frozen=True)
class Splits:
    """Item numbers of each split, in the order of evaluation."""

    search: tuple[int, ...]
    select: tuple[int, ...]
    test: tuple[int, ...]
    tune: tuple[int, ...] = ()


def split_items(
    items: Sequence[Item], tasks: Mapping[str, float], counts: Mapping[str, int | None], seed: int
) -> Splits:
    """Split the items into sets that share no content.

    A question that occurs twice is used once, under the task that has it first. The total is
    divided over the tasks in proportion to their weights, none getting more than it has, and each
    task's share over the splits in proportion to ``counts``. Within a task the items are shuffled
    by content, so the rows of a data file may be reordered freely. Tasks are then interleaved:
    every prefix of a split is a stratified sample of all tasks.

    Args:
        items: All items; the splits hold indices into this sequence.
        tasks: Positive weight of each task.
        counts: Sizes of ``search``, ``select`` and ``test``, each 1 or more, and of ``tune``. If
            that is None, ``tune`` gets up to ``MOST_TUNED`` of each task's remaining items; if
            these are fewer than its search items, some of those are moved until both are equal.
        seed: Of the shuffle.

    Raises:
        ObjectiveError: There are too few items, or a split would have none of a task.
    """
    shuffled = _shuffled_by_task(items, tasks, seed)
    sizes: dict[str, int] = {split: size for split in SPLITS if (size := counts.get(split, 0))}
    total = sum(sizes.values())
    held = {task: len(numbers) for task, numbers in shuffled.items()}
    if total > sum(held.values()):
        raise ObjectiveError(
            f"objective.items: {_listed(sizes)} are {total} items but the tasks have "
            f"{sum(held.values())} different ones ({_listed(held)}); ask for fewer or add a task"
        )
    shares = _water_fill(total, tasks, held)
    by_split: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
    for task, of_task in _divide(shares, sizes).items():
        remaining = iter(shuffled[task])
        for split, size in of_task.items():
            by_split[split][task] = list(itertools.islice(remaining, size))
        if counts.get("tune", 0) is None:
            searched, left = by_split["search"][task], list(itertools.islice(remaining, MOST_TUNED))
            shared = max(0, len(searched) - len(left)) // 2
            by_split["search"][task] = searched[: len(searched) - shared]
            by_split["tune"][task] = left + searched[len(searched) - shared :]
    return Splits(**{split: _interleaved(by_split[split], tasks) for split in SPLITS})


def blocks(order: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Cut an order of items into consecutive blocks of ``size``; the last may be shorter."""
    if size < 1:
        raise ObjectiveError(f"block size is {size}; make it 1 or more")
    return tuple(tuple(order[start : start + size]) for start in range(0, len(order), size))


def _shuffled_by_task(
    items: Sequence[Item], tasks: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Return the item numbers of each task without repeats, shuffled by content."""
    first: dict[str, int] = {}
    for number, item in enumerate(items):
        first.setdefault(item.key, number)
    by_task: dict[str, list[int]] = {task: [] for task in tasks}
    for number in first.values():
        task = items[number].task
        if task not in by_task:
            raise ObjectiveError(f"item {number} is of task {task!r}, which has no weight")
        by_task[task].append(number)
    for numbers in by_task.values():
        numbers.sort(key=lambda n: hashlib.sha256(f"{seed}/{items[n].key}".encode()).digest())
    return by_task


def _water_fill(
    total: int, weights: Mapping[str, float], held: Mapping[str, int]
) -> dict[str, int]:
    """Divide ``total`` over the tasks in proportion to ``weights``, at most ``held`` to each.

    What exceeds a task's items goes to the other tasks.
    """
    full: dict[str, int] = {}
    while True:
        open_weights = {task: weight for task, weight in weights.items() if task not in full}
        level = (total - sum(full.values())) / (sum(open_weights.values()) or 1.0)
        over = [task for task, weight in open_weights.items() if level * weight >= held[task]]
        if not over:
            break
        full |= {task: held[task] for task in over}
    return full | _largest_remainder(total - sum(full.values()), open_weights)


def _divide(shares: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return sizes by task and split, of exactly ``counts`` items per split.

    Each task is divided in proportion to what the splits still lack, smallest share first: small
    tasks need the ratio most, and large ones absorb the rounding.
    """
    lacking = dict(counts)
    sizes: dict[str, dict[str, int]] = {}
    for task in sorted(shares, key=lambda task: (shares[task], task)):
        sizes[task] = _largest_remainder(shares[task], lacking)
        lacking = {split: lacking[split] - sizes[task][split] for split in lacking}
        if missing := [split for split, size in sizes[task].items() if size < 1]:
            raise ObjectiveError(
                f"objective.items: task {task!r} gets {shares[task]} of {sum(counts.values())} "
                f"items ({_listed(sizes[task])}; all tasks: {_listed(shares)}) and would miss from "
                f"{', '.join(missing)}; ask for more items, raise its weight or leave it out"
            )
    return sizes


def _largest_remainder(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divide ``total`` into integers by the largest-remainder method; ties go to the first."""
    mass = sum(weights.values()) or 1.0
    ideal = {name: total * weight / mass for name, weight in weights.items()}
    whole = {name: math.floor(share) for name, share in ideal.items()}
    neediest = sorted(ideal, key=lambda name: whole[name] - ideal[name])
    for name in neediest[: total - sum(whole.values())]:
        whole[name] += 1
    return whole


def _interleaved(by_task: Mapping[str, Sequence[int]], tasks: Iterable[str]) -> tuple[int, ...]:
    """Merge the tasks' items by their relative position, so that each task is spread evenly."""
    positions = [
        ((position + 0.5) / len(by_task[task]), order, number)
        for order, task in enumerate(tasks)
        for position, number in enumerate(by_task.get(task, ()))
    ]
    return tuple(number for _, _, number in sorted(positions))


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
