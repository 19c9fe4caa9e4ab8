"""The table of samplers; a sampler's module is imported only when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class SamplerEntry:
    """A sampler's source, and its properties that a study is checked against."""

    source: str  # `module:attribute` that gives a proposal or an Optuna sampler for a request
    many_objectives: bool = False  # works with `search.front`: it does not follow the mean alone
    constraints: bool = True  # prefers feasible recipes where the objective has constraints
    needs: str | None = None  # a package that the extra of this name installs


SAMPLERS: Final[Mapping[str, SamplerEntry]] = {
    "auto": SamplerEntry("search.proposing.gp_sampler:propose", many_objectives=True),
    "gp": SamplerEntry("search.proposing.gp_sampler:propose", many_objectives=True),
    "random": SamplerEntry("search.proposing.samplers:random", many_objectives=True),
    "cmaes": SamplerEntry("search.proposing.samplers:CmaEs", constraints=False, needs="cmaes"),
    "tpe": SamplerEntry("search.proposing.samplers:Tpe"),
    "nsga2": SamplerEntry("search.proposing.samplers:nsga2"),
    "grid": SamplerEntry("search.proposing.samplers:grid"),
}


def find_sampler(name: str) -> SamplerEntry | None:
    """Return a sampler's row; ``package.module:Class`` names an Optuna sampler of the user's."""
    return SamplerEntry(name) if ":" in name else SAMPLERS.get(name)
