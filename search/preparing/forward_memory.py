"""Estimate the memory of a study's forward passes, in addition to the live model's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from merge_engine.models.memory_plan import ForwardPasses
from search.proposing.tuning import AT_ONCE

if TYPE_CHECKING:
    from objectives.harness.tasks import LoadedTask

BATCH: Final = 1024  # tokens of a batch on a CPU
CACHED: Final = 8 * BATCH  # tokens at most whose keys and values are cached there
JOB_ITEMS: Final = 100  # items of a job, whose texts are generated at once
TEMPLATE: Final = 32  # tokens of a chat template around a question, about
_NEW: Final = 256  # tokens that lm-eval generates at most, unless a task says otherwise


class Tokens(NamedTuple):
    """Tokens that forward passes hold at once."""

    read: int  # go through the layers together
    predicting: int  # of these predict a target, and so have logits
    cached: int = 0  # have keys and values


def scored_tokens(
    tasks: Sequence[LoadedTask], count_tokens: Callable[[str], int], *, chat: bool
) -> list[Tokens]:
    """Estimate the tokens of a batch of each task, and of all texts, which are generated at once.

    Prompts of texts are read in batches, whose keys and values are copied to where those of the
    texts are.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    found = []
    read = batch = texts = written = 0  # of all tasks that generate
    for each in tasks:
        items = math.ceil(JOB_ITEMS * each.weight / sum(one.weight for one in tasks))
        asked, answered, shots = _sizes(each, count_tokens)
        generates = each.task.OUTPUT_TYPE == "generate_until"
        size = max(1, asked + TEMPLATE * chat + (0 if generates else answered))
        rows = max(1, min(items, BATCH // size))
        if not generates:  # keys and values of a shared beginning are those of every row
            behind = rows * (shots + size) if shots or chat else 0
            found.append(Tokens(max(rows * size, shots), rows * answered, min(CACHED, behind)))
            continue
        settings = normalize_gen_kwargs(each.task.get_config("generation_kwargs") or {}, _NEW)
        read, batch = max(read, rows * size, shots), max(batch, rows * (shots + size))
        texts, written = texts + items, written + items * (shots + size + settings["max_gen_toks"])
    if texts:
        found.append(Tokens(read, texts, min(CACHED, batch) + min(CACHED, written)))
    return found or [Tokens(BATCH, BATCH // 2)]  # of a user's own objective


def tuned_tokens(
    tasks: Sequence[LoadedTask], count_tokens: Callable[[str], int], *, chat: bool
) -> Tokens:
    """Estimate the tokens of the items that go backward together, of a batch or more.

    Prompts that begin alike, with few-shot examples or a ``chat`` template, are joined to rows in
    which the beginning is read once. Others are rows of their own, padded to the longest.
    """
    if not tasks:
        return Tokens(BATCH, BATCH // 2)
    asked, answered, shots = zip(*(_sizes(each, count_tokens) for each in tasks), strict=True)
    own = [sum(sizes) for sizes in zip(asked, answered, strict=True)]
    read = AT_ONCE * sum(own) // len(own)
    if not chat and not any(shots):
        read = min(AT_ONCE * max(own), max(BATCH, read))
    read += sum(sorted(shots)[-AT_ONCE:])
    return Tokens(read, AT_ONCE * sum(answered) // len(own))


def _sizes(loaded: LoadedTask, count_tokens: Callable[[str], int]) -> tuple[int, int, int]:
    """Return the tokens of a task's long item: question, choices or target, few-shot examples."""
    if not loaded.sample:
        return 0, 0, 0
    question, choices, target = json.loads(loaded.sample)
    answers = choices or (target if isinstance(target, list) else [target])
    asked, answered = count_tokens(str(question)), sum(count_tokens(str(each)) for each in answers)
    return asked, answered, (loaded.task.get_config("num_fewshot") or 0) * (asked + answered)


def forward_passes(
    config: Mapping[str, Any], itemsize: int, *, scored: Sequence[Tokens], tuned: Tokens | None
) -> ForwardPasses:
    """Estimate the bytes that scoring and tuning take from a language model's text config.

    Args:
        config: As transformers writes it. Of per-layer lists the largest number counts; missing
            keys count nothing.
        itemsize: Bytes of a number of the live model.
        scored: Tokens of batches that are scored, one after the other.
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
        # logits in the model's dtype, and in float32 if that is another, and their logarithms
        logits = tokens.predicting * vocabulary * (8 if itemsize == 4 else itemsize + 8)
        cache = tokens.cached * 2 * layers * keys * itemsize
        return logits + cache + tokens.read * (8 * hidden + 3 * inner) * itemsize

    tuning = 0
    if tuned:
        # of each layer what goes backward; norms are computed in float32, whatever the dtype
        states = (10 * hidden + 4 * inner) * itemsize + 5 * hidden * 4
        tuning = forward(tuned) + tuned.read * layers * states
        # gradients of the logits in float32, and of the largest tensor, as head and as embedding
        tuning += 4 * tuned.predicting * vocabulary + 2 * hidden * max(vocabulary, inner) * itemsize
    return ForwardPasses(max(map(forward, scored)), tuning)


def _largest(number: Any) -> int:
    """Return a number of a config, the largest of a list; 0 if it is neither."""
    numbers = number if isinstance(number, list | tuple) else [number]
    return max((int(each) for each in numbers if isinstance(each, int | float)), default=0)
