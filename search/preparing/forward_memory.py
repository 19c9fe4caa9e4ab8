"""What forward passes of a study take beside the live model's weights, about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from merge_engine.models.memory_plan import ForwardPasses

BATCH: Final = 1024  # tokens of a batch on a CPU, and about as many as are tuned on at a time
PREDICTING: Final = 0.5  # share of a batch's tokens that predict a target, and so have logits


def forward_passes(
    config: Mapping[str, Any], itemsize: int, *, tokens: int = BATCH, tuned: bool
) -> ForwardPasses:
    """Estimate from a language model's text config.

    Args:
        config: As transformers writes it, the largest of a list of layers' numbers; of what it does
            not say, nothing is counted.
        itemsize: Bytes of a number of the live model.
        tokens: Of a batch.
        tuned: Whether weights are tuned by gradient.
    """

    def of(*names: str) -> int:
        return next((_largest(config[name]) for name in names if config.get(name)), 0)

    layers, hidden = of("num_hidden_layers", "n_layer"), of("hidden_size", "n_embd")
    inner = of("intermediate_size", "n_inner") or 4 * hidden
    heads = of("num_attention_heads", "n_head") or 1
    keys = (of("num_key_value_heads") or heads) * (of("head_dim") or hidden // heads)
    vocabulary = of("vocab_size")
    # logits in the model's dtype, in float32, and their logarithms
    logits = int(PREDICTING * tokens) * vocabulary * (itemsize + 8)
    cache = 2 * tokens * 2 * layers * keys * itemsize  # copied once as it grows
    layer = tokens * (8 * hidden + 3 * inner) * itemsize
    scoring = logits + cache + layer
    # of each layer what goes backward, and the gradient of its largest tensor
    tuning = scoring + tokens * layers * (10 * hidden + 4 * inner) * itemsize
    tuning += 2 * hidden * max(vocabulary, inner) * itemsize
    return ForwardPasses(scoring, tuning if tuned else 0)


def _largest(number: Any) -> int:
    """Return a number of a config, the largest of a list; 0 if it is neither."""
    numbers = number if isinstance(number, list | tuple) else [number]
    return max((int(each) for each in numbers if isinstance(each, int | float)), default=0)
