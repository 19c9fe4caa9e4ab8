"""Detect damaged stored data, by digests or by the errors of reading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from merge_engine.errors import MergeError, reason
from objectives.base import ObjectiveError, printable
from search.study.spec import StudyError

# What Python and optuna, which asserts, raise for rows that nobody would have written.
_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError, AssertionError)


def digest_of(*parts: object) -> str:
    """Hash JSON data; equal data has the same digest on every machine."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def damaged(where: object, what: str) -> StudyError:
    """Return the error for damaged data."""
    return StudyError(
        f"{where} is damaged: {what}; restore it from a copy, or start over with --force-new"
    )


@contextmanager
def reading_stored(where: object) -> Iterator[None]:
    """Turn errors of reading damaged data into one line.

    Raises:
        StudyError: It is damaged.
    """
    try:
        yield
    except (StudyError, MergeError, ObjectiveError):
        raise
    except _ERRORS as error:
        raise damaged(where, printable(reason(error))) from error
