"""Units: groups of tensors that share a weight, defined by filters on tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_engine.models.alignment import live_names
from merge_engine.models.model_set import ModelSet

Filters = tuple[str, ...]  # a name matches if it contains one of them, or if there are none


@dataclass(frozen=True)
class Units:
    """The units that the tensors of a result belong to."""

    filters: tuple[Filters, ...]  # of each unit; a tensor belongs to the first that matches
    index: Mapping[str, int]  # unit of each tensor, by name; tensors in no unit are missing

    def __len__(self) -> int:
        return len(self.filters)

    @classmethod
    def of_tensors(cls, names: Iterable[str]) -> Units:
        """Return one unit per tensor; names that contain another name come first."""
        ordered = sorted(names, key=lambda name: (-len(name), name))
        return cls(tuple((name,) for name in ordered), {name: n for n, name in enumerate(ordered)})

    @classmethod
    def of_layers(cls, models: ModelSet) -> Units:
        """Return one unit for each layer of the text, and a last one for all other tensors."""
        filters = [*((layer,) for layer in models.layer_filters), ()]
        return cls.of_filters(models.names, filters)

    @classmethod
    def of_filters(cls, names: Iterable[str], filters: Sequence[Filters]) -> Units:
        """Return units with these filters."""
        index = {}
        for name in names:
            matching = (n for n, own in enumerate(filters) if _matches(own, name))
            if (first := next(matching, None)) is not None:
                index[name] = first
        return cls(tuple(filters), index)

    def with_live_names(self, models: ModelSet) -> Units:
        """Return the units with filters that also match the live model's names of their tensors.

        mergekit matches filters with these names, all experts of a layer as one tensor, for types
        whose tensors transformers renames on loading.
        """
        found = [dict.fromkeys(own) for own in self.filters]
        live = live_names(models.reference.folder, self.index)
        for name, unit in self.index.items():
            if self.filters[unit] and not _matches(self.filters[unit], live[name]):
                found[unit][without_expert(live[name])] = None
        return replace(self, filters=tuple(map(tuple, found)))


def without_expert(name: str) -> str:
    """Return an expert tensor's name up to ``.experts.``, other names unchanged."""
    return re.sub(r"(\.experts\.).*", r"\1", name)


def _matches(filters: Filters, name: str) -> bool:
    return not filters or any(each in name for each in filters)
