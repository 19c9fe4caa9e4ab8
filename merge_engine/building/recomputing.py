"""Gradient checkpointing: recompute a layer's activations in its backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Store only each layer's inputs during forward passes inside the block.

    Unlike transformers' own gradient checkpointing it works in evaluation mode, without dropout.
    Key-value caches have to be off.
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
