"""The items of a study are frozen with it: a run that goes on asks exactly what it asked before.

Prompts depend on task files, data, tokenizer, chat template and versions of other packages. What a
model is shown for each item, and what is right, is therefore stored with the run, compared when it
goes on, and a difference is named instead of a score that means something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from objectives.base import ItemSnapshot, Objective, printable
from objectives.items import SPLITS, Splits

_ASPECTS = {
    "prompt": "prompt",
    "gold": "right answer or row of data",
    "encoding": "tokens, though not its text (another tokenizer?)",
    "rules": "task's way of asking or judging",
}
_AROUND = 30  # letters quoted before and after a difference


@dataclass(frozen=True)
class FrozenItem:
    """One item of a study as a model is shown it; see ``Item`` and ``ItemSnapshot``."""

    split: str
    task: str
    doc_id: int
    key: str
    prompt: str
    gold: str
    encoding: str
    rules: str


def freeze(objective: Objective, splits: Splits) -> list[FrozenItem]:
    """The items of all splits, each split in scoring order."""
    numbers = [(split, number) for split in SPLITS for number in getattr(splits, split)]
    shown = objective.snapshots([number for _, number in numbers])
    split_of = [(split, objective.items[number]) for split, number in numbers]
    return [
        FrozenItem(split, item.task, item.doc_id, item.key, **_aspects(each))
        for (split, item), each in zip(split_of, shown, strict=True)
    ]


def difference(
    stored: Sequence[FrozenItem], now: Sequence[FrozenItem], objective: Objective
) -> str | None:
    """What would not be asked as it was, in words; None if nothing."""
    if [_content(item) for item in stored] == [_content(item) for item in now]:
        return None
    numbers: dict[tuple[str, int | str], int] = {}
    for number, item in enumerate(objective.items):
        numbers[item.task, item.doc_id] = numbers[item.task, item.key] = number
    changed: list[str] = []
    for old in stored:
        place = numbers.get((old.task, old.key), numbers.get((old.task, old.doc_id), -1))
        if place < 0:
            changed.append(f"task {old.task!r} has no item {old.doc_id} any more")
        elif what := _what(old, _aspects(objective.snapshots([place])[0])):
            changed.append(f"task {old.task!r}, item {old.doc_id}: {what}")
    if not changed:
        return "the tasks have other items besides, so the splits would be dealt anew"
    more = f" (and {len(changed) - 1} more items)" if len(changed) > 1 else ""
    return f"{changed[0]}{more}"


def _aspects(shown: ItemSnapshot) -> dict[str, str]:
    """What must not change of it."""
    return {
        aspect: shown.full_prompt if aspect == "prompt" else getattr(shown, aspect)
        for aspect in _ASPECTS
    }


def _content(item: FrozenItem) -> dict[str, Any]:
    """All but the row: the rows of a data file may be reordered."""
    return {name: value for name, value in asdict(item).items() if name != "doc_id"}


def _what(item: FrozenItem, now: dict[str, str]) -> str | None:
    """The first aspect of an item that has changed, and how."""
    for aspect, called in _ASPECTS.items():
        before, after = getattr(item, aspect), now[aspect]
        if before != after and aspect in ("prompt", "gold"):
            return f"its {called} was {_quoted(before, after)} and is {_quoted(after, before)}"
        if before != after:
            return f"its {called} changed"
    return None


def _quoted(text: str, other: str) -> str:
    """The text around its first difference from another."""
    pairs = zip(text, other, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    start, end = max(0, place - _AROUND), place + _AROUND
    dots = ("..." if start else "", "..." if end < len(text) else "")
    return f'"{dots[0]}{printable(text[start:end])}{dots[1]}"'
