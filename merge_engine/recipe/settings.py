"""Settings of a recipe, and the value that each has for a tensor.

As in mergekit a setting is a scalar; a list of scalars (a gradient over depth); ``{filter, value}``
for the tensors whose name contains ``filter``; or a list of such clauses, of which the first that
matches is used. Here ``filter`` may also be a list of parts of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Scalar = float | int | bool | str
Raw = object  # as PyYAML gives it


@dataclass(frozen=True)
class Clause:
    """The values for all tensors whose name contains ``filter``; None: all tensors."""

    filter: str | None
    values: tuple[Scalar, ...]  # one constant, or a gradient over depth


Setting = tuple[Clause, ...]


def parse_setting(raw: Raw) -> Setting:
    """Parse a setting, as YAML gives it.

    Raises:
        ValueError: ``raw`` is neither a scalar, a gradient, a clause nor a list of clauses.
    """
    if isinstance(raw, list) and any(isinstance(part, dict) for part in raw):
        return tuple(clause for part in raw for clause in _parse_clause(part))
    return _parse_clause(raw)


def _parse_clause(raw: Raw) -> Setting:
    """Return one clause, or one for each name of a list of filters."""
    if not isinstance(raw, dict):
        return (Clause(None, _parse_values(raw)),)
    if "value" not in raw or set(raw) - {"filter", "value"}:
        raise ValueError(f"{raw!r}: a clause has the keys 'value' and, optionally, 'filter'")
    names = raw.get("filter")
    values = _parse_values(raw["value"])
    return tuple(
        Clause(None if name in (None, "*") else _parse_filter(name), values)
        for name in (names if isinstance(names, list) and names else [names])
    )


def _parse_filter(raw: Raw) -> str:
    if not isinstance(raw, str | int):
        raise ValueError(f"{raw!r}: a filter is a part of tensors' names, like mlp, or a list")
    return str(raw)


def _parse_values(raw: Raw) -> tuple[Scalar, ...]:
    values = tuple(raw) if isinstance(raw, list) else (raw,)
    if not values or not all(isinstance(value, Scalar) for value in values):
        raise ValueError(f"{raw!r}: expected a number, a list of numbers or {{filter, value}}")
    return values


def dump_setting(setting: Setting) -> Raw:
    """Return a setting as YAML has it; the inverse of ``parse_setting``."""
    if len(setting) == 1 and setting[0].filter is None:
        return _dump_values(setting[0].values)
    return [
        {"value": _dump_values(clause.values)}
        | ({} if clause.filter is None else {"filter": clause.filter})
        for clause in setting
    ]


def _dump_values(values: tuple[Scalar, ...]) -> Raw:
    return values[0] if len(values) == 1 else list(values)


def value_at(setting: Setting, name: str, depth: float) -> Scalar | None:
    """Return the value of a setting for one tensor; None if no clause matches its full name.

    A gradient of numbers is interpolated linearly, one of words or booleans is a step function of
    the relative depth of the tensor's layer: from 0 (first layer, and tensors outside the layers)
    to 1 (last layer, and the only layer of a slice of one).
    """
    for clause in setting:
        if clause.filter is None or clause.filter in name:
            return _interpolate(clause.values, depth)
    return None


def _interpolate(values: Sequence[Scalar], depth: float) -> Scalar:
    if len(values) == 1:
        return values[0]
    position = depth * (len(values) - 1)
    left = int(position)
    low, high = values[left], values[min(left + 1, len(values) - 1)]
    if isinstance(low, bool | str) or isinstance(high, bool | str):
        return low
    share = position - left
    return (1 - share) * low + share * high
