"""``Harness.score`` against ``simple_evaluate``: CPU seconds and tokens through the model.

A llama of 55 M random weights and 32,768 words is evaluated on made-up documents. For
``simple_evaluate`` tasks are loaded already, batches are of 32, the softmax is float32 and there is
no bootstrap. One JSON line per task:

    python tests/bench/bench_score.py [--tasks letters,...] [--device cuda --dtype bfloat16]
        [--items N] [--layers N] [--study STUDY.yaml]

With ``--study`` it is the base model of that study, in its own dtype, and the study's tasks.
``ratio`` is its CPU seconds divided by ours (wall seconds on a GPU), ``ratio_in_model_calls`` the
same for the seconds inside its language model alone; ``overhead`` is our share outside the model's
forward pass. For the task ``growth``, ``ratio`` is the cost of an item among 2,000 divided by that
of one among 100.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from objectives.entries import TaskEntry
from objectives.harness.encoding import Prompting
from objectives.harness.harness import Harness
from objectives.harness.responding import Responder
from objectives.harness.tasks import load_tasks
from search.study.reading import load_study

LETTERS = "abcdefghijklmnopqrstuvwxyz012345"
WORDS = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
DRAW = random.Random(0)
DOCUMENTS = {"long_answers": 40, "letters": 100, "five_shot": 40, "generation": 64}


def words(least: int, most: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=DRAW.randint(least, most)))


def document(task: str) -> dict[str, Any]:
    question = words(10, 40) if task == "growth" else words(120, 280)
    answers = ["aaa", "bbb", "ccc", "ddd"] if task in ("letters", "growth") else None
    if task in ("five_shot", "generation"):
        question = words(40, 80)
    return {
        "question": question,
        "choices": answers or [words(8, 16) for _ in range(4)],
        "gold": DRAW.randrange(4),
    }


def settings(task: str) -> dict[str, Any]:
    metric = "exact_match" if task == "generation" else "acc"
    shared = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {part: f"{task}_{part}.jsonl" for part in ("test", "train")}
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    if task in ("five_shot", "generation"):
        first = {"sampler": "first_n", "split": "train"}
        shared |= {"training_split": "train", "num_fewshot": 5, "fewshot_config": first}
    if task == "generation":
        # one word in eleven has the letter, so texts end at different lengths
        decoding = {"until": ["q"], "max_gen_toks": 32, "do_sample": False}
        return shared | {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": decoding,
        }
    return shared | {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }


def write_task(folder: Path, task: str, count: int) -> None:
    for part, rows in (("test", count), ("train", 8)):
        lines = (json.dumps(document(task)) + "\n" for _ in range(rows))
        (folder / f"{task}_{part}.jsonl").write_text("".join(lines))
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(settings(task)))


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*WORDS[:-2], "</s>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def make_model(device: str, dtype: str, layers: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=len(WORDS) - 2,
        pad_token_id=len(WORDS) - 2,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(device, getattr(torch, dtype))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(2.0)  # so that answers depend on questions
    return model


class Watched(HFLM):
    """``HFLM`` that records its responses and the seconds they took."""

    def __init__(self, clock: Callable[[], float], **given: Any) -> None:
        super().__init__(**given)
        self.clock = clock
        self.seconds = 0.0
        self.responses: dict[tuple[Any, ...], Any] = {}

    def _watched(self, method: Callable[..., list[Any]], requests: Any) -> list[Any]:
        start = self.clock()
        answers = method(requests, disable_tqdm=True)
        self.seconds += self.clock() - start
        self.responses |= {str(r.args): a for r, a in zip(requests, answers, strict=True)}
        return answers

    def loglikelihood(self, requests, disable_tqdm=False):
        return self._watched(super().loglikelihood, requests)

    def generate_until(self, requests, disable_tqdm=False):
        return self._watched(super().generate_until, requests)


class Replayed:
    """Recorded responses, as a language model."""

    def __init__(self, watched: Watched) -> None:
        self.model = watched.model
        self.responses = watched.responses

    def loglikelihood(self, requests, disable_tqdm=False):
        return [self.responses[str(request.args)] for request in requests]

    def generate_counted(self, requests, journal=None):
        return [(text, 0) for text in self.loglikelihood(requests)]


class Meter:
    """Counts a model's input tokens and the seconds of its forward passes."""

    def __init__(self, model: torch.nn.Module, clock: Callable[[], float]) -> None:
        self.tokens, self.seconds, self.clock = 0, 0.0, clock
        model.get_input_embeddings().register_forward_hook(self._count)
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _count(self, module, read, embedded) -> None:
        self.tokens += read[0].numel()

    def _start(self, module, read) -> None:
        self.began = self.clock()

    def _stop(self, module, read, written) -> None:
        self.seconds += self.clock() - self.began

    def take(self) -> tuple[int, float]:
        taken = self.tokens, self.seconds
        self.tokens, self.seconds = 0, 0.0
        return taken


