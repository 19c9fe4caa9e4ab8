"""Differentiable losses of questions, on the prompts that are scored, and the labels they need.

A task's target is a label only if the task's own metric judges it right. To find out, a target text
is put in place of the model's answer and cut like one, and correct choices are given a high
likelihood. A target that all documents share is a placeholder: IFEval's "0" counts as right
wherever an answer must not contain a comma.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from objectives.base import ItemResult, ObjectiveError
from objectives.harness.judging import NAN, choice_scores, correct_choices, judge
from objectives.harness.prompts import Question
from objectives.inference.fast_hflm import FastHFLM
from objectives.inference.loglikelihood import Loglikelihood
from objectives.inference.token_tree import Request, Tokens

_BEST: Final = (1.0, 100.0)  # values of a right answer; some metrics are in per cent
_LIKELY: Final = (-1.0, True)
_UNLIKELY: Final = (-1e4, False)

TokenPair = tuple[Sequence[int], Sequence[int]]  # a context and its continuation


def targets(
    questions: Sequence[Question], language_model: FastHFLM, seconds: float, *, chat: bool
) -> list[str | None]:
    """Return the questions' own labels, see ``Objective.targets``.

    Args:
        questions: Their requests are not changed.
        language_model: Encodes and cuts target texts as it does generated ones.
        seconds: Limit per item for judging.
        chat: Whether prompts have a chat template, after which there is no delimiter.
    """
    if not language_model.is_differentiable:
        return [None] * len(questions)
    generated = {each.item.task: each.task for each in questions if each.item.generated}
    without = {name for name, task in generated.items() if _has_one_target(task)}
    candidates = [
        [] if each.item.task in without else _candidates(each, language_model, chat=chat)
        for each in questions
    ]
    judged = iter(judge([each for own in candidates for _, each in own], seconds))
    right = [[label for label, _ in own if is_right(next(judged))] for own in candidates]
    return [
        "" if _is_rolling(question) else next(iter(labels), None)
        for question, labels in zip(questions, right, strict=True)
    ]


def _has_one_target(task: Task) -> bool:
    """Return whether all of a task's several documents have the same target."""
    found = (task.doc_to_target(request.doc) for request in task.instances)
    first = next(found)
    return len(task.instances) > 1 and all(target == first for target in found)


def _candidates(
    question: Question, language_model: FastHFLM, *, chat: bool
) -> list[tuple[str, Question]]:
    """Return possible labels, each with the question answered by it."""
    if question.item.generated:
        texts = _target_texts(question, language_model, chat=chat)
        responses = [_as_generated(question, text, language_model) for text in texts]
        return [
            (text, _answered(question, [response]))
            for text, response in zip(texts, responses, strict=True)
        ]
    if _is_rolling(question) or not (correct := _correct_responses(question)):
        return []
    return [("", _answered(question, correct))]


def _is_rolling(question: Question) -> bool:
    return str(question.requests[0].request_type) == "loglikelihood_rolling"


def is_right(result: ItemResult) -> bool:
    """Return whether a result is the best that metrics give."""
    return result.value in _BEST


def generated_label(question: Question, language_model: FastHFLM) -> str | None:
    """Return the model's response in a question's request as a label.

    Some tokenizers drop a leading space when they decode; it is restored if the model prefers it.
    None if encoding the response and decoding it again changes it.
    """
    response = question.requests[0].resps[0]
    texts = [
        text
        for text in (response, f" {response}")
        if _as_generated(question, text, language_model) == response
    ]
    if len(texts) < 2 or not response:
        return texts[0] if texts else None
    begun = [_encode_answer(question, text, language_model) for text in texts]
    with torch.no_grad():
        logliks = _logliks([[(prompt, tokens[:1])] for prompt, tokens in begun], language_model)
    return texts[int(torch.cat(logliks).argmax())]


def losses(
    questions: Sequence[Question], labels: Sequence[str], language_model: FastHFLM
) -> Tensor:
    """Return the questions' losses (n,), see ``Objective.loss``.

    Raises:
        ObjectiveError: A loss is NaN, or the model's log-likelihoods have no gradients.
    """
    if not language_model.is_differentiable:
        raise ObjectiveError(
            "loss: the model is not a causal language model, or lm-eval's own code evaluates it; "
            "tune without gradients"
        )
    pairs = [
        _token_pairs(question, label, language_model)
        for question, label in zip(questions, labels, strict=True)
    ]
    parts = _logliks(pairs, language_model)
    found = torch.stack([_loss(*each) for each in zip(questions, parts, strict=True)])
    for question, is_nan in zip(questions, found.isnan().tolist(), strict=True):
        if is_nan:
            raise ObjectiveError(f"{question.where}: its loss is not a number (NaN); {NAN}")
    return found


def _logliks(pairs: Sequence[Sequence[TokenPair]], language_model: FastHFLM) -> tuple[Tensor, ...]:
    """Return the log-likelihoods (k,) of each question's k continuations."""
    numbered = [(number, *pair) for number, own in enumerate(pairs) for pair in own]
    found = language_model.differentiable_loglikelihoods(
        Request.truncated(
            context,
            continuation,
            language_model.max_length,
            index=index,
            group=(number, context[0]),  # other first tokens share no beginning
        )
        for index, (number, context, continuation) in enumerate(numbered)
    )
    return torch.split(found, [len(own) for own in pairs])


def _loss(question: Question, logliks: Tensor) -> Tensor:
    """Return the loss () of a question from the log-likelihoods (k,) of its token pairs."""
    request = question.requests[0]
    if question.item.generated:
        return -logliks.logsumexp(0)  # the answer may end in any of k ways
    if _is_rolling(question):
        return -logliks.sum() / max(len(request.args[0].encode()), 1)
    if question.task.OUTPUT_TYPE == "multiple_choice":
        choices = question.task.doc_to_choice(request.doc)
        scores = choice_scores(logliks, choices, question.metric.name)
        return scores.logsumexp(0) - scores[correct_choices(question, choices)].logsumexp(0)
    return -logliks.sum()


