"""Train with less memory: a layer's activations are computed again when it goes backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Keep of each layer's activations the inputs alone, in passes that begin within.

    Unlike transformers' own gradient checkpointing it needs no training mode, in which dropout
    would be on. Caches of keys and values have to be off.
    """
    layers = [*_layers(model)]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the outermost lists of modules: the layers of every stack."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
