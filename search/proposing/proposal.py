"""The interface of samplers: a request for the next point, and the proposal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from search.proposing.space import Space
from search.storing.trials import TrialRecord

RANDOM_STARTUP: Final = 5  # random points after the warm starts, before trials are modelled


class Proposal(NamedTuple):
    """A point to evaluate next."""

    point: dict[str, Any]  # value of each parameter of the space
    # Over the incumbent, in units of the values; None if the sampler has no model of them.
    expected_improvement: float | None = None


@dataclass(frozen=True)
class ProposalRequest:
    """A request for one trial's point: everything that a sampler's proposal may depend on."""

    space: Space  # the search space
    seed: int  # the study's
    number: int  # of the trial to propose
    starts: int  # how many warm starts the study has
    # All trials so far but this one, in the order of their numbers.
    trials: Sequence[TrialRecord] = ()
    front: bool = False  # whether every task is an objective of its own (`search.front`)

    @property
    def trial_seed(self) -> int:
        """Seed of this trial."""
        return (self.seed * 1_000_003 + self.number) % 2**32

    @property
    def startup(self) -> int:
        """Number of complete trials from which on the surrogate is used."""
        return self.starts + RANDOM_STARTUP

    @property
    def after_starts(self) -> int:
        """Number of trials since the warm starts."""
        return max(0, self.number - self.starts)
