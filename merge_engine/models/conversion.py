"""Map a checkpoint's stored tensors to the tensors of a live model.

transformers may load tensors under other names, and several as one: the experts of a layer as a
stack, gate and up projections side by side. Its own conversion tables are applied in the direction
of loading, so an export keeps the layout of the checkpoint, whatever that is.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from merge_engine.errors import MergeError
from merge_engine.models.tensor_names import is_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Conversion:
    """Stored tensors, and the live tensors that they become."""

    # Stored tensors by pattern of the table, in the order in which they are joined.
    stored: Mapping[str, tuple[str, ...]]
    live: tuple[str, ...]  # names of the live tensors
    converter: WeightConverter | None = None  # what joins or splits them; None: one, renamed
    model: PreTrainedModel | None = None  # the converter's model

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors, in the order in which they are joined."""
        return tuple(name for names in self.stored.values() for name in names)

    def views(self, live: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the view of the live tensor that each stored tensor becomes.

        None if the conversion is more than a join; use ``convert`` then.
        """
        if self.converter is None:
            return {self.names[0]: live[self.live[0]]}
        joined = _joined_dims(self.converter)
        if joined is None or len(self.live) > 1:
            return None
        stacked, beside = joined
        lists, whole = list(self.stored.values()), live[self.live[0]]
        blocks = whole.chunk(len(lists), beside) if beside is not None else [whole]
        parts = [block.unbind(stacked) if stacked is not None else [block] for block in blocks]
        if [len(names) for names in lists] != [len(part) for part in parts]:
            return None
        return dict(zip(self.names, itertools.chain.from_iterable(parts), strict=True))

    def convert(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the live tensors of stored ones, as transformers makes them on loading."""
        if self.converter is None:
            return {self.live[0]: stored[self.names[0]]}
        converter = deepcopy(self.converter)
        first = self.live[0]
        for pattern, names in self.stored.items():
            for name in names:
                converter.add_tensor(first, name, pattern, stored[name])  # type: ignore[arg-type]
        found: dict[str, Any] = converter.convert(
            first, model=self.model, config=self.model.config if self.model else None
        )
        return {name: each[0] if isinstance(each, list) else each for name, each in found.items()}


def find_conversions(model: nn.Module, shapes: Shapes) -> list[Conversion]:
    """Return how a live model's tensors are made of stored ones of these names and shapes.

    Stored tensors that the model does not read are left out.

    Raises:
        MergeError: Stored tensors cannot be converted.
    """
    from transformers import PreTrainedModel

    targets = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        return [Conversion({name: (name,)}, (name,)) for name in shapes if name in targets]
    found = []
    for first, (converter, stored) in _renamed(model, targets, shapes).items():
        own = {pattern: tuple(names) for pattern, names in stored.items()}
        conversion = Conversion(own, (first,), converter, model)
        empty = {name: torch.empty(shapes[name], device="meta") for name in conversion.names}
        try:
            live = conversion.convert(empty)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise _not_made(first, conversion, str(error).splitlines()[0]) from None
        for name, tensor in live.items():
            if name in targets and tensor.shape != targets[name].shape:
                wanted, got = list(targets[name].shape), list(tensor.shape)
                rows = wanted[1:] == got[1:]
                raise _not_made(name, conversion, f"its shape is {wanted}, theirs make {got}", rows)
        found.append(replace(conversion, live=tuple(live)))
    return found


class Slot(NamedTuple):
    """Where a stored tensor goes in a live model."""

    live: str  # name of the live tensor that it becomes, or the first of several
    pattern: str | None  # of the converter, if there is one
    position: int  # among the stored tensors of that pattern


def find_slots(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Slot]:
    """Return where each stored tensor goes in a live model; unread ones are left out."""
    return {
        name: Slot(live, pattern if converter else None, position)
        for live, (converter, stored) in _renamed(model, model.state_dict(), names).items()
        for pattern, own in stored.items()
        for position, name in enumerate(own)
    }


def _not_made(
    live: str, conversion: Conversion, reason: str, rows_differ: bool = False
) -> MergeError:
    first, *others = conversion.names
    advice = "fetch the base again, or correct its config.json"
    if rows_differ and is_vocabulary(first):
        advice = (
            "say in the study which vocabulary it is to have, as in 'tokenizer: {source: base}', "
            "or correct the vocab_size in the base's config.json"
        )
    return MergeError(
        f"the live model's {live!r} cannot be made of {first!r}"
        f"{f' and {len(others)} more' if others else ''}: {reason}; {advice}"
    )


def _renamed(
    model: PreTrainedModel, targets: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, tuple[WeightConverter | None, dict[str, list[str]]]]:
    """Return the first live tensor of each conversion with its converter and stored tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    table = get_model_conversion_mapping(model)
    renamings = [each for each in table if isinstance(each, WeightRenaming)]
    converters = [each for each in table if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, state = model.base_model_prefix, dict(targets)
    found: dict[str, tuple[WeightConverter | None, dict[str, list[str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        live, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if live not in targets and name in targets:  # a table for another layout
            live, pattern = rename_source_key(name, [], [], prefix, state)
        if live not in targets:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        _, stored = found.setdefault(live, (converter, defaultdict(list)))
        stored[pattern or name].append(name)
    return {live: (each, _in_order(each, stored)) for live, (each, stored) in found.items()}


def _in_order(
    converter: WeightConverter | None, stored: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Return stored tensors by pattern, in the order of the converter's patterns."""
    if converter is None:
        return dict(stored)
    return {each: stored[each] for each in converter.source_patterns if each in stored}


def _joined_dims(converter: WeightConverter) -> tuple[int | None, int | None] | None:
    """Return the dimensions along which a converter stacks and concatenates tensors.

    None if it does anything else.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stacked = beside = None
    for operation in converter.operations:
        if isinstance(operation, MergeModulelist) and stacked is None and beside is None:
            stacked = operation.dim
        elif isinstance(operation, Concatenate) and beside is None:
            beside = operation.dim
        else:
            return None
    return stacked, beside
