"""The trials of a study: typed records in front of Optuna's study.

This is the only module that reads or writes Optuna's trials and their user attributes; everything
else works with ``TrialRecord``. The attributes' names are part of the stored format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Literal, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from search.racing.race import Estimate
from search.storing.intact import damaged, digest_of, reading_stored

State = Literal["waiting", "running", "complete", "fail"]

_CONSTRAINT: Final = "floors"  # name of Optuna's constraint that stores the total violation
# Attributes that a trial's digest covers.
_DIGESTED: Final = ("recipe", "variance", "items", "tasks", "told", "faults")
WHERE: Final = "the run's database"  # in messages
_STATES: Final[Mapping[TrialState, State]] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "fail",  # this program prunes no trial
    TrialState.FAIL: "fail",
}


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a search as the database holds it."""

    number: int  # position in the study, from 0 on
    state: State  # whether it waits, runs, is complete, or has failed
    point: Mapping[str, Any] = field(default_factory=dict)  # value of each searched parameter
    recipe: str = ""  # key of the recipe that the point stands for; "" until it is known
    start: str | None = None  # label of the warm start it came from; None: a sampler proposed it
    # Value and variance of the recipe's score on all search items; None: it is not known, or the
    # trial failed during the search.
    estimate: Estimate | None = None
    items: int = 0  # search items evaluated
    tasks: Mapping[str, Estimate] = field(default_factory=dict)  # the same estimate for each task
    violation: float = 0.0  # constraint violation: how far limits are missed, summed; 0: feasible
    tell_order: int = 0  # how many trials were finished before it, if complete
    # Over the incumbent, when it was proposed; None: not modelled.
    expected_improvement: float | None = None
    error: str | None = None  # why it failed
    faults: str | None = None  # how many answers could not be judged, and why the first could not
    completed: datetime | None = None  # when it was finished

    @property
    def value(self) -> float:
        """Estimated score of a complete trial."""
        return self._known.value

    @property
    def variance(self) -> float:
        """Variance of a complete trial's estimate."""
        return self._known.variance

    @property
    def _known(self) -> Estimate:
        if self.estimate is None:
            raise ValueError(f"trial {self.number} is {self.state} and has no estimate")
        return self.estimate

    @property
    def sort_key(self) -> tuple[float, float]:
        """Feasible-first order of complete trials: (constraint violation, -value)."""
        return self.violation, -self.value

    @classmethod
    def from_optuna(cls, trial: FrozenTrial) -> Self:
        """Read a trial of Optuna's."""
        noted = trial.user_attrs
        if trial.state == TrialState.COMPLETE:
            value, violation = (trial.values or [None])[0], trial.constraints.get(_CONSTRAINT)
            if value is None or noted.get("digest") != _digest_of(trial, value, violation):
                raise damaged(WHERE, f"trial {trial.number} is not as it was written")
        return cls(
            number=trial.number,
            state=_STATES[trial.state],
            point=trial.params,
            recipe=noted.get("recipe", ""),
            start=noted.get("start"),
            estimate=Estimate(float(trial.values[0]), noted["variance"]) if trial.values else None,
            items=noted.get("items", 0),
            tasks={task: Estimate(*pair) for task, pair in noted.get("tasks", {}).items()},
            violation=sum(max(value, 0.0) for value in trial.constraints.values()),
            tell_order=noted.get("told", 0),
            expected_improvement=noted.get("gain"),
            error=noted.get("error"),
            faults=noted.get("faults"),
            completed=trial.datetime_complete,
        )


@dataclass(frozen=True)
class Candidate:
    """A recipe that has an estimate."""

    number: int  # of the trial that first proposed it
    trial: TrialRecord  # its latest complete trial


def candidates(complete: Iterable[TrialRecord]) -> list[Candidate]:
    """Group complete trials by recipe, in the order of their first trials."""
    found: dict[str, Candidate] = {}
    for trial in complete:
        first = found.get(trial.recipe)
        found[trial.recipe] = Candidate(first.number if first else trial.number, trial)
    return list(found.values())


