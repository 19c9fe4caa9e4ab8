"""What a model's answers are worth: the task's own judgement of each item.

Log-likelihoods are judged by lm-eval's own arithmetic, here. Whatever reads what a model wrote, or
runs a task's own code, is done in a process of its own, with a limit of time and memory for each
item: a regular expression or a formula can take for ever on garbage, in C code that no signal
interrupts, and a task may use the one alarm clock a process has for itself.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import numbers
import os
import resource
import sys
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from lm_eval.api.task import ConfigurableTask
from numpy.typing import NDArray

from objectives.base import ItemResult, ObjectiveError, Response, objective_errors, printable
from objectives.harness.metrics import PER_UNIT
from objectives.harness.prompts import Question

JUDGE_SECONDS = 30.0  # for one item; MATH takes up to 15 s to give up on a formula by itself
NAN = "a model that was sound elsewhere needs a wider dtype in the study (bfloat16, float32)"
_JUDGE_MEMORY = 4 << 30  # bytes that judging may take besides what is there already
_REASON = 300  # letters of a reason kept: an exception may quote all that a model wrote

_FORK = multiprocessing.get_context("fork")  # a task's functions need not be importable by name


def judge(questions: Sequence[Question], seconds: float = JUDGE_SECONDS) -> list[ItemResult]:
    """Judge the responses now in the questions' requests.

    Args:
        questions: Answered questions.
        seconds: For one item, where others' code or text is involved; what takes longer is
            stopped, wherever it hangs.

    Returns:
        One answer per question; with 0 and the reason, where a judgement raised, hung or died.

    Raises:
        ObjectiveError: A log-likelihood is not a number, or the task gives no number per item.
    """
    for question in questions:
        _check_numbers(question)
    apart = [question for question in questions if _is_untrusted(question)]
    judged = iter(_judge_apart(apart, seconds))
    return [
        next(judged) if _is_untrusted(question) else answer_of(question) for question in questions
    ]


def answer_of(question: Question) -> ItemResult:
    """The task's own judgement, in this process.

    Raises:
        ObjectiveError: It is not one number.
    """
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
    return ItemResult(_number(value, metrics, question), _margin(question, results))


def response_of(question: Question) -> Response:
    """The responses now in a question's requests, in words.

    Raises:
        ObjectiveError: A log-likelihood is not a number, or the task's own code raised.
    """
    _check_numbers(question)
    responses = [request.resps[0] for request in question.requests]
    with objective_errors(f"{question.where}: what is right cannot be told"):
        if question.item.generated:
            return Response("\n".join(responses), _target(question))
        if question.task.OUTPUT_TYPE == "multiple_choice":
            choices = question.task.doc_to_choice(question.requests[0].doc)
            logliks = np.array([loglik for loglik, _ in responses])
            chosen = int(_choice_scores(logliks, choices, question.metric.name).argmax())
            right = [choices[place] for place in _gold(question, choices)]
            return Response(choices[chosen], " | ".join(right) or None)
    if question.requests[0].request_type == "loglikelihood":
        return Response(f"log-likelihood {responses[0][0]:.2f}", question.requests[0].args[1])
    return Response(f"log-likelihood {sum(responses):.2f}")


def _target(question: Question) -> str | None:
    """What should have been written; one of several is as good as another."""
    target = question.task.doc_to_target(question.requests[0].doc)
    targets = target if isinstance(target, list | tuple) else [target]
    return " | ".join(map(str, targets)) or None


def _fault(reason: str) -> ItemResult:
    return ItemResult(0.0, fault=printable(reason[:_REASON]))


def _number(value: object, metrics: dict[str, Any], question: Question) -> float:
    name = question.metric.name
    if not isinstance(value, numbers.Real | np.bool_):
        raise ObjectiveError(
            f"{question.where}: {name!r} is {value!r}, not one number per item; "
            f"the task gives {', '.join(metrics)}"
        )
    if math.isnan(value):
        raise ObjectiveError(f"{question.where}: {name!r} is not a number (NaN)")
    return float(value)


def _check_numbers(question: Question) -> None:
    """Refuse NaN: it wins every argmax, so a broken model would pass for one that answers "A"."""
    for request in question.requests:
        if request.request_type != "generate_until" and any(map(_has_nan, request.resps)):
            raise ObjectiveError(
                f"{question.where}: the model's log-likelihood is not a number; {NAN}"
            )


def _has_nan(response: float | tuple[float, bool]) -> bool:
    return math.isnan(response[0] if isinstance(response, tuple) else response)


def _margin(question: Question, results: Sequence[Any]) -> float | None:
    """How clearly the answer is right, where lm-eval itself judges log-likelihoods."""
    task = question.task
    if not _is_built_in(question) or question.requests[0].request_type != "loglikelihood":
        return None
    logliks = np.array([loglik for loglik, _ in results])
    if task.OUTPUT_TYPE != "multiple_choice":
        return float(logliks[0])
    choices = task.doc_to_choice(question.requests[0].doc)
    scores = _choice_scores(logliks, choices, question.metric.name)
    gold = _gold(question, choices)
    wrong = [place for place in range(len(choices)) if place not in gold]
    if not gold or not wrong:
        return None
    margin = float(scores[gold].max() - scores[wrong].max())
    return margin if math.isfinite(margin) else None


def _choice_scores(
    logliks: NDArray[np.float64], choices: Sequence[str], metric: str
) -> NDArray[np.float64]:
    """What the metric compares, for each of n choices; ``logliks`` has n or, unconditional, 2n."""
    given, alone = logliks[: len(choices)], logliks[len(choices) :]
    if metric == "acc_mutual_info":
        return given - alone
    if metric == "acc_norm":
        return given / np.maximum([len(choice) for choice in choices], 1)
    if metric == "acc_bytes":
        return given / np.maximum([len(choice.encode()) for choice in choices], 1)
    return given


def _gold(question: Question, choices: Sequence[str]) -> list[int]:
    """Places of the right choices; none, where the document's label is no choice."""
    task, doc = question.task, question.requests[0].doc
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    labels = gold if isinstance(gold, list) else [gold]
    places = [
        choices.index(label) if isinstance(label, str) and label in choices else label
        for label in labels
    ]
    return [place for place in places if isinstance(place, int) and 0 <= place < len(choices)]


