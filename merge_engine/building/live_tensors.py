"""Map stored tensors to where they are written in a live model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from merge_engine.errors import MergeError
from merge_engine.models.conversion import Conversion, Shapes, find_conversions
from merge_engine.models.tensor_names import is_head_weight
from merge_engine.numerics.packing import WIDTH


class LiveTensors:
    """Where each stored tensor of a live model is written.

    That is a live tensor, a part of one, or separate memory whose values ``convert`` moves into the
    model.

    Args:
        model: The live model.
        shapes: Shapes of the stored tensors, by name.

    Attributes:
        targets: Where each stored tensor is written, by name, if the model reads it.
        joined: Conversions that only rename or join stored tensors, by the live tensor's name.
        separate: Names of those that are tensors of their own, by dtype and device.
        runs: Names of those that lie end to end in one live tensor, in their order there.

    Raises:
        MergeError: The live model has a tensor that no stored one becomes.
    """

    def __init__(self, model: nn.Module, shapes: Shapes) -> None:
        self.targets: dict[str, Tensor] = {}
        self._live = _saved_tensors(model)
        self._converted: list[Conversion] = []
        self.joined: dict[str, Conversion] = {}
        self.separate: dict[object, list[str]] = defaultdict(list)
        self.runs: list[Sequence[str]] = []
        found = find_conversions(model, shapes)
        _check_read(self._live, model, found)
        for conversion in found:
            if not self._live.keys() & set(conversion.live):
                continue  # a tied head, or a buffer that is computed
            views = conversion.views(self._live)
            if views is None:
                like = self._live[conversion.live[0]]
                views = {name: like.new_empty(shapes[name]) for name in conversion.names}
                self._converted.append(conversion)
            else:
                self.joined[conversion.live[0]] = conversion
                if conversion.converter is not None:
                    self.targets |= {name: view.detach() for name, view in views.items()}
                    self.runs += _runs(views)
                    continue
            for name, target in views.items():
                self.targets[name] = target
                self.separate[target.dtype, target.device].append(name)

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Split a tensor like a live one (its gradient, say) into the parts of the stored ones.

        Empty if the live tensor is more than a join of stored ones.
        """
        joined = self.joined.get(name)
        return (joined.views({name: tensor}) if joined else None) or {}

    def convert(self) -> None:
        """Move the values in separate memory into the model."""
        for conversion in self._converted:
            stored = {name: self.targets[name] for name in conversion.names}
            for name, value in conversion.convert(stored).items():
                self._live[name].copy_(value)


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live parameters, tied ones once, and the buffers that checkpoints store."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    kept = model.state_dict().keys()
    return found | {name: each for name, each in model.named_buffers() if name in kept}


def _runs(views: Mapping[str, Tensor]) -> list[Sequence[str]]:
    """Return the names of views in their order in memory, if rows of a pack can be laid on them."""
    names = sorted(views, key=lambda name: views[name].storage_offset())
    fill_rows = all(view.numel() % WIDTH == 0 for view in views.values())
    return [names] if fill_rows and lie_end_to_end([views[name] for name in names]) else []


def lie_end_to_end(tensors: Sequence[Tensor]) -> bool:
    """Return whether each tensor of one storage begins where the one before it ends."""
    starts = [tensor.storage_offset() for tensor in tensors]
    ends = [tensor.storage_offset() + tensor.numel() for tensor in tensors]
    return starts[1:] == ends[:-1] and all(tensor.is_contiguous() for tensor in tensors)


def missing_tensors(model: nn.Module, shapes: Shapes) -> list[str]:
    """Name the tensors of a model that no stored one of these shapes fills.

    Raises:
        MergeError: Stored tensors do not fit the model's.
    """
    return _not_read(_saved_tensors(model), model, find_conversions(model, shapes))


def _not_read(
    live: Mapping[str, Tensor], model: nn.Module, found: Collection[Conversion]
) -> list[str]:
    read = {name for conversion in found for name in conversion.live}
    return sorted(live.keys() - read - dict(model.named_buffers()).keys())


def _check_read(
    live: Mapping[str, Tensor], model: nn.Module, found: Collection[Conversion]
) -> None:
    """Refuse live tensors that no stored one fills, and a stored head that the model ties."""
    read = {name: conversion for conversion in found for name in conversion.live}
    if missing := _not_read(live, model, found):
        raise MergeError(
            f"the live model has {missing[0]!r}, which the donors lack; fetch the base again, or "
            "name donors that were fine-tuned from it"
        )
    tied = (
        name
        for live_name, conversion in read.items()
        if live_name not in live
        for name in conversion.names
    )
    if heads := [name for name in tied if is_head_weight(name)]:
        raise MergeError(
            f"the merge has {heads[0]!r}, which the live model ties to its embedding; take an "
            "untied model for the base, or build a checkpoint (mergesearch build)"
        )
