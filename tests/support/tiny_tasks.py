"""Tiny real lm-eval tasks, and a harness of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from objectives.entries import TaskEntry
from objectives.harness.harness import Harness
from objectives.harness.tasks import load_tasks
from tiny_models import make_model, make_tokenizer

ROWS = 24


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, name: str, **config) -> None:
    base = {"task": name, "dataset_path": "json", "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | config))


def mean_of(*metrics: str) -> list[dict]:
    return [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]


CHOICE = {
    "output_type": "multiple_choice",
    "dataset_kwargs": {"data_files": {"test": "choice.jsonl", "train": "shots.jsonl"}},
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": mean_of("acc_norm", "acc"),
}
ANSWER = {
    "output_type": "generate_until",
    "dataset_kwargs": {"data_files": {"test": "answer.jsonl"}},
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": mean_of("exact_match"),
}
SHOTS = {"num_fewshot": 2, "fewshot_split": "train", "training_split": "train"}
FIRST_LETTER = {"function": "regex", "regex_pattern": "(.)"}


def greedy_answer(model, tokenizer, question: str) -> str:
    prompt = tokenizer(question, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).split("\n")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Local tasks; the model itself generated half of the targets, so scores are not all 0."""
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = make_model(), make_tokenizer()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(10 * ROWS)]
    questions = [f"{words[row]} {words[row + 1]}?" for row in range(ROWS)]
    choice = [
        {"question": question, "choices": words[row + 9 : row + 12], "gold": row % 3}
        for row, question in enumerate(questions)
    ]
    answer = [
        {
            "question": question,
            "answer": greedy_answer(model, tokenizer, question) if row % 2 else "no",
        }
        for row, question in enumerate(questions)
    ]
    shots = [{"question": f"{word}?", "choices": words[:3], "gold": 1} for word in words[:12]]
    write_rows(folder / "choice.jsonl", [*choice, choice[0]])  # one question comes twice
    write_rows(folder / "answer.jsonl", answer)
    write_rows(folder / "shots.jsonl", shots)
    write_task(folder, "choice", **CHOICE)
    write_task(folder, "choice_shots", **CHOICE | SHOTS)
    write_task(folder, "answer", **ANSWER)
    filters = [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "letter", "filter": [FIRST_LETTER, {"function": "take_first"}]},
    ]
    write_task(folder, "filtered", **ANSWER | {"filter_list": filters})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("data"))
        yield folder


@pytest.fixture
def model():
    return make_model()


def prepare(folder, model, *specs, **settings):
    specs = [TaskEntry(task=spec) if isinstance(spec, str) else spec for spec in specs]
    settings = {"tokenizer": make_tokenizer(), "batch_size": 8} | settings
    unsafe = settings.pop("unsafe_code", False)
    tasks = load_tasks(specs, [folder], unsafe_code=unsafe, trust_task_code=True)
    return Harness(tasks, model=model, **settings)


def values_of(harness, model, items=None):
    answers = harness.score(model, everything(harness) if items is None else items)
    return [answer.value for answer in answers]


def everything(harness):
    return list(range(len(harness.items)))


TASKS = ["choice", "choice_shots", "answer", "filtered"]
