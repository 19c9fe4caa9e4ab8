"""Snapshots of a study's items: a resumed run evaluates exactly the items it began with.

Prompts depend on task files, data, tokenizer, chat template and package versions. Each item's
prompt and target are therefore stored with the run and compared when it is resumed, and the first
difference is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from objectives.base import ItemSnapshot, Objective, printable
from objectives.items import SPLITS, Splits

_ASPECTS = {  # fields of a snapshot, and their names in messages
    "prompt": "prompt",
    "gold": "right answer or row of data",
    "encoding": "tokens, though not its text (another tokenizer?)",
    "rules": "task's way of asking or judging",
}
_CONTEXT = 30  # characters quoted before and after a difference


@dataclass(frozen=True)
class StoredItem:
    """One item of a study and its snapshot, as stored with a run; see ``ItemSnapshot``."""

    split: str
    task: str
    doc_id: int
    key: str
    prompt: str
    gold: str
    encoding: str
    rules: str


def snapshot_items(objective: Objective, splits: Splits) -> list[StoredItem]:
    """Take the snapshots of all splits' items, each split in scoring order."""
    numbers = [(split, number) for split in SPLITS for number in getattr(splits, split)]
    snapshots = objective.snapshots([number for _, number in numbers])
    items = [(split, objective.items[number]) for split, number in numbers]
    return [
        StoredItem(split, item.task, item.doc_id, item.key, **_aspects(snapshot))
        for (split, item), snapshot in zip(items, snapshots, strict=True)
    ]


def difference(
    stored: Sequence[StoredItem], now: Sequence[StoredItem], objective: Objective
) -> str | None:
    """Describe how the items have changed since they were stored; None if they have not."""
    if [_content(item) for item in stored] == [_content(item) for item in now]:
        return None
    numbers: dict[tuple[str, int | str], int] = {}
    for number, item in enumerate(objective.items):
        numbers[item.task, item.doc_id] = numbers[item.task, item.key] = number
    changed: list[str] = []
    for old in stored:
        number = numbers.get((old.task, old.key), numbers.get((old.task, old.doc_id), -1))
        if number < 0:
            changed.append(f"task {old.task!r} has no item {old.doc_id} any more")
        elif change := _change(old, _aspects(objective.snapshots([number])[0])):
            changed.append(f"task {old.task!r}, item {old.doc_id}: {change}")
    if not changed:
        return "the tasks have additional items, so the splits would change"
    more = f" (and {len(changed) - 1} more items)" if len(changed) > 1 else ""
    return f"{changed[0]}{more}"


def _aspects(snapshot: ItemSnapshot) -> dict[str, str]:
    aspects = {aspect: getattr(snapshot, aspect) for aspect in _ASPECTS}
    return aspects | {"prompt": snapshot.full_prompt}


def _content(item: StoredItem) -> dict[str, Any]:
    """Return an item's fields without its row: the rows of a data file may be reordered."""
    return {name: value for name, value in asdict(item).items() if name != "doc_id"}


def _change(item: StoredItem, now: dict[str, str]) -> str | None:
    """Describe the first aspect of an item that has changed."""
    for aspect, called in _ASPECTS.items():
        before, after = getattr(item, aspect), now[aspect]
        if before != after and aspect in ("prompt", "gold"):
            return f"its {called} was {_quoted(before, after)} and is {_quoted(after, before)}"
        if before != after:
            return f"its {called} changed"
    return None


def _quoted(text: str, other: str) -> str:
    """Quote the text around its first difference from another."""
    pairs = enumerate(zip(text, other, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), min(len(text), len(other)))
    start, end = max(0, first - _CONTEXT), first + _CONTEXT
    dots = ("..." if start else "", "..." if end < len(text) else "")
    return f'"{dots[0]}{printable(text[start:end])}{dots[1]}"'
