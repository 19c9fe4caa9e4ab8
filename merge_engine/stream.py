"""One pass: a kernel run over flat tensors and written straight into the result.

Compiled, the kernel, the casts and the noise become one loop that reads every input once and writes
the output once. Without a compiler, or where compiling would cost more than it saves, the same
functions run in chunks small enough that what is between two steps stays in the cache.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_engine.noise import halves, hashed, spread

Kernel = Callable[..., Tensor]
CHUNK = 1 << 16
BLOCK = 1 << 31  # positions within one key of the noise
PAYS = 2_000_000_000  # merged numbers from which on compiling (some seconds, once) is worth it


def compiling_pays(parameters: int, candidates: int) -> bool:
    """Whether so many candidates of so many parameters should be merged by compiled kernels."""
    can = torch.cuda.is_available() or shutil.which("g++") is not None
    return can and parameters * candidates >= PAYS


class Stream:
    """Runs kernels over flat tensors.

    Args:
        compiled: Through ``torch.compile``; else in chunks.
    """

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        if compiled:  # kernels, numbers of donors and dtypes share one function: more than its 8
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)

    def write(
        self,
        out: Tensor,
        kernel: Kernel,
        inputs: tuple[Tensor | None, Sequence[Tensor]],
        values: Mapping[str, Any],
        keys: Sequence[int] | None = None,
        even: bool = False,
    ) -> None:
        """Write ``kernel(base, donors, **values)`` into ``out``, rounded to its dtype.

        Args:
            out: Contiguous, any shape; what it is rounded to.
            kernel: Works on any stretch of the flattened tensors.
            inputs: The base, if the kernel has one, and the donors, of ``out``'s shape.
            values: The kernel's other arguments: numbers, one or n of them, and flags.
            keys: Of each donor's noise, if the kernel takes noise.
            even: The noise has only to be even, not random.
        """
        base, donors = inputs
        flat_base = None if base is None else base.reshape(-1)
        flat = [donor.reshape(-1) for donor in donors]
        target, arguments = out.view(-1), _tensors(values, out.device)
        for start, stop in self._pieces(target.numel()):
            part = slice(start, stop)
            drawn = _keys(keys, start, out.device)
            compiled = self.compiled and stop - start > 1
            write = self._compiled(kernel, even) if compiled else _write(kernel, even)
            write(
                target[part],
                None if flat_base is None else flat_base[part],
                [donor[part] for donor in flat],
                drawn,
                arguments,
            )

    def kept_mass(
        self, base: Tensor, donor: Tensor, key: int, chance: float
    ) -> tuple[float, float]:
        """L1 norm of ``donor - base``, and of its elements whose noise is below ``chance``."""
        totals = torch.zeros(2, dtype=torch.float64, device=base.device)
        flat_base, flat = base.reshape(-1), donor.reshape(-1)
        below = torch.tensor(chance, dtype=torch.float32, device=base.device)
        measure = self._compiled_mass() if self.compiled else _mass
        for start in range(0, flat.numel(), 1 << 20):
            part = slice(start, min(start + (1 << 20), flat.numel()))
            drawn = _keys([key], start, base.device)
            assert drawn is not None
            totals += measure(flat_base[part], flat[part], drawn, below)
        before, after = totals.tolist()
        return before, after

    def _pieces(self, size: int) -> list[tuple[int, int]]:
        step = BLOCK if self.compiled else CHUNK
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    @functools.cache  # noqa: B019  one Stream lives as long as its family
    def _compiled(self, kernel: Kernel, even: bool) -> Callable[..., None]:
        return torch.compile(_write(kernel, even), dynamic=True)

    @functools.cache  # noqa: B019
    def _compiled_mass(self) -> Callable[..., Tensor]:
        return torch.compile(_mass, dynamic=True)


def _write(kernel: Kernel, even: bool) -> Callable[..., None]:
    def write(
        out: Tensor,
        base: Tensor | None,
        donors: list[Tensor],
        keys: Tensor | None,
        values: dict[str, Any],
    ) -> None:
        drawn = {}
        if keys is not None:
            places = torch.arange(out.shape[0], dtype=torch.int32, device=out.device)
            if even:  # one sequence for all donors: it has to be fair, not independent
                drawn["noise"] = [spread(places + keys[0, 0])] * len(donors)
            else:
                drawn["noise"] = [hashed(places + key[0], key[1], key[2]) for key in keys]
        out.copy_(kernel(base, donors, **values, **drawn))

    return write


def _mass(base: Tensor, donor: Tensor, keys: Tensor, chance: Tensor) -> Tensor:
    size = (donor.float() - base.float()).abs()
    places = torch.arange(size.shape[0], dtype=torch.int32, device=size.device)
    drawn = hashed(places + keys[0, 0], keys[0, 1], keys[0, 2])
    return torch.stack([size.sum(), torch.where(drawn < chance, size, 0.0).sum()]).double()


def _keys(keys: Sequence[int] | None, start: int, device: torch.device) -> Tensor | None:
    """For each donor: the first position and both halves of its key, (n, 3) int32."""
    if keys is None:
        return None
    block, first = divmod(start, BLOCK)
    rows = [[first, *halves(key, block)] for key in keys]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _tensors(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Numbers as float32 tensors, which a compiler takes for data; flags as they are."""
    return {
        name: value
        if isinstance(value, bool)
        else torch.tensor(value, dtype=torch.float32, device=device)
        for name, value in values.items()
    }
