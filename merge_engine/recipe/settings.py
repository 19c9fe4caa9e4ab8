"""Settings of a recipe, and the value that each has for a tensor.

As in mergekit a setting is a scalar; a list of scalars (a gradient over depth); ``{filter, value}``
for the tensors whose name contains ``filter``; or a list of such clauses, of which the first that
matches is used. Here ``filter`` may also be a list of parts of names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

Scalar = float | int | bool | str
Raw = object  # as PyYAML gives it

_LARGEST = 2**63  # of whole numbers


@dataclass(frozen=True)
class Clause:
    """The values for all tensors whose name contains ``filter``; None: all tensors."""

    filter: str | None
    values: tuple[Scalar, ...]  # one constant, or a gradient over depth


@dataclass(frozen=True)
class Setting:
    """Clauses, of which the first that matches a tensor's name is used."""

    clauses: tuple[Clause, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether all tensors have the same value: no filter, no gradient over depth."""
        return all(each.filter is None and len(each.values) == 1 for each in self.clauses)

    @functools.cached_property
    def first_matches(self) -> FirstMatches:
        """The number of the clause that is used, by a tensor's name."""
        return _first_matches(tuple(clause.filter for clause in self.clauses))


class FirstMatches(dict[str, int | None]):
    """Cache from a tensor's name to the number of the first filter that it contains."""

    def __init__(self, filters: Sequence[str | None]) -> None:
        self._filters = filters

    def __missing__(self, name: str) -> int | None:
        """Search for the first filter; None: the name contains none."""
        matching = (n for n, each in enumerate(self._filters) if each is None or each in name)
        self[name] = next(matching, None)
        return self[name]


# Cached because a recipe may have thousands of filters, and all donors and all recipes of a study
# have the same ones.
_first_matches = functools.lru_cache(maxsize=64)(FirstMatches)


def parse_setting(raw: Raw) -> Setting:
    """Parse a setting, as YAML gives it.

    Raises:
        ValueError: ``raw`` is neither a scalar, a gradient, a clause nor a list of clauses.
    """
    if isinstance(raw, list) and any(isinstance(part, dict) for part in raw):
        return Setting(tuple(clause for part in raw for clause in _parse_clause(part)))
    return Setting(_parse_clause(raw))


def _parse_clause(raw: Raw) -> tuple[Clause, ...]:
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
    if any(isinstance(value, int) and abs(value) > _LARGEST for value in values):
        raise ValueError("a whole number of it is too large; expected a small one")
    return values


def dump_setting(setting: Setting) -> Raw:
    """Return a setting as YAML has it; the inverse of ``parse_setting``."""
    first, *others = setting.clauses
    if not others and first.filter is None:
        return _dump_values(first.values)
    return [_dump_clause(clause) for clause in setting.clauses]


def _dump_clause(clause: Clause) -> Raw:
    value = _dump_values(clause.values)
    return {"value": value} if clause.filter is None else {"value": value, "filter": clause.filter}


def _dump_values(values: tuple[Scalar, ...]) -> Raw:
    return values[0] if len(values) == 1 else list(values)


def value_at(setting: Setting, name: str, depth: float) -> Scalar | None:
    """Return the value of a setting for one tensor; None if no clause matches its full name.

    A gradient of numbers is interpolated linearly, one of words or booleans is a step function of
    the relative depth of the tensor's layer: from 0 (first layer, and tensors outside the layers)
    to 1 (last layer, and the only layer of a slice of one).
    """
    if (number := setting.first_matches[name]) is None:
        return None
    values = setting.clauses[number].values
    return values[0] if len(values) == 1 else _interpolate(values, depth)


def _interpolate(values: Sequence[Scalar], depth: float) -> Scalar:
    position = depth * (len(values) - 1)
    left = int(position)
    low, high = values[left], values[min(left + 1, len(values) - 1)]
    if isinstance(low, bool | str) or isinstance(high, bool | str):
        return low
    share = position - left
    return (1 - share) * low + share * high
