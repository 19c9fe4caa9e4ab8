"""A study's sampler with ask and tell, without a run."""

from collections.abc import Mapping
from types import MappingProxyType

import optuna

from search.proposing.samplers import Proposer
from search.proposing.space import Point, Space
from search.proposing.starts import warm_starts
from search.racing.race import Estimate
from search.storing.trials import OpenTrial, TrialLog


class StudySampler:
    """A sampler of ``search.proposing.samplers``; several trials may be open at once."""

    def __init__(self, name: str, space: Space, seed: int, *, front: bool = False) -> None:
        self.proposer = Proposer(name, space, seed, front=front)
        self.log = TrialLog(optuna.create_study(direction="maximize"))
        self.open: list[OpenTrial] = []
        for label, point in warm_starts(space):
            self.log.enqueue(point, start=label)

    def ask(self) -> Point:
        self.open.append(self.proposer.ask(self.log, [trial.number for trial in self.open]))
        return self.open[-1].point

    def tell(
        self,
        estimate: Estimate,
        tasks: Mapping[str, Estimate] = MappingProxyType({}),
        *,
        items: int = 0,
        violation: float | None = None,
    ) -> None:
        trial = self.open.pop(0)
        trial.tell(estimate, tasks, items=items, order=trial.number, violation=violation)
