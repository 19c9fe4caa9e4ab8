"""The engine's error, and helpers to write its messages."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from merge_engine.out_of_memory import is_out_of_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a full disk, or a limit of space
_SHOWN = 300  # characters of a library's message
_YAML_WORDS = (  # pydantic's words, and YAML's for the same
    (r"^Value error, ", ""),
    (r"valid tuple", "list"),
    (r"^(Tuple|List) should have at least 1 item .*", "Input should be a list with an entry"),
    (r"valid dictionary( or instance of \w+)?", "mapping"),
)
_PLAIN = (  # Python's messages about its own limits, and plainer ones
    ("maximum recursion depth", "it is nested too deeply, or in itself"),
    ("Exceeds the limit", "it has a number of thousands of digits"),
    ("integer division or modulo by zero", "it makes a division by zero"),
)


class MergeError(ValueError):
    """A recipe, model or setting that cannot be used; the message says where and what to do."""


@contextmanager
def reading(what: object, advice: str = "fetch it again") -> Iterator[None]:
    """Turn any error of a library that reads ``what`` into a MergeError that names it.

    Errors of this project, and lack of memory or disk space, pass unchanged.
    """
    try:
        yield
    except MergeError:
        raise
    except Exception as error:  # libraries raise anything on malformed input
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in FULL):
            raise
        raise MergeError(f"{what}: {reason(error)}; {advice}") from error


def reason(error: BaseException) -> str:
    """Return an error's message in one line of limited length."""
    text = " ".join(str(error).split())
    for beginning, meaning in _PLAIN:
        if beginning in text:
            return meaning
    if isinstance(error, KeyError | AttributeError) or not text:  # names alone say little
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


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
    parts = [str(part) for part in first["loc"]]
    where = ".".join(part for part in parts if not part.startswith("function-"))  # pydantic's own
    said = first["msg"]
    for words, others in _YAML_WORDS:
        said = re.sub(words, others, said)
    return f"{where}: {said} (got {first['input']!r})"
