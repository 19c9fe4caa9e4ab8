"""Score a model's responses with the tasks' own metrics.

Log-likelihoods, and generated answers that are only compared with their target, are scored in this
process. Everything else that reads generated text, or runs a task's own code, runs in a separate
process with time and memory limits: on garbage, a regular expression or a formula can run forever
in C code that no signal interrupts, and a task may itself use the process's only alarm.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import re
import sys
from collections.abc import Sequence
from itertools import compress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask, Task
from torch import Tensor

from objectives.base import ItemResult, ObjectiveError, Response, objective_errors, printable
from objectives.harness.isolation import isolate, start
from objectives.harness.metrics import PER_UNIT
from objectives.harness.prompts import Question
from objectives.inference.loglikelihood import Loglikelihood

JUDGE_SECONDS = 30.0  # per item; MATH itself gives up on a formula after 15 s
# Of items that are scored together, how many may take so long; and how many if none was faster.
_HANGS, _ALL_HANG = 10, 3
NAN = "a model that was sound elsewhere needs a wider dtype in the study (bfloat16, float32)"
_JUDGE_MEMORY = 4 << 30  # bytes beyond those of the process when it is forked
_REASON = 300  # characters kept of a reason: an exception may quote the whole response
# Of lm-eval's, those whose time is linear in the text; and settings of a metric that keep it so.
_LINEAR_FILTERS = {"take_first", "take_first_k", "lowercase", "uppercase", "remove_whitespace"}
_PLAIN_METRIC = {
    *("metric", "aggregation", "higher_is_better"),
    *("ignore_case", "ignore_punctuation", "ignore_numbers"),
}
_FIELD = re.compile(r"(?:\{\{ *)?(\w+)(?: *\}\})?")  # of a document: NAME, {{NAME}}
_DIED = "the process that scored it died"


def judge(questions: Sequence[Question], seconds: float) -> list[ItemResult]:
    """Score the responses in the questions' requests.

    A result has value 0 and a fault where scoring raised, hung or died.

    Args:
        questions: Their requests hold responses.
        seconds: Limit per item, where a task's code or generated text is involved.

    Raises:
        ObjectiveError: A log-likelihood is NaN, a task gives no number per item, or so many items
            reach the limit that scoring all of them might take hours.
    """
    for question in questions:
        _check_numbers(question)
    is_apart = [is_untrusted(question) for question in questions]
    untrusted = [*compress(questions, is_apart)]
    judged: list[ItemResult] = []
    while len(judged) < len(untrusted):
        judged += _judge_until_stopped(untrusted[len(judged) :], seconds)
        hanging = sum(result.fault == _too_long(seconds) for result in judged)
        most = _ALL_HANG if hanging == len(judged) else _HANGS
        if hanging >= most and len(judged) < len(untrusted):
            raise ObjectiveError(
                f"{untrusted[len(judged) - 1].where}: scoring took longer than {seconds:g} s for "
                f"{hanging} of {len(judged)} responses; look for a regular expression or code of "
                "the task that runs forever on some texts"
            )
    apart = iter(judged)
    return [
        next(apart) if own else _result_of(question)
        for question, own in zip(questions, is_apart, strict=True)
    ]


def _result_of(question: Question) -> ItemResult:
    requests = question.requests
    try:
        question.metric.filter.apply(list(requests))
        results = [request.filtered_resps[question.metric.filter.name] for request in requests]
        metrics: Any = question.task.process_results(requests[0].doc, results)
        value = metrics.get(question.metric.name)
    except Exception as error:  # a task's own code may raise anything
        return _fault(f"{type(error).__name__}: {error}")
    if question.metric.aggregation in PER_UNIT:
        loglikelihood, units = value
        margin = loglikelihood / max(units, 1)
        return ItemResult(math.exp(margin), margin)
    if not isinstance(value, numbers.Real | np.bool_):
        raise ObjectiveError(
            f"{question.where}: {question.metric.name!r} is {value!r}, not one number per item; "
            f"the task gives {', '.join(metrics)}"
        )
    if math.isnan(value):
        raise ObjectiveError(f"{question.where}: {question.metric.name!r} is not a number (NaN)")
    return ItemResult(float(value), _margin(question, results))


def response_of(question: Question) -> Response:
    """Return the responses in a question's requests as text, several targets separated by bars.

    Raises:
        ObjectiveError: A log-likelihood is NaN, or the task's own code raised.
    """
    _check_numbers(question)
    responses = [request.resps[0] for request in question.requests]
    with objective_errors(f"{question.where}: its target could not be read"):
        if question.item.generated:
            target = question.task.doc_to_target(question.requests[0].doc)
            targets = target if isinstance(target, list | tuple) else [target]
            return Response("\n".join(responses), " | ".join(map(str, targets)) or None)
        if question.task.OUTPUT_TYPE == "multiple_choice":
            choices = question.task.doc_to_choice(question.requests[0].doc)
            logliks = _logliks(responses)
            chosen = int(choice_scores(logliks, choices, question.metric.name).argmax())
            correct = [choices[index] for index in correct_choices(question, choices)]
            return Response(choices[chosen], " | ".join(correct) or None)
    if question.requests[0].request_type == "loglikelihood":
        return Response(f"log-likelihood {responses[0][0]:.2f}", question.requests[0].args[1])
    return Response(f"log-likelihood {sum(responses):.2f}")


def _check_numbers(question: Question) -> None:
    """Refuse NaN, which wins every argmax: a broken model would seem to answer "A"."""
    for request in question.requests:
        if request.request_type != "generate_until" and np.isnan(request.resps).any():
            raise ObjectiveError(
                f"{question.where}: the model's log-likelihood is not a number; {NAN}"
            )


def _margin(question: Question, results: Sequence[Any]) -> float | None:
    """Return the lead of the best correct choice over the best wrong one, or a log-likelihood.

    None where a task's own code scores, or text is generated.
    """
    task = question.task
    if not _is_built_in(task) or question.requests[0].request_type != "loglikelihood":
        return None
    logliks = _logliks(results)
    if task.OUTPUT_TYPE != "multiple_choice":
        return float(logliks[0])
    choices = task.doc_to_choice(question.requests[0].doc)
    scores = choice_scores(logliks, choices, question.metric.name)
    gold = correct_choices(question, choices)
    wrong = [index for index in range(len(choices)) if index not in gold]
    if not gold or not wrong:
        return None
    margin = float(scores[gold].max() - scores[wrong].max())
    return margin if math.isfinite(margin) else None


def _logliks(responses: Sequence[Loglikelihood]) -> Tensor:
    return torch.tensor([loglik for loglik, _ in responses], dtype=torch.float64)


def choice_scores(logliks: Tensor, choices: Sequence[str], metric: str) -> Tensor:
    """Return what the metric compares (n,), for each of n choices.

    ``logliks`` are of the n choices, and of n more without the prompt for ``acc_mutual_info``.
    """
    given, unconditional = logliks[: len(choices)], logliks[len(choices) :]
    if metric == "acc_mutual_info":
        return given - unconditional
    if metric == "acc_norm":
        return given / given.new_tensor([len(choice) for choice in choices]).clamp(min=1)
    if metric == "acc_bytes":
        return given / given.new_tensor([len(choice.encode()) for choice in choices]).clamp(min=1)
    return given


def correct_choices(question: Question, choices: Sequence[str]) -> list[int]:
    """Return the indices of the correct choices; none if the document's label is no choice."""
    task, doc = question.task, question.requests[0].doc
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    labels = gold if isinstance(gold, list) else [gold]
    indices = [
        choices.index(label) if isinstance(label, str) and label in choices else label
        for label in labels
    ]
    return [index for index in indices if isinstance(index, int) and 0 <= index < len(choices)]


