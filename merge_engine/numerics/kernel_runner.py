"""One pass: a kernel run over rows of numbers and written straight into the result.

Compiled, the kernel, the casts and the noise become one loop that reads every input once and writes
the output once. Without a compiler, or where compiling would cost more than it saves, the same
functions run in chunks small enough that what is between two steps stays in the cache.
"""

from __future__ import annotations

import functools
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from merge_engine.numerics.noise import Noise, drawn, weyl
from merge_engine.numerics.packing import WIDTH

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
Kernel = Callable[..., Tensor]
CHUNK = 1 << 16
PAYS = 2_000_000_000  # merged numbers from which on compiling (some seconds, once) is worth it
# Every intermediate result is wanted in registers: one that inductor keeps in memory, as it does
# with those used often, also halves how many 16-bit numbers it takes at a time.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
}


def compiling_pays(parameters: int, candidates: int) -> bool:
    """Whether so many candidates of so many parameters should be merged by compiled kernels."""
    can = torch.cuda.is_available() or shutil.which("g++") is not None
    return can and parameters * candidates >= PAYS


class KernelRunner:
    """Runs kernels over rows of WIDTH numbers: pages, or any tensor, cut into rows and a rest.

    A kernel's other values are numbers, for the whole tensor or one a row, (rows, 1); n of either;
    flags; and n tensors with a number for every element, of which a kernel gets the same stretch.

    Args:
        compiled: Through ``torch.compile``; else in chunks.
    """

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        if compiled:  # kernels, numbers of donors and dtypes share one function: more than its 8
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
            # Shares are of one 16-bit type and weights may be of the other, which is meant.
            warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")

    def write(
        self,
        out: Tensor,
        kernel: Kernel,
        inputs: tuple[Tensor | None, Sequence[Tensor]],
        values: Mapping[str, Any],
        noise: Noise | None = None,
    ) -> None:
        """Write ``kernel(base, donors, **values)`` into ``out``, rounded to its dtype.

        Args:
            out: Contiguous, any shape; what it is rounded to.
            kernel: Works on any rows of the tensors.
            inputs: The base, if the kernel has one, and the donors, of ``out``'s shape.
            values: The kernel's other arguments, as the class has them.
            noise: If the kernel takes noise, what it follows from.
        """
        self._each(_write, kernel, _Rows.of(inputs, values, noise, out.view(-1)))

    def sums(
        self,
        kernel: Kernel,
        inputs: tuple[Tensor | None, Sequence[Tensor]],
        values: Mapping[str, Any],
        noise: Noise | None = None,
    ) -> Tensor:
        """What a kernel adds up along each row.

        Args:
            kernel: Gives k sums for each of some rows, (k, rows).
            inputs: As of ``write``.
            values: As of ``write``.
            noise: As of ``write``.

        Returns:
            (k, rows) float64, for every row of WIDTH elements and the rest.
        """
        found = self._each(_measure, kernel, _Rows.of(inputs, values, noise, None))
        return torch.cat(found, 1) if found else torch.zeros(1, 0, dtype=torch.float64)

    def _each(
        self,
        make: Callable[[Kernel], Callable[..., T]],
        kernel: Kernel,
        whole: _Rows,
    ) -> list[T]:
        """Run over all rows: compiled if that is wanted and there is more than one, or in chunks.

        A compiler would make one row a case of its own, and the rest is never more than one.
        """
        done: list[T] = []
        for rows in whole.split():
            if self.compiled and rows.count > 1:
                try:
                    done.append(self._compiled(make, kernel)(*rows.arguments()))
                    continue
                except torch._dynamo.exc.BackendCompilerFailed as error:
                    reason = str(error).splitlines()[0]
                    _LOG.warning("kernels are not compiled but run in chunks: %s", reason)
                    self.compiled = False
            run = make(kernel)
            done += [run(*chunk.arguments()) for chunk in rows.chunks()]
        return done

    @functools.cache  # noqa: B019  one Stream lives as long as its family
    def _compiled(
        self, make: Callable[[Kernel], Callable[..., T]], kernel: Kernel
    ) -> Callable[..., T]:
        return torch.compile(make(kernel), dynamic=True, options=_OPTIONS)


