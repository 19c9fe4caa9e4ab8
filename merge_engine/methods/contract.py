"""The types of the METHODS table: methods, their parameters, and their functions' arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from merge_engine.numerics.order_statistics import Magnitudes, Variances

_LARGEST = 3.4e38  # of float32, in which all is computed

Value = float | int | bool
Values = Mapping[str, Value | tuple[Value, ...]]  # by argument name; a tuple: one per donor
Number = float | Tensor  # a tensor () is not compiled in, so a new value recompiles nothing
PerDonor = Sequence[Number] | Tensor  # n numbers, one for each donor


class Base(Enum):
    """The role of the base model in a method."""

    ORIGIN = "origin"  # task vectors are relative to it
    OPTIONAL = "optional"  # the same if it is given; else the tensors themselves are merged
    ENDPOINT = "endpoint"  # the first of the merged models
    INPUT = "input"  # if given, one more merged model with parameters of its own


@dataclass(frozen=True)
class Param:
    """One parameter of a method."""

    kind: type[float] | type[int] | type[bool]
    default: Value | None = None  # None: the parameter is required
    per_donor: bool = False  # one value for each donor, else one for each tensor
    valid: tuple[float, float] = (-math.inf, math.inf)  # closed range of legal values
    search: tuple[float, float] | None = None  # range of a study; None: the default is kept
    effect: bool = True  # False: mergekit has the parameter, but it has no effect

    def typed(self, value: object) -> Value:
        """Convert a value to the parameter's type, also from a string such as "1e-2" or "false".

        Raises:
            ValueError: The value is of another type, or outside the legal range.
        """
        number = _boolean(value) if self.kind is bool else self._number(value)
        if not self.valid[0] <= number <= self.valid[1]:
            raise ValueError(f"{value!r} is outside [{self.valid[0]:g}, {self.valid[1]:g}]")
        return number

    def _number(self, value: object) -> float | int:
        try:
            number = float(value)  # type: ignore[arg-type]  # refused just below
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{value!r} is not a number") from None
        if not abs(number) <= _LARGEST:
            raise ValueError(f"{value!r} is not a finite number of float32")
        if self.kind is int and number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return self.kind(number)


def _boolean(value: object) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (word := str(value).lower()) not in known:
        raise ValueError(f"{value!r} is neither true nor false")
    return known[word]


@dataclass(frozen=True)
class Parameters:
    """A method's parameters for one tensor, by argument name."""

    shared: Mapping[str, Value]  # one value for all donors
    per_donor: Mapping[str, tuple[Value, ...]]  # n values, one for each donor

    @classmethod
    def from_values(cls, values: Values, donors: Sequence[int]) -> Parameters:
        """Separate shared values from per-donor ones, and select the latter for these donors."""
        return cls(
            {name: value for name, value in values.items() if not isinstance(value, tuple)},
            {n: tuple(v[d] for d in donors) for n, v in values.items() if isinstance(v, tuple)},
        )


@dataclass(frozen=True)
class KernelValues:
    """A kernel's numbers for one tensor, by argument name."""

    scalars: Mapping[str, float]  # one number for the tensor
    per_donor: Mapping[str, tuple[float, ...]]  # n numbers, one for each donor
    # Only some of several equal elements are kept, so the kernel needs noise even if its method is
    # not random.
    has_ties: bool = False
    # `factor` still lacks the factor that restores each task vector's L1 norm under the mask.
    rescales: bool = False


class TaskVectors(Protocol):
    """Statistics of n donors' task vectors in one tensor."""

    @property
    def width(self) -> int:
        """Number of elements in a row (``row_width``)."""

    @property
    def variances(self) -> Variances:
        """Order statistics of the elements' variances over the donors."""

    def magnitudes(self, donor: int) -> Magnitudes:
        """Return order statistics of the magnitudes of one donor, 0 to n - 1."""

    def rescale_factor(self, donor: int, keep_probability: int) -> float:
        """Return the factor that restores a donor's L1 norm under its random mask (``norm_ratio``).

        Args:
            donor: 0 to n - 1.
            keep_probability: Of every element, in units of 1 / LEVELS.
        """

    def overlaps(self, epsilon: float) -> Tensor:
        """Count the elements that each donor changes by more than ``epsilon``.

        Returns:
            (2, n) float64: those no other donor changes, and those another one changes, too.
        """


# `sparsify(base, donors, **values)` returns what is kept of each task vector, n tensors (*s).
Sparsify = Callable[..., list[Tensor]]
Prepare = Callable[[Parameters, TaskVectors], KernelValues]
Combine = Callable[[Parameters, KernelValues], KernelValues]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A merge method."""

    base: Base
    donors: tuple[int, int | None]  # fewest and most, besides an ORIGIN base; None: no limit
    params: Mapping[str, Param]  # by mergekit's names
    paper: str  # link to its source
    # Whether the result is a sum of the inputs, or of their task vectors under a mask that does not
    # depend on the weights, each times its `weight` (and `lambda`, over the weights' sum if
    # `normalize`). `derivative` has the derivatives.
    differentiable: bool = False


@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    """A method whose result is a weighted sum of its inputs."""

    # `coefficients(gram, **values)` returns the coefficient of each task vector if there is an
    # origin, else of each tensor: (n,), or (rows, n).
    coefficients: Callable[..., Tensor]
    gram: bool = False  # whether the coefficients depend on the inputs' inner products
    # `dim(**values)` returns the dimension along which inner products run, so that each row has its
    # own coefficients; None: they run over the whole tensor.
    dim: Callable[..., int | None] = lambda: None
    dim_params: tuple[str, ...] = ()  # names of `dim`'s parameters; `coefficients` has the others


@dataclass(frozen=True, kw_only=True)
class Elementwise(Method):
    """A method whose result at an element depends on the inputs there, given their statistics.

    Its base is an ORIGIN, and by default it takes any number of donors.
    """

    base: Base = Base.ORIGIN
    donors: tuple[int, int | None] = (0, None)
    # `kernel(base, donors, **values)` returns the merged tensor in float32, for any part of the
    # flattened tensors.
    kernel: Callable[..., Tensor]
    # Computes the kernel's values from the parameters; None: they are the same.
    prepare: Prepare | None = None
    combine: Combine | None = None  # adds the values of the sum, if `prepare` leaves them out
    sparsify: Sparsify | None = None  # what the kernel adds up, if it is a `sparse_sum`
    random: bool = False  # the kernel takes `noise`: uniform numbers of each donor's shape
    # Name of a statistic of donor and base with a number for every element, which the kernel takes
    # for each donor: `rank_share` or `salience_mask`.
    elementwise_stat: str | None = None
