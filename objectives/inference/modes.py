"""Which shortcuts of the fast forward pass a model is evaluated with, and decoding's limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Modes:
    """The ways of asking a model that gave lm-eval's answers.

    Attributes:
        scoring: Log-likelihoods by our own batches at all; without it nothing is.
        kept: Logits only where they are needed.
        tail: The last layer's MLP there alone, too.
        tree: Answers as branches of one row.
        prefix: A common beginning read once.
        generation: Our own greedy decoding.
    """

    scoring: bool = False
    kept: bool = False
    tail: bool = False
    tree: bool = False
    prefix: bool = False
    generation: bool = False


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued.

    Attributes:
        max_tokens: The most tokens, at least one.
        stops: A text ends where one of these comes up.
        lookback: Tokens in which the last of them would be found.
    """

    max_tokens: int
    stops: tuple[str, ...] = ()
    lookback: int = 1
