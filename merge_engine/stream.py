"""One pass: a kernel run over flat tensors and written straight into the result.

Compiled, the kernel, the casts and the noise become one loop that reads every input once and writes
the output once. Without a compiler, or where compiling would cost more than it saves, the same
functions run in chunks small enough that what is between two steps stays in the cache.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from merge_engine.noise import halves, hashed, spread
from merge_engine.statistics import rank_share

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
Kernel = Callable[..., Tensor]
CHUNK = 1 << 16
SUMMED = 1 << 20  # elements that are summed in float32; the sums of those are in float64
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
            values: The kernel's other arguments: numbers, one or n of them, flags, and lists of
                tensors of ``out``'s shape, of which the kernel gets the same stretch.
            keys: Of each donor's noise, if the kernel takes noise.
            even: The noise has only to be even, not random.
        """
        target = out.view(-1)
        flat = _flat(inputs, values, out.device)

        def run(write: Callable[..., None], step: int) -> None:
            for start, stop in _pieces(target.numel(), step):
                write(target[start:stop], *flat(start, stop, keys))

        if target.numel() < 2:  # a compiler would make one element a case of its own
            run(_write(kernel, even), CHUNK)
            return
        self._prefer_compiled(
            lambda: run(self._compiled(_write, kernel, even), BLOCK),
            lambda: run(_write(kernel, even), CHUNK),
        )

    def total(
        self,
        kernel: Kernel,
        inputs: tuple[Tensor | None, Sequence[Tensor]],
        values: Mapping[str, Any],
        keys: Sequence[int] | None = None,
    ) -> Tensor:
        """Sum of ``kernel(base, donors, **values)`` over all stretches.

        Args:
            kernel: Gives k sums over a stretch of the flattened tensors, (k,).
            inputs: As of ``write``.
            values: As of ``write``.
            keys: As of ``write``.

        Returns:
            (k,) float64, on the CPU; one zero for a tensor without elements.
        """
        donor = inputs[1][0]
        flat = _flat(inputs, values, donor.device)

        def run(measure: Callable[..., Tensor]) -> Tensor:
            total = torch.zeros(1, dtype=torch.float64, device=donor.device)
            for start, stop in _pieces(donor.numel(), SUMMED):
                total = total + measure(*flat(start, stop, keys))
            return total.cpu()

        return self._prefer_compiled(
            lambda: run(self._compiled(_measure, kernel, False)), lambda: run(_measure(kernel))
        )

    def kept_mass(
        self,
        base: Tensor,
        donor: Tensor,
        key: int,
        chance: float,
        by_rank: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[float, float]:
        """L1 norm of ``donor - base``, and of its elements whose noise is below ``chance``.

        Args:
            base: Any shape (*s).
            donor: (*s).
            key: Of the noise.
            chance: Of every element, or of the smallest of a row.
            by_rank: Of better chances for larger elements ``ranks``, ``spread`` and ``last`` as
                della's kernel has them; empty if there are none.
        """
        if not donor.numel():
            return 0.0, 0.0
        before, after = self.total(_mass, (base, [donor]), {"chance": chance, **by_rank}, [key])
        return float(before), float(after)

    def _prefer_compiled(self, compiled: Callable[[], T], chunked: Callable[[], T]) -> T:
        """Do the work compiled; in chunks, and ever after, if the compiler does not work."""
        if self.compiled:
            try:
                return compiled()
            except torch._dynamo.exc.BackendCompilerFailed as error:
                reason = str(error).splitlines()[0]
                _LOG.warning("kernels are not compiled but run in chunks: %s", reason)
                self.compiled = False
        return chunked()

    @functools.cache  # noqa: B019  one Stream lives as long as its family
    def _compiled(self, run: Callable[..., Any], kernel: Kernel, even: bool) -> Callable[..., Any]:
        return torch.compile(run(kernel, even), dynamic=True)


def _flat(
    inputs: tuple[Tensor | None, Sequence[Tensor]], values: Mapping[str, Any], device: torch.device
) -> Callable[[int, int, Sequence[int] | None], tuple[Any, ...]]:
    """Flattened tensors; a function that cuts a stretch from all of them."""
    base, donors = inputs
    flat_base = None if base is None else base.reshape(-1)
    flat = [donor.reshape(-1) for donor in donors]
    beside = {name: value for name, value in values.items() if _by_element(value)}
    numbers = _tensors({k: v for k, v in values.items() if k not in beside}, device)
    flat_beside = {k: [tensor.reshape(-1) for tensor in v] for k, v in beside.items()}

    def cut(start: int, stop: int, keys: Sequence[int] | None) -> tuple[Any, ...]:
        part = slice(start, stop)
        return (
            None if flat_base is None else flat_base[part],
            [donor[part] for donor in flat],
            _keys(keys, start, device),
            numbers | {k: [tensor[part] for tensor in v] for k, v in flat_beside.items()},
        )

    return cut


def _by_element(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and torch.is_tensor(value[0])


def _pieces(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _write(kernel: Kernel, even: bool) -> Callable[..., None]:
    run = _with_noise(kernel, even)

    def write(out: Tensor, *arguments: Any) -> None:
        out.copy_(run(*arguments))

    return write


def _measure(kernel: Kernel, even: bool = False) -> Callable[..., Tensor]:
    run = _with_noise(kernel, even)

    def measure(*arguments: Any) -> Tensor:
        return run(*arguments).double()

    return measure


def _with_noise(kernel: Kernel, even: bool) -> Callable[..., Tensor]:
    def run(
        base: Tensor | None, donors: list[Tensor], keys: Tensor | None, values: dict[str, Any]
    ) -> Tensor:
        drawn = {}
        if keys is not None:
            places = torch.arange(donors[0].shape[0], dtype=torch.int32, device=donors[0].device)
            if even:  # one sequence for all donors: it has to be fair, not independent
                drawn["noise"] = [spread(places + keys[0, 0])] * len(donors)
            else:
                drawn["noise"] = [hashed(places + key[0], key[1], key[2]) for key in keys]
        return kernel(base, donors, **values, **drawn)

    return run


def _mass(
    base: Tensor,
    donors: list[Tensor],
    *,
    chance: Tensor,
    noise: list[Tensor],
    **by_rank: Any,
) -> Tensor:
    """L1 norms of one task vector and of what is kept of it, (2,), as della's kernel keeps it."""
    size = (donors[0].float() - base.float()).abs()
    if by_rank:
        share = rank_share(by_rank["ranks"][0], by_rank["last"])
        chance = chance + share * by_rank["spread"]
    return torch.stack([size.sum(), torch.where(noise[0] < chance, size, 0.0).sum()])


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