@dataclass(frozen=True)
class _Rows:
    """Rows of all that one call is about: (rows, width) each, and one number a row (rows, 1)."""

    out: Tensor | None
    base: Tensor | None
    donors: list[Tensor]
    values: dict[str, Any]
    noise: Noise | None

    @classmethod
    def of(
        cls,
        inputs: tuple[Tensor | None, Sequence[Tensor]],
        values: Mapping[str, Any],
        noise: Noise | None,
        out: Tensor | None,
    ) -> _Rows:
        """Everything flattened, as one long row; numbers as tensors, no constants to a compiler."""
        base, donors = inputs
        device = donors[0].device
        return cls(
            None if out is None else out.view(1, -1),
            None if base is None else base.reshape(1, -1),
            [donor.reshape(1, -1) for donor in donors],
            {name: _tensors(value, donors[0].numel(), device) for name, value in values.items()},
            noise,
        )

    @property
    def count(self) -> int:
        return self.donors[0].shape[0]

    def split(self) -> Iterator[_Rows]:
        """The one long row as rows of WIDTH and the rest, as far as there are any."""
        size = self.donors[0].shape[1]
        count, rest = divmod(size, WIDTH)
        if count:
            yield self._map(
                lambda tensor: tensor[:, : count * WIDTH].view(count, WIDTH), slice(0, count)
            )
        if rest:
            yield self._map(lambda tensor: tensor[:, count * WIDTH :], slice(count, None))

    def chunks(self) -> Iterator[_Rows]:
        """A few rows at a time."""
        step = max(1, CHUNK // WIDTH)
        for start in range(0, self.count, step):
            part = slice(start, start + step)
            yield self._map(lambda tensor, part=part: tensor[part], part)  # type: ignore[misc]

    def _map(self, cut: Callable[[Tensor], Tensor], rows: slice) -> _Rows:
        """Tensors by element through ``cut``, of what there is one number a row the ``rows``."""
        wide = self.donors[0].shape[1]

        def part(value: Any) -> Any:
            if isinstance(value, list):
                return [part(each) for each in value]
            if not torch.is_tensor(value) or not value.dim():
                return value
            return cut(value) if value.shape[1] == wide > 1 else value[rows]

        return _Rows(
            None if self.out is None else cut(self.out),
            None if self.base is None else cut(self.base),
            [cut(donor) for donor in self.donors],
            {name: part(value) for name, value in self.values.items()},
            None if self.noise is None else self.noise.rows(rows),
        )

    def arguments(self) -> tuple[Any, ...]:
        """What a kernel's runner takes."""
        noise = None
        if self.noise is not None:
            columns = _columns(self.donors[0].shape[1], self.donors[0].device)
            noise = (self.noise.first, columns, self.noise.keys, self.noise.even)
        return self.out, self.base, self.donors, noise, self.values


@functools.lru_cache(maxsize=64)
def _columns(width: int, device: torch.device) -> Tensor:
    return weyl(torch.arange(width, dtype=torch.int32, device=device))


def _write(kernel: Kernel) -> Callable[..., None]:
    def write(out: Tensor, *arguments: Any) -> None:
        out.copy_(_run(kernel, *arguments))

    return write


def _measure(kernel: Kernel) -> Callable[..., Tensor]:
    def measure(_out: None, *arguments: Any) -> Tensor:
        return _run(kernel, *arguments).double()

    return measure


def _run(
    kernel: Kernel,
    base: Tensor | None,
    donors: list[Tensor],
    noise: tuple[Tensor, Tensor, Any, bool] | None,
    values: dict[str, Any],
) -> Tensor:
    if noise is None:
        return kernel(base, donors, **values)
    first, columns, keys, even = noise
    return kernel(base, donors, **values, noise=drawn(Noise(first, keys, even), columns))


def _tensors(value: Any, size: int, device: torch.device) -> Any:
    """A kernel's value with its numbers as tensors of 32 bits and what is by element as one row."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_tensors(each, size, device) for each in value]
    if not torch.is_tensor(value):
        dtype = torch.int32 if isinstance(value, int) else torch.float32
        return torch.tensor(value, dtype=dtype, device=device)
    return value.reshape(1, -1) if value.numel() == size else value
