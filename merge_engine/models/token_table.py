"""Read the token of each embedding row, without loading the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from merge_engine.errors import reading
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_folder import read_json
from merge_engine.models.tensor_names import input_embedding

SHOWN = 3  # rows that a note names


def token_table(checkpoint: Checkpoint) -> Mapping[int, str]:
    """Return the token of each row of a model's embedding, added tokens included.

    A tokenizer that is not stored as JSON gives only its added tokens, or none.

    Raises:
        MergeError: A file is damaged.
    """
    table = tokenizer_table(checkpoint.tokenizer_folder)
    name = input_embedding(checkpoint.tensors)
    height = checkpoint.tensors[name].shape[0] if name else max(table, default=0) + 1
    return {number: token for number, token in table.items() if number < height}


def tokenizer_table(folder: Path) -> dict[int, str]:
    """Return the token of each id in a folder's tokenizer, as far as JSON files have them.

    Raises:
        MergeError: A file is damaged.
    """
    return _read(folder / "tokenizer.json", _of_fast) | added_tokens(folder)


def added_tokens(folder: Path) -> dict[int, str]:
    """Return the token of each id that was added to a folder's tokenizer.

    Raises:
        MergeError: A file is damaged.
    """
    return {
        **_read(folder / "tokenizer.json", _added_in_fast),
        **_read(folder / "added_tokens.json", _of_added),
        **_read(folder / "tokenizer_config.json", _of_config),
    }


def vocabulary_notes(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Return a note on each model in which rows stand for other tokens than in the first.

    Models whose tokens are unknown are skipped.
    """
    tables = [(one.model, token_table(one)) for one in checkpoints]
    return [
        note
        for model, table in tables[1:]
        if tables[0][1] and table and (note := _note(*tables[0], model, table))
    ]


def _note(first: str, mine: Mapping[int, str], other: str, theirs: Mapping[int, str]) -> str:
    """Return a note on the rows in which two models differ; empty if they do not."""
    rows = [n for n in sorted({*mine, *theirs}) if mine.get(n) != theirs.get(n)]
    if not rows:
        return ""
    shown = [f"row {n} is {_said(mine, n)} and {_said(theirs, n)}" for n in rows[:SHOWN]]
    if more := len(rows) - len(shown):
        shown.append(f"and so on in {more} more")
    return (
        f"models {first!r} and {other!r} differ in the tokens of {len(rows)} rows: "
        f"{', '.join(shown)}; rows are merged by number and the result gets the first model's "
        "tokenizer: write 'tokenizer: {source: union}' (or base) to merge them by token"
    )


def _said(table: Mapping[int, str], number: int) -> str:
    return repr(table[number]) if number in table else "no token"


def _of_fast(raw: Any) -> dict[int, str]:
    """Return the tokens in the contents of a tokenizer.json."""
    vocab = raw["model"].get("vocab") or {}
    if isinstance(vocab, list):  # a unigram model's: pairs of token and score
        vocab = {token: number for number, (token, *_) in enumerate(vocab)}
    return {number: token for token, number in vocab.items()} | _added_in_fast(raw)


def _added_in_fast(raw: Any) -> dict[int, str]:
    """Return the added tokens in the contents of a tokenizer.json."""
    return {entry["id"]: entry["content"] for entry in raw.get("added_tokens") or []}


def _of_added(raw: Any) -> dict[int, str]:
    """Return the added tokens in the contents of an added_tokens.json."""
    return {number: token for token, number in raw.items()}


def _of_config(raw: Any) -> dict[int, str]:
    """Return the added tokens in the contents of a tokenizer_config.json."""
    added = raw.get("added_tokens_decoder") or {}
    return {int(number): entry["content"] for number, entry in added.items()}


def _read(file: Path, tokens_in: Any) -> dict[int, str]:
    """Return the tokens in a file's contents; none if there is no such file."""
    if not file.is_file():
        return {}
    with reading(f"{file}: damaged"):
        found: dict[int, str] = tokens_in(read_json(file))
        for number, token in found.items():
            if type(number) is not int or not isinstance(token, str):
                raise ValueError(f"{token!r} has the number {number!r}")
    return found
