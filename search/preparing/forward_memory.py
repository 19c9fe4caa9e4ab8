"""Estimate the memory of a study's forward passes, in addition to the live model's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from merge_engine.models.memory_plan import ForwardPasses
from search.proposing.tuning import AT_ONCE

if TYPE_CHECKING:
    from objectives.harness.tasks import LoadedTask

BATCH: Final = 1024  # tokens of a batch on a CPU
PREDICTING: Final = 0.5  # share of a batch's tokens that predict a target, and so have logits


def tuned_tokens(tasks: Sequence[LoadedTask], count_tokens: Callable[[str], int]) -> int:
    """Estimate the tokens of the items that go backward together, of a batch or more.

    A task's items share their few-shot examples, which are read once. Rows are padded, so even a
    batch of short items comes near the limit.
    """
    own = [count_tokens(each.sample) for each in tasks]
    shots = (each.task.get_config("num_fewshot") or 0 for each in tasks)
    shared = sorted(count * size for count, size in zip(shots, own, strict=True))
    return max(BATCH, AT_ONCE * sum(own) // max(1, len(own)) + sum(shared[-AT_ONCE:]))


def forward_passes(config: Mapping[str, Any], itemsize: int, *, tuned: int) -> ForwardPasses:
    """Estimate the bytes that scoring and tuning take from a language model's text config.

    Args:
        config: As transformers writes it. Of per-layer lists the largest number counts; missing
            keys count nothing.
        itemsize: Bytes of a number of the live model.
        tuned: Tokens of a backward pass; 0 where nothing is tuned.
    """

    def of(*names: str) -> int:
        return next((_largest(config[name]) for name in names if config.get(name)), 0)

    layers, hidden = of("num_hidden_layers", "n_layer"), of("hidden_size", "n_embd")
    inner = of("intermediate_size", "n_inner") or 4 * hidden
    heads = of("num_attention_heads", "n_head") or 1
    keys = (of("num_key_value_heads") or heads) * (of("head_dim") or hidden // heads)
    vocabulary = of("vocab_size")

    def forward(tokens: int) -> int:
        # logits in the model's dtype, in float32, and their logarithms
        logits = int(PREDICTING * tokens) * vocabulary * (itemsize + 8)
        cache = 2 * tokens * 2 * layers * keys * itemsize  # copied once as it grows
        return logits + cache + tokens * (8 * hidden + 3 * inner) * itemsize

    # of each layer what goes backward, and the gradient of its largest tensor
    tuning = forward(tuned) + tuned * layers * (10 * hidden + 4 * inner) * itemsize
    tuning += 2 * hidden * max(vocabulary, inner) * itemsize
    return ForwardPasses(forward(BATCH), tuning if tuned else 0)


def _largest(number: Any) -> int:
    """Return a number of a config, the largest of a list; 0 if it is neither."""
    numbers = number if isinstance(number, list | tuple) else [number]
    return max((int(each) for each in numbers if isinstance(each, int | float)), default=0)
