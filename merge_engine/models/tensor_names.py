"""What a tensor's name says: its layer, and on which side of the layers it stands."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(r"((?:.*?\.)?(?:layers?|h|blocks?)\.)(\d+)\.(.*)", re.DOTALL)
_INPUT_SIDE = re.compile(r"(^|[._])(wte|wpe|embeddings?|embed(?!_out)\w*|\w+_embed\w*)([._]|$)")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")


class Place(NamedTuple):
    """A tensor inside a layer; its name is ``f"{stack}{layer}.{rest}"``."""

    stack: str
    layer: int
    rest: str


def place_of(name: str) -> Place | None:
    """Where in the layers a tensor stands; None outside of them."""
    match = _LAYER.fullmatch(name)
    return Place(match[1], int(match[2]), match[3]) if match else None


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has that these tensors' names tell of."""
    counts: dict[str, int] = {}
    for name in names:
        if place := place_of(name):
            counts[place.stack] = max(counts.get(place.stack, 0), place.layer + 1)
    return counts


def depth_in(layer: int, count: int) -> float:
    """Where a layer stands among ``count``: 0 the first, 1 the last, and 1 the only one."""
    return layer / (count - 1) if count > 1 else 1.0


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers feeds them (embeddings) or else comes after them."""
    return bool(_INPUT_SIDE.search(name))


def is_head_weight(name: str) -> bool:
    """Whether a tensor turns vectors into logits."""
    return bool(_HEAD.search(name)) and name.endswith("weight")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row for each token."""
    return bool(_HEAD.search(name) or _INPUT_EMBEDDING.search(name))


def input_embedding(names: Iterable[str]) -> str | None:
    """The tensor that turns tokens into vectors, which a tied head shares."""
    return next((name for name in names if _INPUT_EMBEDDING.search(name)), None)
