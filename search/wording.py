"""Format numbers and names for people: durations, percentages, intervals, short names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from objectives.base import printable
from objectives.scores import Interval

UNTUNED: Final = "untuned"  # name of the best recipe whose weights were not tuned by gradient
COMPARED: Final = ("base", "uniform", UNTUNED, "winner")  # names beside the donors' in a table
OWN_TEMPLATE: Final = "under its own chat template"  # marks such scores of a donor
MAX_LETTERS: Final = 1500  # of a prompt or a response


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(share: float, sign: str = "") -> str:
    """Format a share in per cent without the unit; ``sign`` "+" also marks positive numbers."""
    return f"{100 * share:{sign}.1f}"


def bracketed(one: Interval, sign: str = "") -> str:
    """Format a mean and its interval in per cent: ``87.1 [84.9, 89.3]``."""
    return f"{percent(one.mean, sign)} [{percent(one.low, sign)}, {percent(one.high, sign)}]"


def plus_minus(one: Interval, sign: str = "") -> str:
    """Format a mean and half the width of its interval in per cent: ``87.1 ± 2.2``."""
    return f"{percent(one.mean, sign)} ± {percent((one.high - one.low) / 2)}"


def short_names(names: Iterable[str], separator: str) -> dict[str, str]:
    """Map each name to its last part, or to all of it where the last part is not unique."""
    short = {name: name.rsplit(separator, 1)[-1] for name in names}
    count = Counter([*short.values(), *COMPARED])
    return {name: last if count[last] == 1 else name for name, last in short.items()}


def shortened(text: str, most: int) -> str:
    """Cut the middle out of a text that has more than ``most`` letters."""
    if len(text) <= most:
        return text
    head = (most - 1) // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def printable_lines(text: str) -> str:
    """Shorten untrusted text and escape what is not printable, but keep its lines."""
    return shortened("\n".join(map(printable, text.split("\n"))), MAX_LETTERS)