class OpenTrial:
    """A running trial, to be finished once: with an estimate, or as failed."""

    def __init__(self, study: Study, trial: Trial) -> None:
        self._study, self._trial = study, trial
        self.number, self.point = trial.number, trial.params

    def set_recipe(self, key: str) -> None:
        """Store the key of the recipe that the point stands for."""
        self._trial.set_user_attr("recipe", key)

    def fail(self, error: str) -> TrialRecord:
        """Finish the trial as failed, with the reason."""
        self._trial.set_user_attr("error", error)
        return TrialRecord.from_optuna(self._study.tell(self._trial, state=TrialState.FAIL))

    def tell(
        self,
        estimate: Estimate,
        tasks: Mapping[str, Estimate],
        *,
        items: int,
        order: int,
        violation: float | None = None,
        faults: str | None = None,
    ) -> TrialRecord:
        """Finish the trial with its estimate.

        ``order`` is how many trials were finished before it; ``violation`` is None where the study
        has no constraints.
        """
        noted = {
            "faults": faults,
            "variance": estimate.variance,
            "items": items,
            "tasks": {task: [one.value, one.variance] for task, one in tasks.items()},
            "told": order,
        }
        for name, value in noted.items():
            if value is not None:
                self._trial.set_user_attr(name, value)
        if violation is not None:
            self._trial.set_constraint(_CONSTRAINT, violation)
        self._trial.set_user_attr("digest", _digest_of(self._trial, estimate.value, violation))
        return TrialRecord.from_optuna(self._study.tell(self._trial, estimate.value))


def _digest_of(trial: Trial | FrozenTrial, value: float, violation: float | None) -> str:
    """Hash a complete trial's contents, without its times."""
    noted = {name: trial.user_attrs.get(name) for name in _DIGESTED}
    return digest_of(trial.number, trial.params, value, violation, noted)


class TrialLog:
    """All trials of a study, and the study's header."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def records(self, *states: State) -> list[TrialRecord]:
        """Read the trials in these states, or all, in the order of their numbers.

        Complete trials whose recipe has failed since then count as failed.
        """
        read = {*states, "complete"} if "fail" in states else states
        wanted = tuple(state for state, name in _STATES.items() if name in read) or None
        failed, records = self.failed, []
        with reading_stored(WHERE):
            trials = self._study.get_trials(deepcopy=False, states=wanted)
            found = [TrialRecord.from_optuna(trial) for trial in trials]
        for record in found:
            if record.state == "complete" and record.recipe in failed:
                error = failed[record.recipe]
                record = replace(record, state="fail", error=error)
            if not states or record.state in states:
                records.append(record)
        return records

    @property
    def failed(self) -> Mapping[str, str]:
        """Errors of recipes that failed after the search, by recipe key."""
        failed: Mapping[str, str] = self.header().get("failed", {})
        return failed

    def fail_recipe(self, key: str, error: str) -> None:
        """Count a recipe's complete trials as failed from now on, with the reason."""
        self.set_header(failed={**self.failed, key: error})

    def complete(self) -> list[TrialRecord]:
        """Read the trials that have an estimate."""
        return self.records("complete")

    def finished(self) -> list[TrialRecord]:
        """Read the trials that have an estimate or have failed."""
        return self.records("complete", "fail")

    def enqueue(
        self,
        point: Mapping[str, Any],
        *,
        start: str | None = None,
        expected_improvement: float | None = None,
    ) -> None:
        """Add a waiting trial with this point; it survives a kill."""
        noted = {"start": start, "gain": expected_improvement}
        known = {name: value for name, value in noted.items() if value is not None}
        self._study.enqueue_trial(dict(point), user_attrs=known)

    def left_running(self, open_now: Sequence[int]) -> list[TrialRecord]:
        """Read the trials that an earlier session left running.

        ``open_now`` are the numbers of those that this session runs.
        """
        return [record for record in self.records("running") if record.number not in open_now]

    def open(
        self,
        distributions: Mapping[str, BaseDistribution],
        *,
        left: TrialRecord | None = None,
        sampler: BaseSampler | None = None,
    ) -> OpenTrial:
        """Take up a running trial, else open the first that waits, else a new one.

        ``sampler`` chooses parameters that the trial does not have yet; None: it has all.
        """
        if sampler is not None:
            self._study.sampler = sampler
        if left is None:
            return OpenTrial(self._study, self._study.ask(dict(distributions)))
        # Optuna has no public way to take up a running trial; its id is what ``Trial`` is made of.
        trials = self._study.get_trials(deepcopy=False)
        trial = Trial(self._study, trials[left.number]._trial_id)
        for name, distribution in distributions.items():
            _suggest(trial, name, distribution)
        return OpenTrial(self._study, trial)

    def header(self) -> Mapping[str, Any]:
        """Read the study's header: spec, models, weights, failed recipes, ..."""
        with reading_stored(WHERE):
            return self._study.user_attrs

    def set_header(self, **entries: Any) -> None:
        """Store parts of the header."""
        for name, value in entries.items():
            self._study.set_user_attr(name, value)


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """Suggest a value of one parameter; Optuna returns the trial's own if it has one."""
    match distribution:
        case FloatDistribution(low=low, high=high, log=log):
            trial.suggest_float(name, low, high, log=log)
        case CategoricalDistribution(choices=choices):
            trial.suggest_categorical(name, choices)
        case _:
            raise TypeError(f"{name}: no way to suggest from {distribution!r}")
