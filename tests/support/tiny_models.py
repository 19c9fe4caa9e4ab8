"""Small models of every architecture that is asked the fast way, and tasks of every output type."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from objectives.inference.agreement import settle_modes
from objectives.inference.fast_hflm import FastHFLM
from tiny_tasks import (
    ANSWER,
    CHOICE,
    FIRST_LETTER,
    make_tokenizer,
    mean_of,
    write_rows,
    write_task,
)

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that answers differ from question to question
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 48},  # shorter than many rows
    "Gemma2": {"head_dim": 8, "sliding_window": 48},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 48},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {},
    "GPTNeoX": {},
    "GPT2": GPT2,
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 32},
}


def make_model(name="Llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | MODELS.get(name, {}) | changes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def stock(model, **settings):
    settings = {"tokenizer": chat_tokenizer(), "batch_size": 8} | settings
    return HFLM(pretrained=model, softmax_dtype="float32", **settings)


def fast(model, **settings):
    settings = {"tokenizer": chat_tokenizer(), "batch_size": 8} | settings
    language_model = FastHFLM(pretrained=model, **settings)
    settle_modes(language_model)
    return language_model


def chat_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    return tokenizer


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
    """The tasks' objects, to be evaluated again and again."""
    names = ["choice", "choice_shots", "answer", "single", "rolled"]
    with contextlib.chdir(folder):
        manager = TaskManager(include_defaults=False, include_path=str(folder))
        return list(manager.load(names)["tasks"].values())


class Evaluated(NamedTuple):
    """What ``simple_evaluate`` found, by (task, document, ...)."""

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
