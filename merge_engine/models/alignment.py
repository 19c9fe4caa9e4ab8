"""Match the stored tensors of models that use different names for them.

Checkpoints of one architecture come in several layouts, a text-only fine-tune lacks the prefix of
its multimodal base, and an adapter uses the names of the live model. They are matched by where they
go in the live model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merge_engine.errors import MergeError
from merge_engine.models.architecture import load_config, make_without_weights
from merge_engine.models.conversion import find_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT_TOWER = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.(?=\w))?")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that is its text model's; of a text-only one, the whole."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def text_type(config: Mapping[str, Any]) -> str | None:
    """Return the model type of a config's text model."""
    found = text_config(config).get("model_type")
    return found if isinstance(found, str) else None


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Return whether a config's text model is one part of several."""
    return isinstance(config.get("text_config"), dict)


def live_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the name of the live tensor that each of a model's stored tensors goes into.

    Tensors that are not known to go into any keep their own name.

    Args:
        folder: The model's folder.
        names: Of the stored tensors.
    """
    model = _without_weights(folder)
    slots = find_slots(model, names) if model is not None else {}
    return {name: slots[name].live if name in slots else name for name in names}


def _without_weights(folder: Path) -> PreTrainedModel | None:
    try:
        return make_without_weights(load_config(folder), torch.float32)
    except Exception:  # no type that transformers has tables for; each config class raises its own
        return None


def match_names(folder: Path, own: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Match another model's tensor names with a model's stored tensors.

    Args:
        folder: The model's folder.
        own: Names of its stored tensors.
        others: Names in another layout.

    Returns:
        The model's names by the other's; names without a match are left out.

    Raises:
        MergeError: The other stores the experts of a layer as one tensor, and the model does not,
            or the other way round.
    """
    model = _without_weights(folder)
    if model is None:
        return {name: name for name in others if name in set(own)}
    mine = {slot: name for name, slot in find_slots(model, own).items()}
    made = {slot.live for slot in mine}
    layouts = {(slot.live, slot.pattern) for slot in mine}
    decoder = model.get_decoder()
    prefix = next((name for name, each in model.named_modules() if each is decoder), "")
    found: dict[str, str] = {}
    left = list(others)
    for renamed in (
        {name: name for name in left},
        {f"{prefix}.{name.removeprefix('model.')}": name for name in left},
        {_without_tower(name): name for name in left},
    ):
        slots = find_slots(model, [each for each, name in renamed.items() if name not in found])
        for each, slot in slots.items():
            if slot in mine:
                found[renamed[each]] = mine[slot]
            elif slot.live in made and (slot.live, slot.pattern) not in layouts:
                raise MergeError(
                    f"one model stores {renamed[each]!r}, of which another stores the parts; load "
                    "the first with transformers and save it again, so that both have one layout"
                )
    return found


def _without_tower(name: str) -> str:
    """Return a text tensor's name in a multimodal model as a text-only model has it."""
    rest = _TEXT_TOWER.sub("", name)
    if rest == name or rest.startswith("lm_head."):
        return rest
    return f"model.{rest}"
