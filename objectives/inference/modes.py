"""Which shortcuts of the fast forward pass are on for a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Modes:
    """Shortcuts that are on; with all of them off, lm-eval's own code evaluates the model.

    Attributes:
        scoring: Log-likelihoods in batches of our own; the next four require it.
        sparse_logits: Logits only at positions that predict a target token.
        sparse_mlp: The last layer's MLP only at those positions.
        tree: The answers to one question as branches of one token tree.
        prefix: Keys and values of a shared prefix computed once.
        generation: Greedy decoding in batches that finished texts leave.
    """

    scoring: bool = False
    sparse_logits: bool = False
    sparse_mlp: bool = False
    tree: bool = False
    prefix: bool = False
    generation: bool = False
