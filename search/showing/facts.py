"""Facts about a run, read from its database and result.json without loading a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from search.proposing.space import Space, with_points
from search.proposing.starts import UNIFORM
from search.proposing.tuned_path import TunedUnits
from search.storing.intact import damaged
from search.storing.result import Result
from search.storing.store import Store
from search.storing.trials import WHERE, TrialLog, TrialRecord
from search.study.spec import StudySpec
from search.wording import short_names

_PARTS: Final = {  # of a run's time, by their names in result.json
    "build": "building recipes",
    "score": "evaluating them",
    "ask": "proposing recipes",
}


class RunFacts:
    """Study, trials, items and scores of a run, which may have no result yet."""

    def __init__(self, store: Store, result: Result | None) -> None:
        self.store, self.result = store, result
        log = TrialLog(store.study())
        header = log.header()
        self.spec = StudySpec.model_validate(header["spec"])
        self.trials = sorted(  # in the order they were finished
            log.finished(), key=lambda trial: (trial.completed or datetime.min, trial.number)
        )
        if result and result.winner.trial not in {trial.number for trial in self.trials}:
            raise damaged(WHERE, f"it has no trial {result.winner.trial}, the winner")
        self.complete = [trial for trial in self.trials if trial.state == "complete"]
        self.failed = [trial for trial in self.trials if trial.state == "fail"]
        self.names = short_names(self.spec.models_but_base, "/") | {UNIFORM: "uniform"}
        self.names[self.spec.base_model] = "base"
        self.weights: Mapping[str, float] = header["weights"]
        self.baselines: Mapping[str, str] = header["baselines"]
        # Keys of donors under their own chat templates, by name.
        self.own_templates: Mapping[str, str] = header.get("own_templates", {})
        items = store.items()
        self.items = {
            split: [item for item in items if item.split == split] for split in ("search", "test")
        }
        search = self.spec.search.model_copy(update={"start": ()})  # the files may be gone
        self.space = Space.from_spec(self.spec.model_copy(update={"search": search}), (), "float32")
        if units := header.get("tuned_units"):
            known = TunedUnits(units["filters"], units["unit_of"])
            self.space = with_points(self.space, known, store.states(points=True))
        self.steps = store.steps()  # of tuning by gradient
        self.split_evaluations, seconds = store.evaluations()
        self._scoring_seconds = sum(seconds.values())
        self._seconds: Mapping[str, float] = header.get("seconds", {})
        self.evaluations = _cumulative_evaluations(self.trials)  # by trial number

    @property
    def last_finished(self) -> datetime | None:
        """Time at which the last trial was finished."""
        return self.trials[-1].completed if self.trials else None

    @property
    def is_finished(self) -> bool:
        """Whether the result is that of all trials."""
        result = self.result
        return bool(result and result.trials + result.failed_trials >= len(self.trials))

    def donor_key(self, donor: str, *, own_template: bool) -> str:
        """Return the key that a donor's results are stored by."""
        return (self.own_templates if own_template else self.baselines)[donor]

    def times(self) -> list[tuple[str, float]]:
        """List the parts of the work, and the seconds that all sessions took for each."""
        known = {**self._seconds, "score": self._scoring_seconds}
        if self.result and self.is_finished:
            known = dict(self.result.seconds)
        parts = [(what, known.get(name, 0.0)) for name, what in _PARTS.items()]
        rest = known.get("total", 0.0) - sum(seconds for _, seconds in parts)
        return [*parts, ("all else", rest)] if rest > 0 else parts

    def scores(self, recipe: str, split: str) -> list[float]:
        """Read a recipe's scores on a split's first items, up to the first missing block."""
        blocks = self.store.results(recipe, split)
        end = next(number for number in range(len(blocks) + 1) if number not in blocks)
        return [result.value for number in range(end) for result in blocks[number]]

    def test_scores(self, recipe: str) -> dict[str, list[float]]:
        """Read a recipe's scores on all test items, by task."""
        by_task = defaultdict[str, list[float]](list)
        for item, value in zip(self.items["test"], self.scores(recipe, "test"), strict=True):
            by_task[item.task].append(value)
        return by_task


def describe_trial(trial: TrialRecord) -> str:
    """Describe a trial by number, method, parameters and evaluated items."""
    numbers = [f"{name}={value:.2f}" for name, value in trial.point.items() if name != "method"]
    recipe = " ".join([trial.point["method"], *numbers])
    return f"trial {trial.number}: {recipe}, {trial.items} items"


def _cumulative_evaluations(trials: list[TrialRecord]) -> dict[int, int]:
    """Sum item evaluations over trials; a recipe proposed again is not evaluated again."""
    evaluated, total, after = Counter[str](), 0, {}
    for trial in trials:
        more = max(0, trial.items - evaluated[trial.recipe])
        evaluated[trial.recipe] += more
        total += more
        after[trial.number] = total
    return after
