"""Choose the metric that turns a task's responses into one number per item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_eval.api.metrics import bits_per_byte, mean, weighted_perplexity
from lm_eval.api.task import Task

from objectives.base import ObjectiveError

# Aggregations of (log-likelihood, bytes or words) per item. An item's value is then
# exp(log-likelihood per unit): a probability, so higher is better and its range is [0, 1].
PER_UNIT = (weighted_perplexity, bits_per_byte)


@dataclass(frozen=True)
class Metric:
    """A metric of a task and the filter in front of it."""

    name: str
    filter: Any  # lm-eval's FilterEnsemble: response to answer
    aggregation: Any  # lm-eval's function from all items' metrics to the task's score


def choose_metric(task_name: str, task: Task, wanted: str | None) -> Metric:
    """Return the metric to use, by the rule of ``TaskEntry.metric``.

    Raises:
        ObjectiveError: The metric or filter does not exist, or cannot be compared per item.
    """
    where = f"task {task_name!r}"
    name, _, filter_name = (wanted or "").partition(",")
    refused = {metric: _why_unusable(task, metric) for metric in task.aggregation()}
    usable = [metric for metric, reason in refused.items() if reason is None]
    listed = f"usable: {', '.join(usable) or 'none'}"
    if name and name not in refused:
        raise ObjectiveError(f"{where} has no metric {name!r}; {listed}")
    if name and refused[name]:
        raise ObjectiveError(f"{where}: metric {name!r} {refused[name]}; {listed}")
    if not usable:
        reasons = ", ".join(f"{metric!r} {reason}" for metric, reason in refused.items())
        raise ObjectiveError(f"{where} has no usable metric ({reasons}); leave it out")
    preferred = [metric for metric in ("acc", "exact_match") if metric in usable]
    # Private: lm-eval has no other list of a task's filters.
    filters = {ensemble.name: ensemble for ensemble in task._filters}
    if filter_name and filter_name not in filters:
        raise ObjectiveError(f"{where} has no filter {filter_name!r}; it has {', '.join(filters)}")
    chosen = name or (preferred or usable)[0]
    ensemble = filters[filter_name or next(iter(filters))]
    return Metric(chosen, ensemble, task.aggregation()[chosen])


def _why_unusable(task: Task, metric: str) -> str | None:
    """Return why a metric cannot be compared item by item, or None if it can.

    f1 and bleu, say, are defined for all items together, not as a mean of one number per item.
    """
    if task.aggregation()[metric] in PER_UNIT:
        return None
    if task.aggregation()[metric] is not mean:
        return "is not a mean of one number per item"
    if not task.higher_is_better().get(metric, True):
        return "is better when lower"
    return None
