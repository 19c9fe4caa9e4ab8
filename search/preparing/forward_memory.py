"""Estimate the memory of a study's forward passes, in addition to the live model's weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from merge_engine.models.memory_plan import ForwardPasses
from search.proposing.tuning import AT_ONCE

if TYPE_CHECKING:
    from objectives.harness.tasks import LoadedTask

BATCH: Final = 1024  # tokens of a batch on a CPU
CACHED: Final = 8 * BATCH  # tokens at most whose keys and values are cached there
JOB_ITEMS: Final = 100  # items of a job, whose texts are generated at once
_NEW: Final = 256  # tokens that lm-eval generates at most, unless a task says otherwise


class Tokens(NamedTuple):
    """Tokens that forward passes hold at once."""

    read: int  # go through the layers together
    predicting: int  # of these predict a target, and so have logits
    cached: int = 0  # have keys and values while texts are generated


def scored_tokens(tasks: Sequence[LoadedTask], count_tokens: Callable[[str], int]) -> Tokens:
    """Estimate the tokens of a batch of items that are scored, of the task with most of each."""
    from lm_eval.models.utils import normalize_gen_kwargs

    predicting = cached = 0
    for each in tasks:
        size = max(1, count_tokens(each.sample))
        if each.task.OUTPUT_TYPE == "generate_until":
            settings = normalize_gen_kwargs(each.task.get_config("generation_kwargs") or {}, _NEW)
            new = settings["max_gen_toks"]
            cached = max(cached, min(CACHED, JOB_ITEMS * (size + new)))
            predicting = max(predicting, min(JOB_ITEMS, BATCH))
        else:
            scored = sum(map(count_tokens, _answers(each)))
            predicting = max(predicting, min(BATCH, BATCH * scored // size))
    return Tokens(BATCH, predicting, cached) if tasks else Tokens(BATCH, BATCH // 2)


def tuned_tokens(tasks: Sequence[LoadedTask], count_tokens: Callable[[str], int]) -> Tokens:
    """Estimate the tokens of the items that go backward together, of a batch or more.

    A task's items share their few-shot examples, which are read once. Rows are padded, so even a
    batch of short items comes near the limit. One answer of an item has a loss.
    """
    own = [count_tokens(each.sample) for each in tasks]
    answers = [max(map(count_tokens, _answers(each)), default=0) for each in tasks]
    shots = (each.task.get_config("num_fewshot") or 0 for each in tasks)
    shared = sorted(count * size for count, size in zip(shots, own, strict=True))
    read = max(BATCH, AT_ONCE * sum(own) // max(1, len(own)) + sum(shared[-AT_ONCE:]))
    return Tokens(read, min(read, AT_ONCE * sum(answers) // max(1, len(own))))


def _answers(loaded: LoadedTask) -> list[str]:
    """Return the choices of a task's long item, or its target."""
    if not loaded.sample:
        return []
    _, choices, target = json.loads(loaded.sample)
    found = choices or (target if isinstance(target, list) else [target])
    return [str(each) for each in found]


def forward_passes(
    config: Mapping[str, Any], itemsize: int, *, scored: Tokens, tuned: Tokens | None
) -> ForwardPasses:
    """Estimate the bytes that scoring and tuning take from a language model's text config.

    Args:
        config: As transformers writes it. Of per-layer lists the largest number counts; missing
            keys count nothing.
        itemsize: Bytes of a number of the live model.
        scored: Tokens of a batch that is scored.
        tuned: Tokens of a backward pass; None where nothing is tuned.
    """

    def of(*names: str) -> int:
        return next((_largest(config[name]) for name in names if config.get(name)), 0)

    layers, hidden = of("num_hidden_layers", "n_layer"), of("hidden_size", "n_embd")
    inner = of("intermediate_size", "n_inner") or 4 * hidden
    heads = of("num_attention_heads", "n_head") or 1
    keys = (of("num_key_value_heads") or heads) * (of("head_dim") or hidden // heads)
    vocabulary = of("vocab_size")

    def forward(tokens: Tokens) -> int:
        # logits in the model's dtype, in float32, and their logarithms
        logits = tokens.predicting * vocabulary * (itemsize + 8)
        cached = tokens.cached + 2 * tokens.read  # a batch's is copied once as it grows
        cache = cached * 2 * layers * keys * itemsize
        return logits + cache + tokens.read * (8 * hidden + 3 * inner) * itemsize

    tuning = 0
    if tuned:  # of each layer what goes backward, and the gradient of its largest tensor
        tuning = forward(tuned) + tuned.read * layers * (10 * hidden + 4 * inner) * itemsize
        tuning += 2 * hidden * max(vocabulary, inner) * itemsize
    return ForwardPasses(forward(scored), tuning)


def _largest(number: Any) -> int:
    """Return a number of a config, the largest of a list; 0 if it is neither."""
    numbers = number if isinstance(number, list | tuple) else [number]
    return max((int(each) for each in numbers if isinstance(each, int | float)), default=0)
