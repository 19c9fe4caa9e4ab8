"""Run a kernel over rows of numbers, in one pass, and write the result in place.

Compiled, the kernel, the casts and the noise become one loop that reads every input once and writes
the output once. Without a compiler, or where compiling would cost more than it saves, the same
functions run in chunks small enough that intermediate results stay in the cache.
"""

from __future__ import annotations

import functools
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from merge_engine.numerics.noise import Noise, drawn, weyl
from merge_engine.numerics.packing import WIDTH

_LOG = logging.getLogger(__name__)
Kernel = Callable[..., Tensor]  # kernel(base, donors, **values), and `noise` if it takes noise
Inputs = tuple[Tensor | None, Sequence[Tensor]]  # base and donors
# A number for the whole tensor; one per row, (rows, 1); or one per element, of the donors' shape.
Argument = float | Tensor
Arguments = Mapping[str, Argument | Sequence[Argument]]  # by name; a sequence has one per donor
CHUNK = 1 << 16  # elements of a chunk that fits a CPU's cache
CHUNK_ON_GPU = 1 << 26  # launching kernels costs more than memory traffic
PAYS = 100_000_000  # merged parameters for which compiling a kernel, in some seconds, pays
KERNELS = 20  # about as many as a search over all methods runs
_Options = dict[str, str | int | bool | Callable[..., Any]]  # as torch.compile declares them
# Every intermediate result should stay in a register: one that inductor keeps in memory, as it does
# with those used often, also halves how many 16-bit numbers it processes at a time.
_OPTIONS: _Options = {
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
}
# On a GPU fused multiply-adds and inexact divisions would choose other elements where a kernel
# compares: with equal weights, where opposite task vectors cancel out, and among equals.
_OPTIONS_ON_GPU = _OPTIONS | {
    "realize_acc_reads_threshold": 1 << 20,
    "emulate_precision_casts": True,  # leaves multiply-adds in two steps
    "eager_numerics.division_rounding": True,
}


def compiling_pays(parameters: int, candidates: int) -> bool:
    """Return whether compiling saves time for ``candidates`` merges of ``parameters`` numbers.

    A single merge compiles one kernel, a search those of all methods that it tries.
    """
    can = torch.cuda.is_available() or shutil.which("g++") is not None
    return can and parameters * candidates >= PAYS * min(max(candidates, 1), KERNELS)


def configure_compiler() -> None:
    """Configure this process for compiled kernels; call it once, before the first one runs.

    Sets torch's ``recompile_limit`` and a warnings filter.
    """
    # Kernels, numbers of donors and dtypes share one compiled function, of more variants than 8.
    config = torch.compiler.config
    config.recompile_limit = max(256, config.recompile_limit)
    # Rank shares are of one 16-bit type and weights may be of the other: this is intended.
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")


def compiler_options(device: str) -> _Options:
    """Return inductor's options for kernels on a type of device."""
    return _OPTIONS if device == "cpu" else _OPTIONS_ON_GPU


class KernelRunner:
    """Runs kernels over packs, or over any tensor cut into rows of WIDTH numbers and a remainder.

    If ``compiled``, kernels run through ``torch.compile`` (see ``configure_compiler``); else in
    chunks.
    """

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self._compiled: dict[tuple[Kernel, str], Callable[..., Tensor | None]] = {}  # by device
        self._failed: set[tuple[Kernel, str]] = set()  # those that cannot be compiled

    def write(
        self,
        out: Tensor,
        kernel: Kernel,
        inputs: Inputs,
        values: Arguments,
        noise: Noise | None = None,
    ) -> None:
        """Write ``kernel(base, donors, **values)`` into ``out``, rounded to its dtype.

        ``noise`` defines the noise, if the kernel takes noise.
        """
        self._run(kernel, _Rows.flatten(inputs, values, noise, out))

    def sums(
        self, kernel: Kernel, inputs: Inputs, values: Arguments, noise: Noise | None = None
    ) -> Tensor:
        """Return a kernel's k sums over each row of WIDTH elements and the remainder, (k, rows).

        The kernel returns them for the rows that it is given. Arguments are those of ``write``.
        """
        found = self._run(kernel, _Rows.flatten(inputs, values, noise, None))
        sums = [part for part in found if part is not None]
        return torch.cat(sums, 1) if sums else torch.zeros(1, 0, dtype=torch.float64)

    def _run(self, kernel: Kernel, whole: _Rows) -> list[Tensor | None]:
        return [result for rows in whole.split() for result in self._run_rows(kernel, rows)]

    def _run_rows(self, kernel: Kernel, rows: _Rows) -> list[Tensor | None]:
        """Run over rows: compiled if there are several, else in chunks.

        The remainder of a tensor is a single row, on which the compiler would specialise.
        """
        run, key = _on_rows(kernel), (kernel, rows.donors[0].device.type)
        if self.compiled and rows.count > 1 and key not in self._failed:
            if key not in self._compiled:
                options = compiler_options(key[1])
                self._compiled[key] = torch.compile(run, dynamic=True, options=options)
            try:
                return [self._compiled[key](*rows.arguments())]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # the compiler's; the kernel's own is raised again below
                name, reason = kernel.__name__, str(error).splitlines()[0]
                _LOG.warning("%s is not compiled but runs in chunks: %s", name, reason)
                self._failed.add(key)
        return [run(*chunk.arguments()) for chunk in rows.chunks()]


