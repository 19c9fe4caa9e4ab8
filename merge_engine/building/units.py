"""Units: groups of tensors that share a weight, each told by parts of its tensors' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from merge_engine.models.model_set import ModelSet

Filters = tuple[str, ...]  # parts of names, of which one has to occur; none: any name will do


@dataclass(frozen=True)
class Units:
    """The units that the tensors of a result belong to."""

    filters: tuple[Filters, ...]  # of each unit; of several that match a name the first is meant
    index: Mapping[str, int]  # unit of each tensor, by its name; of one in none, no entry

    def __len__(self) -> int:
        return len(self.filters)

    @classmethod
    def of_tensors(cls, names: Iterable[str]) -> Units:
        """Return one unit for each tensor, names that have another in them before it."""
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


def _matches(filters: Filters, name: str) -> bool:
    return not filters or any(each in name for each in filters)
