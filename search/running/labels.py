"""Find the labels that tuning needs: the tasks' own targets, else answers judged right."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from merge_engine.recipe.recipe import Recipe
from objectives.items import blocks
from search.proposing.starts import baselines
from search.running.baselines import rank_donors
from search.running.events import BlockEvaluated, Note, Stage
from search.running.run import Run
from search.running.workers import FAILURES, AnswerJob, AnswerReply
from search.study.spec import StudyError


def find_labels(run: Run) -> Mapping[int, str]:
    """Return the labels of tune items by number, and store them; items without one are left out.

    Items for which a task has no label are answered by the donors, best first, and the base, until
    an answer is judged right.

    Raises:
        StudyError: The study requires tuning, and no item has a label.
    """
    stored = run.log.header().get("labels", {})
    items = run.context.splits.tune
    labels: dict[int, str] = {int(number): text for number, text in stored.get("texts", {}).items()}
    if not stored:
        found: Sequence[str | None] = run.workers.call("labels", items)
        labels = {n: text for n, text in zip(items, found, strict=True) if text is not None}
        _store(run, labels, [], 0)
    asked, evaluations = [*stored.get("asked", [])], stored.get("evaluations", 0)
    written = [n for n in items if run.context.objective.items[n].generated]
    known = baselines(run.context.space)
    names = [*(name for name, _ in rank_donors(run, own_templates=False)), run.spec.base_model]
    for name in names:
        missing = [number for number in written if number not in labels]
        if name in asked or not missing:
            continue
        run.listener(Stage(f"generating answers of {name} as labels of {len(missing)} items"))
        try:
            answers = _right_answers(run, known[name], missing)
        except FAILURES as error:
            run.listener(Note(f"{name} gives no labels: {error}"))
            answers = [None] * len(missing)
        labels |= {n: text for n, text in zip(missing, answers, strict=True) if text is not None}
        asked.append(name)
        evaluations += len(missing)
        run.listener(BlockEvaluated(len(missing)))
        _store(run, labels, asked, evaluations)
    _note_tasks_without(run, labels)
    return labels


def _right_answers(run: Run, recipe: Recipe, items: Sequence[int]) -> list[str | None]:
    """Have all workers generate a recipe's answers; return those judged right, else None."""
    parts = blocks(items, math.ceil(len(items) / run.workers.count))
    replies = run.evaluator.do_all([AnswerJob(recipe, part) for part in parts], AnswerReply)
    return [answer for reply in replies for answer in reply.answers]


def _store(run: Run, labels: Mapping[int, str], asked: Sequence[str], evaluations: int) -> None:
    texts = {str(number): text for number, text in labels.items()}
    run.log.set_header(labels={"texts": texts, "asked": asked, "evaluations": evaluations})


def by_task(run: Run, labels: Mapping[int, str]) -> dict[str, list[int]]:
    """Group the labelled tune items by task, each task's in the order of the split."""
    found = defaultdict[str, list[int]](list)
    for number in run.context.splits.tune:
        if number in labels:
            found[run.context.objective.items[number].task].append(number)
    return dict(found)


def _note_tasks_without(run: Run, labels: Mapping[int, str]) -> None:
    """Note the tasks without labels, which take no part in tuning.

    Raises:
        StudyError: The study requires tuning, and no item has a label.
    """
    counts = Counter(run.context.objective.items[number].task for number in labels)
    without = [task for task in run.context.weights if not counts[task]]
    if run.spec.search.tune is True and not labels:
        raise StudyError(
            "search.tune: no tune item has a label: the tasks have no targets that their metrics "
            "judge right, and neither base nor donors have one right; leave tune out"
        )
    if not labels:
        run.listener(Note("weights are not tuned: no tune item has a label"))
    elif without:
        run.listener(
            Note(
                f"weights are tuned without {', '.join(without)}: no tune items there, or none "
                "with a label (objective.items.tune)"
            )
        )
