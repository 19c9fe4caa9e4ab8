"""Escape untrusted text for rich's markup."""

from __future__ import annotations

from rich.markup import escape

from objectives.base import printable


def shown(text: str) -> str:
    """Return text that rich prints verbatim, with control characters made visible."""
    return escape(printable(text))
