"""What a row of the METHODS table says of a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from merge_engine.methods.preparation import Prepare

Value = float | int | bool
Values = Mapping[str, Value | tuple[Value, ...]]  # one per tensor, or one per donor


class Base(Enum):
    """What the base model is to a method."""

    ORIGIN = "origin"  # task vectors start from it
    OPTIONAL = "optional"  # the same if it is named; else the tensors themselves are merged
    ENDPOINT = "endpoint"  # one of the models that are merged, and it comes first
    INPUT = "input"  # nothing special: named, it is one more model with settings of its own


@dataclass(frozen=True)
class Param:
    """One parameter of a method.

    Args:
        kind: Its type. Words of YAML ("1e-2", "false") are converted as far as they are exact.
        default: None if it has to be given.
        per_donor: One value for each donor, else one for each tensor.
        valid: The closed range of legal values.
        search: The range a study searches when the user names none; None: the default is kept.
        effect: False if it is accepted because mergekit has it, and changes nothing.
    """

    kind: type[float] | type[int] | type[bool]
    default: Value | None = None
    per_donor: bool = False
    valid: tuple[float, float] = (-math.inf, math.inf)
    search: tuple[float, float] | None = None
    effect: bool = True

    def typed(self, value: object) -> Value:
        """``value`` as this parameter's type.

        Raises:
            ValueError: It is of another type, or outside the legal range.
        """
        number = _boolean(value) if self.kind is bool else self._number(value)
        if not self.valid[0] <= number <= self.valid[1]:
            raise ValueError(f"{value!r} is outside [{self.valid[0]:g}, {self.valid[1]:g}]")
        return number

    def _number(self, value: object) -> float | int:
        try:
            number = float(value)  # type: ignore[arg-type]  # refused just below
        except (TypeError, ValueError):
            raise ValueError(f"{value!r} is not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not a finite number")
        if self.kind is int and number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return self.kind(number)


def _boolean(value: object) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (word := str(value).lower()) not in known:
        raise ValueError(f"{value!r} is neither true nor false")
    return known[word]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A merge method, as the rest of the system has to know it.

    Args:
        base: What the base model is to it.
        donors: Fewest and most models besides the base task vectors start from (None: no limit).
        params: Its parameters by mergekit's names.
        paper: Where it is from.
    """

    base: Base
    donors: tuple[int, int | None]
    params: Mapping[str, Param]
    paper: str


@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    """A method whose result is a weighted sum of its inputs.

    Args:
        coefficients: ``coefficients(gram, **values)`` gives the factor of each task vector if the
            task vectors start from a base, else of each tensor: (n,), or (rows, n).
        gram: Whether they need the inner products of what they are the factors of.
        layout: Names of the parameters that say along what the inner products run; the
            coefficients are not told.
        dim: ``dim(**layout)`` is the dimension along which every row has inner products, and so
            coefficients, of its own; None: there is one product over the whole tensor.
    """

    coefficients: Callable[..., Tensor]
    gram: bool = False
    layout: tuple[str, ...] = ()
    dim: Callable[..., int | None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Elementwise(Method):
    """A method that works element by element, so on any stretch of flattened tensors.

    Args:
        kernel: ``kernel(base, donors, **values)`` gives the merged tensor in float32; it can be
            given any stretch of the flattened tensors.
        prepare: Makes the kernel's values of the parameters', if they differ.
        random: The kernel also takes ``noise``: for each donor uniform numbers of its shape.
        beside: Name of what the kernel also takes for each donor, a number for every element that
            depends on donor and base alone: one of ``ModelSet.beside``.
    """

    kernel: Callable[..., Tensor]
    prepare: Prepare | None = None
    random: bool = False
    beside: str | None = None
