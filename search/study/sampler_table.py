"""The samplers a study can name, as light rows: nothing is imported before a sampler is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class SamplerEntry:
    """What a study has to know of a sampler before it is imported.

    Attributes:
        many_objectives: Works with ``search.front``: it does not follow the mean alone.
        constraints: Prefers feasible recipes where the objective has constraints.
        needs: A package beyond mergesearch's own; the extra of that name installs it.
    """

    many_objectives: bool = False
    constraints: bool = True
    needs: str | None = None


SAMPLERS: Final[Mapping[str, SamplerEntry]] = MappingProxyType(
    {
        "auto": SamplerEntry(many_objectives=True),
        "gp": SamplerEntry(many_objectives=True),
        "random": SamplerEntry(many_objectives=True),
        "cmaes": SamplerEntry(constraints=False, needs="cmaes"),
        "tpe": SamplerEntry(),
        "nsga2": SamplerEntry(),
        "grid": SamplerEntry(),
    }
)


def find_sampler(name: str) -> SamplerEntry | None:
    """Return a sampler's row; ``package.module:Class`` names an Optuna sampler of the user's."""
    return SamplerEntry() if ":" in name else SAMPLERS.get(name)
