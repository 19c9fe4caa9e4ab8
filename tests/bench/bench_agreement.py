"""``FastHFLM`` against ``HFLM`` under ``simple_evaluate``: one JSON line per model and dtype.

    PYTHONPATH=tests/support python tests/bench/bench_agreement.py [--models Llama,...]
        [--dtypes float32,bfloat16] [--device cuda]

Tiny models of random weights are evaluated on tasks of every output type, with and without a chat
template, then again after their weights were changed in place. ``items_differ`` counts items (of
``items``) with another value of a metric; ``stock_differ`` those that differ between ``HFLM`` in
batches of one and of 8. Perplexities differ in their last bits between any two runs of a model of
random weights, and count beyond a relative ``1e-5`` in float32, ``1e-2`` in bfloat16.
``values_grown`` counts items with another value when they are evaluated in growing blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lm_eval_reference import (
    Evaluated,
    evaluated,
    fast,
    load_every_type,
    stock,
    write_every_type,
)
from objectives.entries import TaskEntry
from objectives.harness.harness import Harness
from objectives.harness.tasks import load_tasks
from tiny_models import MODELS, chat_tokenizer, make_model

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
ENDS = (0, 3, 10, 30, 60)
PREDICTED = ("choice", "choice_shots", "single")


def triples(
    model: PreTrainedModel, tasks: list[Any]
) -> Iterator[tuple[Evaluated, Evaluated, Evaluated]]:
    """Yield results of ours, theirs and theirs in batches of one: by weights, by chat template."""
    evaluators = fast(model), stock(model), stock(model, batch_size=1)
    for factor in (1.0, -0.7):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(factor)
        for chat in (False, True):
            ours, theirs, alone = (evaluated(lm, tasks, chat) for lm in evaluators)
            yield ours, theirs, alone


def differing(ours: Evaluated, theirs: Evaluated, tolerance: float) -> int:
    """Count items with another value."""

    def agree(key: tuple[str, int, str]) -> bool:  # task, document, metric
        one, other = ours.values[key], theirs.values[key]
        if key[2] == "word_perplexity":  # a log-likelihood, and of how many words
            return math.isclose(one[0], other[0], rel_tol=tolerance)
        return one == other

    return len({key[:2] for key in theirs.values if not agree(key)})


def compare(model: PreTrainedModel, tasks: list[Any], tolerance: float) -> dict[str, Any]:
    items, different, stock_different, texts, largest = 0, 0, 0, 0, 0.0
    for ours, theirs, alone in triples(model, tasks):
        items += len({key[:2] for key in theirs.values})
        different += differing(ours, theirs, tolerance)
        stock_different += differing(alone, theirs, tolerance)
        for key, response in theirs.responses.items():
            mine = ours.responses[key]
            if isinstance(response, str):
                texts += mine != response
            elif isinstance(response, tuple | list):
                largest = max(largest, abs(mine[0] - response[0]))
    return {
        "items": items,
        "items_differ": different,
        "stock_differ": stock_different,
        "texts_differ": texts,
        "max_loglik_difference": largest,
    }


def grown(model: PreTrainedModel, folder: Path) -> int:
    """Count items whose value in growing blocks is not the one of all at once."""
    tasks = load_tasks([TaskEntry(task=task) for task in PREDICTED], [folder])
    harness = Harness(tasks, model=model, tokenizer=chat_tokenizer(), batch_size=8)
    whole = [answer.value for answer in harness.score(model, range(ENDS[-1]))]
    parts = [
        answer.value
        for start, end in itertools.pairwise(ENDS)
        for answer in harness.score(model, range(start, end))
    ]
    return sum(one != other for one, other in zip(whole, parts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        write_every_type(Path(name))
        tasks = load_every_type(Path(name))
        for dtype in given.dtypes.split(","):
            for model_name in given.models.split(","):
                model = make_model(model_name, getattr(torch, dtype)).to(given.device)
                line = {"model": model_name, "dtype": dtype, "modes": str(fast(model).modes)}
                line |= {"values_grown": grown(model, Path(name))}
                line |= compare(model, tasks, TOLERANCE[dtype])
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