@dataclass(frozen=True)
class _Rows:
    """Rows of a call's output, inputs and values: (rows, width) each, or (rows, 1)."""

    out: Tensor | None
    base: Tensor | None
    donors: list[Tensor]
    values: dict[str, Tensor | list[Tensor]]
    noise: Noise | None

    @classmethod
    def flatten(
        cls, inputs: Inputs, values: Arguments, noise: Noise | None, out: Tensor | None
    ) -> _Rows:
        """Flatten everything to one long row; numbers become tensors, which are not compiled in."""
        base, donors = inputs
        like = donors[0]
        return cls(
            None if out is None else out.view(1, -1),
            None if base is None else base.reshape(1, -1),
            [donor.reshape(1, -1) for donor in donors],
            {
                name: [_as_tensor(one, like) for one in value]
                if isinstance(value, Sequence)
                else _as_tensor(value, like)
                for name, value in values.items()
            },
            noise,
        )

    @property
    def count(self) -> int:
        return len(self.donors[0])

    def split(self) -> Iterator[_Rows]:
        """Yield the long row cut into rows of WIDTH, then the remainder; neither if empty."""
        size = self.donors[0].shape[1]
        count, rest = divmod(size, WIDTH)
        if count:
            yield self._map(
                lambda tensor: tensor[:, : count * WIDTH].view(count, WIDTH), slice(0, count)
            )
        if rest:
            yield self._map(lambda tensor: tensor[:, count * WIDTH :], slice(count, None))

    def chunks(self) -> Iterator[_Rows]:
        """Yield a few rows at a time."""
        on_cpu = self.donors[0].device.type == "cpu"
        step = max(1, (CHUNK if on_cpu else CHUNK_ON_GPU) // WIDTH)
        for start in range(0, self.count, step):
            part = slice(start, start + step)
            yield self._map(itemgetter(part), part)

    def _map(self, cut: Callable[[Tensor], Tensor], rows: slice) -> _Rows:
        """Apply ``cut`` to elementwise tensors; select ``rows`` of those with a number per row."""
        wide = self.donors[0].shape[1]

        def part(value: Tensor) -> Tensor:
            if not value.dim():
                return value
            return cut(value) if value.shape[1] == wide > 1 else value[rows]

        return _Rows(
            None if self.out is None else cut(self.out),
            None if self.base is None else cut(self.base),
            [cut(donor) for donor in self.donors],
            {
                name: [*map(part, value)] if isinstance(value, list) else part(value)
                for name, value in self.values.items()
            },
            None if self.noise is None else self.noise.rows(rows),
        )

    def arguments(self) -> tuple[object, ...]:
        """Return the arguments of an ``_on_rows`` function."""
        like = self.donors[0]
        offsets = _offsets(like.shape[1], like.device) if self.noise else None
        return self.out, self.base, self.donors, self.values, self.noise, offsets


@functools.lru_cache(maxsize=64)
def _offsets(width: int, device: torch.device) -> Tensor:
    """Return the positions within a row, for the noise."""
    return weyl(torch.arange(width, dtype=torch.int32, device=device))


def _on_rows(kernel: Kernel) -> Callable[..., Tensor | None]:
    """Return a function that draws the noise, runs the kernel, and writes the result to ``out``.

    Without an ``out`` it returns the result in float64.
    """

    def run(
        out: Tensor | None,
        base: Tensor | None,
        donors: list[Tensor],
        values: dict[str, Tensor | list[Tensor]],
        noise: Noise | None,
        offsets: Tensor,
    ) -> Tensor | None:
        if torch.compiler.is_compiling():  # the width is then a constant, and cheap to divide by
            assert donors[0].shape[1] == WIDTH
        drawn_noise = {} if noise is None else {"noise": drawn(noise, offsets)}
        result = kernel(base, donors, **values, **drawn_noise)
        if out is None:
            return result.double()
        out.copy_(result)
        return None

    return run


def _as_tensor(value: Argument, like: Tensor) -> Tensor:
    """Return a number as a 32-bit tensor beside ``like``; a tensor of as many elements as a row."""
    if isinstance(value, Tensor):
        return value.reshape(1, -1) if value.dim() and value.numel() == like.numel() else value
    dtype = torch.int32 if isinstance(value, int) else torch.float32
    return torch.tensor(value, dtype=dtype, device=like.device)
