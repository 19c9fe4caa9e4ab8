"""The engine's error, and the sentences that its messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


class MergeError(ValueError):
    """A recipe, model or setting that cannot be used; the message says where and what to do."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` if a known name is close, else a list of all known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def check_keys(where: str, keys: Iterable[object], known: Iterable[str], kind: str = "key") -> None:
    """Refuse the first key of a mapping, or word of a list, that is not known."""
    for key in keys:
        if key not in (names := tuple(known)):
            raise MergeError(f"{where}: unknown {kind} {key!r}{suggestion(str(key), names)}")


def first_error(error: ValidationError) -> str:
    """Return pydantic's first complaint in one line: where, what is wrong, and the input."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    said = first["msg"].replace("valid tuple", "list")  # as YAML calls it
    return f"{where}: {said} (got {first['input']!r})"