def is_untrusted(question: Question) -> bool:
    """Return whether scoring may run forever: in a task's own code, or on generated text."""
    if not _is_built_in(question.task):
        return True
    return question.item.generated and not _takes_linear_time(question)


def _is_built_in(task: Task) -> bool:
    return type(task) is ConfigurableTask and task.get_config("process_results") is None


def _takes_linear_time(question: Question) -> bool:
    """Return whether a generated answer is only trimmed and compared with a field of its document.

    No regular expression is evaluated then, and no template beyond the name of a field. Scoring a
    block of such answers takes less time than forking this process.
    """
    task = question.task
    target = _FIELD.fullmatch(str(task.get_config("doc_to_target")))
    metrics = task.get_config("metric_list") or []
    filters = [
        step.get("function")
        for own in task.get_config("filter_list") or []
        if own.get("name") == question.metric.filter.name
        for step in own.get("filter", [])
    ]
    return (
        target is not None
        and target[1] in task.features
        and task.get_config("doc_to_choice") is None
        and all(set(metric) <= _PLAIN_METRIC for metric in metrics)
        and {metric.get("metric") for metric in metrics} == {"exact_match"}
        and set(filters) <= _LINEAR_FILTERS
    )


def _judge_until_stopped(questions: Sequence[Question], seconds: float) -> list[ItemResult]:
    """Score in a child process until it is done or has to be killed; return at least one result."""
    process, receiver = start(_judge_and_send, questions, seconds)
    results: list[ItemResult] = []
    try:
        while len(results) < len(questions):
            result = _receive(receiver, seconds)
            results.append(result)
            if result.fault in (_too_long(seconds), _DIED):
                break
    finally:
        process.kill()
        process.join()
        receiver.close()
    return results


def _fault(reason: str) -> ItemResult:
    return ItemResult(0.0, fault=printable(reason[:_REASON]))


def _too_long(seconds: float) -> str:
    return f"scoring it took longer than {seconds:g} s"


def _receive(receiver: Connection, seconds: float) -> ItemResult:
    if not receiver.poll(seconds):
        return _fault(_too_long(seconds))
    try:
        result = receiver.recv()
    except EOFError:
        return _fault(_DIED)
    if isinstance(result, ObjectiveError):
        raise result
    return result  # type: ignore[no-any-return]


def _judge_and_send(sender: Connection, questions: Sequence[Question], seconds: float) -> None:
    """Score the questions and send the results: the child process's whole work."""
    isolate(sender.fileno(), seconds * len(questions), _JUDGE_MEMORY)
    with contextlib.suppress(KeyError):
        sys.modules["langdetect"].DetectorFactory.seed = 0  # else IFEval's languages are random
    for question in questions:
        try:
            sender.send(_result_of(question))
        except ObjectiveError as error:
            sender.send(error)
