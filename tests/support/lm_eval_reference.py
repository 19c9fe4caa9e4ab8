"""``FastHFLM`` beside lm-eval's ``HFLM``, and tasks of every output type to compare them on."""

from __future__ import annotations

import contextlib
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from objectives.inference.agreement import settle_modes
from objectives.inference.fast_hflm import FastHFLM
from objectives.inference.forward import Modes
from tiny_models import chat_tokenizer
from tiny_tasks import (
    ANSWER,
    CHOICE,
    FIRST_LETTER,
    mean_of,
    write_rows,
    write_task,
)

ALL = replace(Modes(*[True] * len(fields(Modes))), captured=False)  # on a CPU


def stock(model, **settings):
    settings = {"tokenizer": chat_tokenizer(), "batch_size": 8} | settings
    return HFLM(pretrained=model, softmax_dtype="float32", **settings)


def fast(model, **settings):
    settings = {"tokenizer": chat_tokenizer(), "batch_size": 8} | settings
    language_model = FastHFLM(pretrained=model, **settings)
    settle_modes(language_model)
    return language_model


def questions(count=16):
    """Long answers, letters, contexts that differ early, no context; most share a prefix."""
    draw = random.Random(0)

    def text(least, most):
        return "".join(draw.choices("abcdefgh ", k=draw.randint(least, most))).strip() or "a"

    examples = f"examples: {text(30, 40)} "
    requests = []
    for doc in range(count):
        context = (examples if doc % 5 else "") + text(5, 30) + "?"
        for answer in range(4):
            arguments = [
                (context, f" {text(1, 20)}"),
                (context, " " + "abcd"[answer]),
                (f"{context} {text(1, 5)}", " and the rest"),
                ("" if answer % 2 else context, f" {text(1, 9)}"),
            ][doc % 4]
            requests.append(Instance("loglikelihood", {}, arguments, answer, ("t", doc, 1)))
    return requests


def prompts(count=8, **settings):
    of_doc = {request.doc_id: request.args[0] or "a" for request in questions(count)}
    wanted = {"until": ["a", "bc"], "max_gen_toks": 10, "do_sample": False} | settings
    return [
        Instance("generate_until", {}, (prompt, wanted), 0, ("g", doc, 1))
        for doc, prompt in of_doc.items()
    ]


def rolling():
    texts = [("ab cd " * count)[:-1] for count in (2, 30, 90)]  # the last is longer than a window
    return [
        Instance("loglikelihood_rolling", {}, (t,), 0, ("r", n, 1)) for n, t in enumerate(texts)
    ]


def scores(language_model, requests):
    return language_model.loglikelihood(requests, disable_tqdm=True)


def texts(language_model, requests):
    return language_model.generate_until(requests, disable_tqdm=True)


def difference(ours, theirs):
    return max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))


def write_every_type(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(60)]
    rows = [
        {
            "question": f"{words[n]} {words[n + 1]}?",
            "choices": words[n + 9 : n + 12],
            "gold": n % 3,
            "answer": words[n],
        }
        for n in range(20)
    ]
    for name in ("choice.jsonl", "answer.jsonl", "shots.jsonl"):
        write_rows(folder / name, rows)
    shots = {"num_fewshot": 3, "training_split": "train", "fewshot_config": {"sampler": "first_n"}}
    rolled = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{answer}}",
        "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
        "metric_list": [{"metric": "word_perplexity"}],
    }
    single = ANSWER | {"output_type": "loglikelihood", "metric_list": mean_of("acc")}
    single.pop("generation_kwargs")
    letter = {"name": "letter", "filter": [{**FIRST_LETTER}, {"function": "take_first"}]}
    write_task(folder, "choice", **CHOICE)
    write_task(folder, "choice_shots", **CHOICE | shots)
    write_task(folder, "answer", **ANSWER | {"filter_list": [letter]})
    write_task(folder, "single", **single)
    write_task(folder, "rolled", **rolled)


def load_every_type(folder: Path) -> list[Any]:
    """Return the tasks' objects, which can be evaluated repeatedly."""
    names = ["choice", "choice_shots", "answer", "single", "rolled"]
    with contextlib.chdir(folder):
        manager = TaskManager(include_defaults=False, include_path=str(folder))
        return list(manager.load(names)["tasks"].values())


class Evaluated(NamedTuple):
    """Results of ``simple_evaluate`` by (task, document, ...)."""

    values: dict[tuple[str, int, str], Any]  # by metric
    responses: dict[tuple[str, int, int], Any]  # by request


def evaluated(language_model: HFLM, tasks: list[Any], chat: bool) -> Evaluated:
    with pytest.MonkeyPatch.context() as patch:  # it lists this machine's packages, for seconds
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        results = simple_evaluate(
            language_model,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
    values, responses = {}, {}
    for task, samples in results["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                values[task, sample["doc_id"], metric] = sample[metric]
            for number, answers in enumerate(sample["resps"]):
                responses[task, sample["doc_id"], number] = answers[0]
    return Evaluated(values, responses)