@dataclass(frozen=True)
class Subject:
    """What is measured: a task whose files are in a folder, asked of a model."""

    task: str
    count: int  # items of it, the first
    folder: Path
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    chat: bool = False  # under the tokenizer's chat template


@contextlib.contextmanager
def made_up(task: str, given: argparse.Namespace) -> Iterator[Subject]:
    model = make_model(given.device, given.dtype, given.layers)
    count = 2000 if task == "growth" else min(given.items, DOCUMENTS[task])
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_task(Path(name), task, count)
        yield Subject(task, count, Path(name), model, make_tokenizer())


@contextlib.contextmanager
def of_study(task: str, given: argparse.Namespace) -> Iterator[Subject]:
    spec = load_study(given.study)
    base, folder = str(spec.base_model), Path(spec.objective.include_path[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    chat = spec.objective.apply_chat_template
    with contextlib.chdir(folder):
        yield Subject(task, given.items, folder, model.to(given.device), tokenizer, chat)


def clock_of(device: str) -> Callable[[], float]:
    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall if device.startswith("cuda") else time.process_time


def compare(subject: Subject, clock: Callable[[], float]) -> dict:
    task, model, tokenizer = subject.task, subject.model, subject.tokenizer
    meter = Meter(model, clock)
    stock = Watched(
        clock, pretrained=model, tokenizer=tokenizer, batch_size=32, softmax_dtype="float32"
    )
    manager = TaskManager(include_defaults=False, include_path=str(subject.folder))
    loaded = list(manager.load([task])["tasks"].values())
    meter.take()
    start = clock()
    simple_evaluate(
        stock,
        tasks=loaded,
        task_manager=manager,
        limit=subject.count,
        apply_chat_template=subject.chat,
        bootstrap_iters=0,
        log_samples=False,
    )
    before = clock() - start
    tokens_before, _ = meter.take()
    mine = load_tasks([TaskEntry(task=task)], [subject.folder])
    prompting = Prompting(apply_chat_template=subject.chat)
    harness = Harness(mine, model=model, tokenizer=tokenizer, prompting=prompting)
    items = range(min(subject.count, len(harness.items)))
    harness.score(model, items)  # plans
    trials = []
    for _ in range(2):
        meter.take()
        start = clock()
        values = harness.score(model, items)
        trials.append((clock() - start, *meter.take()))
    after, tokens_after, forward = min(trials)
    requests = [request for number in items for request in harness.questions[number].requests]
    ours = {str(request.args): request.resps[0] for request in requests}
    harness.responder = Responder(Replayed(stock))
    theirs = harness.score(model, items)
    written = harness.items[0].generated
    differences = [abs(ours[key][0] - stock.responses[key][0]) for key in ours if not written]
    return {
        "task": task,
        "ratio": round(before / after, 2),
        "ratio_in_model_calls": round(stock.seconds / after, 2),
        "items": len(items),
        "items_differ": sum(a.value != b.value for a, b in zip(values, theirs, strict=True)),
        "texts_differ": sum(ours[key] != stock.responses[key] for key in ours) if written else None,
        "max_loglik_difference": max(differences, default=None),
        "tokens_before": tokens_before,
        "tokens_after": tokens_after,
        "seconds_before": round(before, 2),
        "seconds_after": round(after, 2),
        "overhead": round(1 - forward / after, 4),
    }


def growth(subject: Subject, clock: Callable[[], float]) -> dict:
    model = subject.model
    tasks = load_tasks([TaskEntry(task="growth")], [subject.folder])
    harness = Harness(tasks, model=model, tokenizer=subject.tokenizer)
    meter = Meter(model, clock)
    cost, read = {}, {}
    for count in (100, 2000):
        harness.score(model, range(count))  # plans
        repeats = 5 if count == 100 else 1
        meter.take()
        start = clock()
        for _ in range(repeats):
            harness.score(model, range(count))
        cost[count] = (clock() - start) / repeats / count
        read[count] = meter.take()[0] // repeats
    return {
        "task": "growth",
        "ratio": round(cost[2000] / cost[100], 3),
        "items_differ": None,
        "max_loglik_difference": None,
        "tokens_before": read[100],
        "tokens_after": read[2000],
        "milliseconds_per_item": {count: round(1e3 * each, 2) for count, each in cost.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--items", type=int, default=100, help="of a task at most")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--study", type=Path)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    known = [*DOCUMENTS, "growth"]
    if given.study:
        known = [entry.task for entry in load_study(given.study).objective.tasks]
    clock = clock_of(given.device)
    for task in given.tasks.split(",") if given.tasks else known:
        with (of_study if given.study else made_up)(task, given) as subject:
            line = (growth if task == "growth" else compare)(subject, clock)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
