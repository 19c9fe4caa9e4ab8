"""Find the labels that tuning needs: the tasks' own targets, else answers judged right."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from merge_engine.recipe.recipe import Recipe
from objectives.items import blocks
from search.proposing.starts import baselines
from search.running.baselines import rank_donors
from search.running.events import BlockEvaluated, Note, Stage
from search.running.run import Run
from search.running.workers import FAILURES, AnswerJob, AnswerReply
from search.study.spec import StudyError


@dataclass
class _Labels:
    """Labels found so far, as they are stored with the run."""

    texts: dict[int, str]  # by number of the item
    asked: list[str] = field(default_factory=list)  # models that have generated answers
    evaluations: int = 0  # item evaluations which that took

    def store(self, run: Run) -> None:
        texts = {str(number): text for number, text in self.texts.items()}
        run.log.set_header(labels={**asdict(self), "texts": texts})


def find_labels(run: Run) -> Mapping[int, str]:
    """Return the labels of tune items by number, and store them; items without one are left out.

    Items for which a task has no label are answered by the donors, best first, and the base, until
    an answer is judged right.

    Raises:
        StudyError: The study requires tuning, and no item has a label.
    """
    items, known = run.context.splits.tune, baselines(run.context.space)
    labels = _stored_labels(run)
    if labels is None:
        labels = _Labels(_labelled(items, run.workers.call("labels", items)))
        labels.store(run)
    generated = [number for number in items if run.context.objective.items[number].generated]
    for name in (*(name for name, _ in rank_donors(run, own_templates=False)), run.spec.base_model):
        missing = [number for number in generated if number not in labels.texts]
        if missing and name not in labels.asked:
            labels.texts |= _right_answers(run, name, known[name], missing)
            labels.asked.append(name)
            labels.evaluations += len(missing)
            labels.store(run)
    _note_tasks_without(run, labels.texts)
    return labels.texts


def _stored_labels(run: Run) -> _Labels | None:
    if stored := run.log.header().get("labels"):
        texts = {int(number): text for number, text in stored["texts"].items()}
        return _Labels(**{**stored, "texts": texts})
    return None


def _labelled(items: Sequence[int], labels: Iterable[str | None]) -> dict[int, str]:
    return {n: text for n, text in zip(items, labels, strict=True) if text is not None}


def _right_answers(run: Run, name: str, recipe: Recipe, items: Sequence[int]) -> dict[int, str]:
    """Have all workers generate a model's answers to items; return those judged right."""
    run.listener(Stage(f"generating answers of {name} as labels of {len(items)} items"))
    parts = blocks(items, math.ceil(len(items) / run.workers.count))
    try:
        replies = run.evaluator.do_all([AnswerJob(recipe, part) for part in parts], AnswerReply)
        answers = [answer for reply in replies for answer in reply.answers]
    except FAILURES as error:
        run.listener(Note(f"{name} gives no labels: {error}"))
        answers = [None] * len(items)
    run.listener(BlockEvaluated(len(items)))
    return _labelled(items, answers)


def group_by_task(run: Run, labels: Mapping[int, str]) -> dict[str, list[int]]:
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