def _is_built_in(question: Question) -> bool:
    return (
        type(question.task) is ConfigurableTask
        and question.task.get_config("process_results") is None
    )


def _is_untrusted(question: Question) -> bool:
    """Whether judging it reads what a model wrote, or runs a task's own code."""
    return question.item.generated or not _is_built_in(question)


def _judge_apart(questions: Sequence[Question], seconds: float) -> list[ItemResult]:
    answers: list[ItemResult] = []
    while len(answers) < len(questions):
        answers += _judge_until_stopped(questions[len(answers) :], seconds)
    return answers


def _judge_until_stopped(questions: Sequence[Question], seconds: float) -> list[ItemResult]:
    """Judge in one process until it is done or has to be stopped: one answer or more."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_judge_and_send, args=(questions, sender, seconds))
    with warnings.catch_warnings():
        # from Python 3.12 on: other threads' locks stay locked, and none is used there
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    answers: list[ItemResult] = []
    try:
        while len(answers) < len(questions):
            answer = _receive(receiver, seconds)
            answers.append(answer)
            if answer.fault in (_too_long(seconds), _DIED):
                break
    finally:
        process.kill()
        process.join()
        receiver.close()
    return answers


_DIED = "the process that judged it died"


def _too_long(seconds: float) -> str:
    return f"judging it took longer than {seconds:g} s"


def _receive(receiver: Connection, seconds: float) -> ItemResult:
    if not receiver.poll(seconds):
        return _fault(_too_long(seconds))
    try:
        answer = receiver.recv()
    except EOFError:
        return _fault(_DIED)
    if isinstance(answer, ObjectiveError):
        raise answer
    return answer  # type: ignore[no-any-return]


def _judge_and_send(questions: Sequence[Question], sender: Connection, seconds: float) -> None:
    """What the other process does."""
    _shut_in(sender.fileno(), seconds * len(questions))
    for question in questions:
        try:
            sender.send(answer_of(question))
        except ObjectiveError as error:
            sender.send(error)


def _shut_in(pipe: int, seconds: float) -> None:
    """Leave this process its pipe alone: no terminal, no files, bounded time and memory.

    The run's lock is among the files: it has to be free as soon as the run itself is gone.
    """
    os.closerange(0, pipe)
    os.closerange(pipe + 1, 1 << 16)
    nowhere = Path(os.devnull).open("r+", encoding="utf-8")  # noqa: SIM115  # until it ends
    for standard in (0, 1, 2):
        os.dup2(nowhere.fileno(), standard)
    sys.stdin = sys.stdout = sys.stderr = nowhere
    _limit(resource.RLIMIT_CPU, math.ceil(seconds) + 1)
    _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + _JUDGE_MEMORY)
    torch.set_num_threads(1)  # its other threads did not come along
    with contextlib.suppress(KeyError):
        sys.modules["langdetect"].DetectorFactory.seed = 0  # else IFEval's languages are a draw


def _limit(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (wanted, hard))
