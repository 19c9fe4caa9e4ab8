"""Text of users, files and models in rich's markup."""

from __future__ import annotations

from rich.markup import escape

from objectives.base import printable


def shown(text: str) -> str:
    """Return text that rich prints as it is: no markup in it, and control characters visible."""
    return escape(printable(text))
