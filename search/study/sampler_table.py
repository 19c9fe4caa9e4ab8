"""The samplers a study can name, as light rows: nothing is imported before a sampler is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class SamplerEntry:
    """What a study has to know of a sampler before it is imported."""

    # `module:attribute` of a function of a `ProposalRequest`, or of a sampler class of Optuna's
    # interface.
    source: str
    many_objectives: bool = False  # works with `search.front`: it does not follow the mean alone
    constraints: bool = True  # prefers feasible recipes where the objective has constraints
    # A package beyond mergesearch's own; the extra of that name installs it.
    needs: str | None = None


SAMPLERS: Final[Mapping[str, SamplerEntry]] = MappingProxyType(
    {
        "auto": SamplerEntry("search.proposing.gp_sampler:propose", many_objectives=True),
        "gp": SamplerEntry("search.proposing.gp_sampler:propose", many_objectives=True),
        "random": SamplerEntry("search.proposing.samplers:random", many_objectives=True),
        "cmaes": SamplerEntry("search.proposing.samplers:CmaEs", constraints=False, needs="cmaes"),
        "tpe": SamplerEntry("search.proposing.samplers:Tpe"),
        "nsga2": SamplerEntry("search.proposing.samplers:nsga2"),
        "grid": SamplerEntry("search.proposing.samplers:grid"),
    }
)


def find_sampler(name: str) -> SamplerEntry | None:
    """Return a sampler's row; ``package.module:Class`` names an Optuna sampler of the user's."""
    return SamplerEntry(name) if ":" in name else SAMPLERS.get(name)
