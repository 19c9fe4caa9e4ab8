"""Parse tensor names: the layer, or whether it is an embedding or a head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(r"((?:.*?\.)?(?:layers?|h|blocks?)\.)(\d+)\.(.*)", re.DOTALL)
_TEXT_STACK = re.compile(r"(^|\.)(language_model|text_model)\.")
_INPUT_SIDE = re.compile(r"(^|[._])(wte|wpe|embeddings?|embed(?!_out)\w*|\w+_embed\w*)([._]|$)")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")


class LayerPosition(NamedTuple):
    """Position of a tensor in a stack of layers; its name is ``f"{stack}{layer}.{rest}"``."""

    stack: str
    layer: int
    rest: str


def layer_position(name: str) -> LayerPosition | None:
    """Return the layer that a tensor belongs to; None outside of the layers."""
    match = _LAYER.fullmatch(name)
    return LayerPosition(match[1], int(match[2]), match[3]) if match else None


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers of each stack that occurs in the tensors' names."""
    counts: dict[str, int] = {}
    for name in names:
        if position := layer_position(name):
            counts[position.stack] = max(counts.get(position.stack, 0), position.layer + 1)
    return counts


def layer_filters(names: Iterable[str]) -> tuple[str, ...]:
    """Return for each layer the part of tensor names that only its tensors contain.

    For a multimodal model, these are the layers of the text model.
    """
    stacks = layer_counts(names)
    text = [stack for stack in stacks if _TEXT_STACK.search(stack)] or [*stacks]
    others = [stack for stack in stacks if stack not in text]
    count = max((stacks[stack] for stack in text), default=0)
    last = {layer: stack for stack in text for layer in range(stacks[stack])}
    return tuple(_shortest_end(last[layer], layer, others) for layer in range(count))


def _shortest_end(stack: str, layer: int, others: Iterable[str]) -> str:
    """Return the shortest end of a layer's prefix that occurs in no layer of other stacks."""
    parts = stack.rstrip(".").split(".")
    ends = [f"{'.'.join(parts[start:])}.{layer}." for start in reversed(range(len(parts)))]
    prefixes = [f"{other}{layer}." for other in others]
    return next((end for end in ends if not any(end in each for each in prefixes)), ends[-1])


def depth_in(layer: int, count: int) -> float:
    """Return the relative depth of a layer among ``count``: 0 first, 1 last, 1 the only one."""
    return layer / (count - 1) if count > 1 else 1.0


def is_before_layers(name: str) -> bool:
    """Return whether a tensor outside the layers is applied before them, as embeddings are."""
    return bool(_INPUT_SIDE.search(name))


def is_head_weight(name: str) -> bool:
    """Return whether a tensor is the weight of the output head."""
    return bool(_HEAD.search(name)) and name.endswith("weight")


def is_vocabulary(name: str) -> bool:
    """Return whether a tensor has one row for each token."""
    return bool(_HEAD.search(name) or _INPUT_EMBEDDING.search(name))


def input_embedding(names: Iterable[str]) -> str | None:
    """Return the name of the input embedding, which a tied head shares; None if there is none."""
    return next((name for name in names if _INPUT_EMBEDDING.search(name)), None)
