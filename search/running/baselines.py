"""Evaluate and rank the models a search starts from: base, donors and their average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from search.proposing.starts import baselines
from search.racing.elimination import JointPosterior, successive_elimination
from search.racing.race import PANEL, Floats, Race
from search.running.evaluator import Evaluated, under_own_templates
from search.running.events import Note
from search.running.run import Run
from search.storing.trials import TrialRecord
from search.study.spec import StudyError
from search.wording import OWN_TEMPLATE


def try_baselines(run: Run) -> None:
    """Evaluate base, donors and their uniform average on a first block of search items.

    Donors are also evaluated under their own chat templates.

    Raises:
        StudyError: One of them cannot be evaluated.
    """
    inputs = [*named_inputs(run).values()]
    check_inputs(run, run.scores.attempt(inputs, "search", 1))
    if not any(run.scores.stored(one, "search", 1).mean for one in inputs):
        first = run.evaluator.block_ends("search")[0]
        run.listener(
            Note(
                f"neither the base nor a donor has one of the first {first} search items right; "
                "if they should, look at how the task asks them (its doc_to_text, "
                "apply_chat_template)"
            )
        )


def named_inputs(run: Run) -> dict[str, Evaluated]:
    """Return base, donors, their average, and donors under their own chat templates, by name."""
    own = under_own_templates(run.context)
    return {
        **baselines(run.context.space),
        **{f"{donor} {OWN_TEMPLATE}": one for donor, one in own.items()},
    }


def check_inputs(run: Run, failed: Mapping[str, Exception]) -> None:
    """Raise if one of the inputs is among the failed keys: it is needed for comparison.

    Raises:
        StudyError: One has.
    """
    for name, one in named_inputs(run).items():
        if error := failed.get(one.key):
            raise StudyError(f"{name} alone: {error}") from error


def rank_donors(run: Run, *, own_templates: bool) -> list[tuple[str, Evaluated]]:
    """Rank all donors by a race among them, the best first.

    The survivor comes first, then the donors that stayed in the race longer; ties by score. With
    ``own_templates`` they race under their own chat templates as well.

    Returns:
        The name of each, and what was evaluated: its recipe, or the donor under its own template.

    Raises:
        StudyError: A donor cannot be evaluated.
    """
    known = baselines(run.context.space)
    donors: list[tuple[str, Evaluated]] = [(name, known[name]) for name in run.spec.models_but_base]
    if own_templates:
        donors += under_own_templates(run.context).items()
    raced = [0] * len(donors)  # items that each was evaluated on

    def evaluate(some: Sequence[int], items: int) -> Floats:
        for index in some:
            raced[index] = items
        left = [donors[index][1] for index in some]
        check_inputs(run, run.scores.attempt(left, "search", items))
        return run.scores.matrix(left, "search", items)

    best = successive_elimination(
        JointPosterior.vague(len(donors)),
        run.scores.strata("search"),
        evaluate,
        run.evaluator.block_ends("search"),
    )
    means = [
        run.scores.stored(donor, "search", items).mean if items else 0.0
        for (_, donor), items in zip(donors, raced, strict=True)
    ]
    order = sorted(range(len(donors)), key=lambda one: (one != best, -raced[one], -means[one]))
    return [donors[one] for one in order]


def open_race(run: Run) -> Race:
    """Restore the race from the best donor and the finished trials."""
    # Not under its own template: candidates have the study's.
    name, donor = rank_donors(run, own_templates=False)[0]
    check_inputs(run, run.scores.attempt([donor], "search"))
    for note in run.scores.check_judged(name, donor):
        run.listener(Note(note))
    race = Race(run.scores.strata("search"), front=run.spec.search.front)
    known = [run.scores.stored(donor, "search"), *map(run.scores_of, _references(run))]
    for scores in known:
        race.record(scores.array, run.scores.violation({"search": scores}))
    return race


def _references(run: Run) -> list[TrialRecord]:
    """List the trials that a race depends on, in the order they were told.

    They were evaluated on all search items. With one objective they are the reference panel, and
    any trials that tie with its last up to rounding.
    """
    size = len(run.context.splits.search)
    trials = [trial for trial in run.log.complete() if trial.items == size]
    if not run.spec.search.front and len(trials) > PANEL:
        violation, loss = sorted(trial.sort_key for trial in trials)[PANEL - 1]
        limit = (violation, loss + 1e-9 * max(1.0, abs(loss)))
        trials = [trial for trial in trials if trial.sort_key <= limit]
    return sorted(trials, key=lambda trial: trial.tell_order)
