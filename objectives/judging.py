"""What a model's answers are worth: the task's own judgement of each item."""

from __future__ import annotations

import math
import numbers

import numpy as np

from objectives.base import ObjectiveError
from objectives.tasks import Question, reported


def value_of(question: Question) -> float:
    """The task's own judgement of the answers now in the requests."""
    name = question.metric.name
    for request in question.requests:
        # a NaN wins every argmax, so a broken model would pass for one that answers "A"
        if request.request_type != "generate_until" and any(map(_has_nan, request.resps)):
            raise ObjectiveError(f"{question.where}: the model's log-likelihood is not a number")
    answers = [request.filtered_resps[question.metric.filter.name] for request in question.requests]
    with reported(f"{question.where}: its answers could not be judged"):
        metrics = question.task.process_results(question.requests[0].doc, answers)
    value = metrics.get(name)
    if not isinstance(value, numbers.Real | np.bool_):
        raise ObjectiveError(
            f"{question.where}: {name!r} is {value!r}, not one number per item; "
            f"the task gives {', '.join(metrics)}"
        )
    if math.isnan(value):
        raise ObjectiveError(f"{question.where}: {name!r} is not a number (NaN)")
    return float(value)


def _has_nan(response: float | tuple[float, bool]) -> bool:
    return math.isnan(response[0] if isinstance(response, tuple) else response)