def _token_pairs(question: Question, label: str, language_model: FastHFLM) -> list[TokenPair]:
    """Return the contexts and continuations whose log-likelihoods a question's loss needs."""
    request = question.requests[0]
    if question.item.generated:
        return _generated_pairs(question, label, language_model)
    if _is_rolling(question):
        return _windows(request.args[0], language_model)
    requests = question.requests
    if question.task.OUTPUT_TYPE == "multiple_choice" and question.metric.name != "acc_mutual_info":
        requests = requests[: len(question.task.doc_to_choice(request.doc))]
    return [language_model.encode_pair(*each.args) for each in requests]


def _generated_pairs(question: Question, text: str, language_model: FastHFLM) -> list[TokenPair]:
    """Return the prompt with a generated answer, once for every way the answer can end.

    It ends with an end-of-text token, a stop string or the token limit. No continuation is a prefix
    of another, so their probabilities add up.
    """
    until, limit = _generation(question, language_model)
    prompt, tokens = _encode_answer(question, text, language_model)
    if len(tokens) >= limit:
        return [(prompt, tokens[:limit])]
    endings = [(*tokens, end) for end in _end_tokens(language_model)]
    endings += [_encode_answer(question, text + each, language_model)[1] for each in until if each]
    kept: list[Tokens] = []
    for ending in sorted(endings, key=len):
        if not any(ending[: len(each)] == each for each in kept):
            kept.append(ending)
    return [(prompt, ending) for ending in kept]


def _windows(text: str, language_model: FastHFLM) -> list[TokenPair]:
    """Return the disjoint windows of a text, as ``HFLM.loglikelihood_rolling`` makes them."""
    windows = get_rolling_token_windows(
        token_list=language_model.tok_encode(text),
        prefix_token=language_model.prefix_token_id,
        max_seq_len=language_model.max_length,
        context_len=1,
    )
    return [make_disjoint_window(window) for window in windows]


def _end_tokens(language_model: FastHFLM) -> set[int]:
    """Return the tokens that end a text: the model's and the tokenizer's."""
    ends = language_model.model.generation_config.eos_token_id
    own = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return {*own, language_model.eot_token_id}


def _encode_answer(
    question: Question, text: str, language_model: FastHFLM
) -> tuple[Tokens, Tokens]:
    """Return the tokens of the prompt as scored, and of a text behind it."""
    prompt = question.requests[0].args[0]
    context = language_model.encode_prompt(prompt)
    whole = language_model.encode_prompt(prompt + text)
    if whole[: len(context)] == context:
        answer = whole[len(context) :]
    else:  # the prompt's last token would be another one
        answer = tuple(language_model.tok_encode(text, add_special_tokens=False))
    longest = language_model.max_length - _generation(question, language_model)[1]
    return context[-longest:], answer


def _generation(question: Question, language_model: FastHFLM) -> tuple[list[str], int]:
    """Return the strings that end an answer, and its most tokens."""
    settings = normalize_gen_kwargs(question.requests[0].args[1], language_model.max_gen_toks)
    return language_model.stop_strings(settings["until"]), settings["max_gen_toks"]


def _as_generated(question: Question, text: str, language_model: FastHFLM) -> str:
    """Return a text as it would be judged if the model had generated it."""
    until, limit = _generation(question, language_model)
    tokens = _encode_answer(question, text, language_model)[1][:limit]
    found = postprocess_generated_text(language_model.tok_decode(tokens), until, None)
    return str(found)


def _target_texts(question: Question, language_model: FastHFLM, *, chat: bool) -> list[str]:
    """Return a question's first target, with and without delimiter, up to a stop string."""
    task, doc = question.task, question.requests[0].doc
    target: Any = task.doc_to_target(doc)
    if isinstance(target, list | tuple):
        target = next(iter(target), "")
    if isinstance(target, int) and task.get_config("doc_to_choice") is not None:
        target = task.doc_to_choice(doc)[target]
    until, _ = _generation(question, language_model)
    texts = (f"{_delimiter(task, chat=chat)}{target}", f"{target}")
    return [*dict.fromkeys(postprocess_generated_text(text, until, None) for text in texts)]


def _delimiter(task: Task, *, chat: bool) -> str:
    """Return what lm-eval writes between a prompt and its target."""
    begun = task.get_config("gen_prefix")
    if chat and (not begun or begun[-1].isspace()):
        return ""
    return str(task.get_config("target_delimiter") or "")


def _correct_responses(question: Question) -> list[Loglikelihood] | None:
    """Return responses in which only correct choices are likely; None if none is correct."""
    task, requests = question.task, question.requests
    if task.OUTPUT_TYPE != "multiple_choice":
        return [_LIKELY] if len(requests) == 1 else None
    choices = task.doc_to_choice(requests[0].doc)
    correct = correct_choices(question, choices)
    if not 0 < len(correct) < len(choices) <= len(requests):
        return None
    given = [_LIKELY if index in correct else _UNLIKELY for index in range(len(choices))]
    return given + [_LIKELY] * (len(requests) - len(choices))


def _answered(question: Question, responses: Sequence[Any]) -> Question:
    """Return a copy of a question whose requests hold the responses."""
    requests = []
    for request, response in zip(question.requests, responses, strict=True):
        own = copy.copy(request)
        own.resps, own.filtered_resps = [response] * (request.repeats or 1), {}
        requests.append(own)
    return replace(question, requests=tuple(requests))
