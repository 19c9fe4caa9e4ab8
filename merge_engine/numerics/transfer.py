"""Copy tensors to the device that builds; the host waits for none of a GPU's work.

A GPU copies alone, while the host does other things, only from page-locked ("pinned") memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

STAGED = 32 << 20  # bytes of a staging buffer: a GPU copies them in about a millisecond


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a GPU copies it beside its other work (``Copier``)."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return _copier(device).copy(tensor)


def send_numbers(numbers: Tensor, device: torch.device) -> Tensor:
    """Return a few numbers on a device; a GPU copies them in the order of its other work."""
    if device.type == "cuda" and numbers.device.type == "cpu":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


class Copier:
    """Copies tensors from the host to a device on a stream of its own.

    So the next tensors are copied while a kernel is still writing the last ones. A tensor that is
    not pinned, such as one mapped from a file, goes piece by piece through two pinned buffers: the
    host's threads fill one while the device copies the other. On a CPU nothing is pinned, and there
    is no stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(STAGED, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)
        ]
        self._copied: list[torch.cuda.Event | None] = [None, None]  # the last piece of each buffer

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device, to be used on the current stream."""
        source = tensor.contiguous()
        with torch.cuda.stream(self._stream):
            copied = torch.empty(source.shape, dtype=source.dtype, device=self._device)
            if source.is_pinned():
                copied.copy_(source, non_blocking=True)
            else:
                self._stage(source, copied)
        if self._stream is not None:
            work = torch.cuda.current_stream(self._device)
            work.wait_stream(self._stream)
            copied.record_stream(work)  # keeps its memory until `work` has read it
        return copied

    def _stage(self, source: Tensor, copied: Tensor) -> None:
        """Copy a tensor through the buffers, in turn."""
        pieces = (torch.split(_bytes(each), STAGED) for each in (source, copied))
        for number, (piece, out) in enumerate(zip(*pieces, strict=True)):
            buffer = self._buffers[number % 2][: len(piece)]
            if event := self._copied[number % 2]:
                event.synchronize()  # until then the device reads the buffer
            buffer.copy_(piece)
            out.copy_(buffer, non_blocking=True)
            if self._stream is not None:
                self._copied[number % 2] = self._stream.record_event()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


@functools.cache
def _copier(device: torch.device) -> Copier:
    return Copier(device)
