"""Log-likelihoods of continuations, computed over token trees behind shared prefixes.

Shapes: b rows of t tokens in a batch, m positions that predict a target, n targets (n > m if
answers to a question differ only in their last token).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from objectives.inference.forward import ModelRunner, plain_length, repeat_cache
from objectives.inference.token_tree import (
    Request,
    Tokens,
    TokenTree,
    batches_by_length,
    build_trees,
    group_by_prefix,
    join_groups,
)
from objectives.journal import Journal

SOFTMAX_DTYPE = torch.float32
_SOFTMAX_ROWS = 1024  # positions whose log-softmax is in memory at once
_ARGMAX_ROWS = 64  # of these, positions whose argmax is taken at once

Loglikelihood = tuple[float, bool]  # its value in nats, and whether greedy decoding gives the text


@dataclass(frozen=True)
class TreeBatch:
    """Token trees padded on the right, and what they predict."""

    tokens: Tensor  # (b, t)
    positions: Tensor  # (b, t), position of each token in its sequence
    # (b, t), see `TokenTree`; None where plain causal attention is the same.
    subtree_ends: Tensor | None
    predicting: Tensor  # (b, t), True at the m positions that predict a target
    sources: Tensor  # (n), which of the m positions predicts each target
    targets: Tensor  # (n), the target tokens
    # (request index, number of its targets), in the order of `targets`.
    target_counts: tuple[tuple[int, int], ...]


PrefixBatches = tuple[Tokens, tuple[TreeBatch, ...]]  # a prefix, and batches of rows behind it


class LoglikelihoodScorer:
    """Plans batches for log-likelihood requests and evaluates them."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def plan(self, requests: Iterable[Request]) -> tuple[PrefixBatches, ...]:
        """Lay requests out in batches, grouped by prefix.

        Sequences that the model would not read with plain causal attention get rows of their own.
        """
        plain = plain_length(self._runner.model.config)
        by_task: dict[Hashable, list[Request]] = defaultdict(list)
        beyond = []
        for request in requests:
            if len(request.inputs) > plain:
                beyond.append(request)
            else:
                by_task[request.task].append(request)
        modes = self._runner.modes
        planned: list[PrefixBatches] = []
        most = self._runner.tokens_per_batch if modes.tree else 0
        for of_task in by_task.values():
            joins = modes.tree and not modes.prefix
            trees = build_trees(join_groups(of_task, most) if joins else of_task, most)
            groups = group_by_prefix(trees) if modes.prefix else [((), trees)]
            planned += [self._batched(prefix, rows) for prefix, rows in groups]
        return (*planned, self._batched((), build_trees(beyond, 0)))

    def _batched(self, prefix: Tokens, trees: Iterable[TokenTree]) -> PrefixBatches:
        rest = [tree.without_prefix(len(prefix)) for tree in trees]
        runner = self._runner
        batches = batches_by_length(rest, runner.tokens_per_batch, runner.held_tokens, len(prefix))
        return prefix, tuple(_pad(rows, self._runner.device) for rows in batches)

    def score_requests(self, requests: Sequence[Request]) -> list[Loglikelihood]:
        """Plan requests and return their log-likelihoods, by request index."""
        return self.score(self.plan(requests), len(requests))

    @torch.no_grad()
    def score(
        self, plan: Iterable[PrefixBatches], count: int, journal: Journal | None = None
    ) -> list[Loglikelihood]:
        """Return the log-likelihoods of ``count`` planned requests, by request index.

        Batches are noted in a journal; those that it has are not evaluated.
        """
        scores: dict[int, Loglikelihood] = dict(journal.logliks) if journal else {}
        for prefix, batches in plan:
            left = [one for one in batches if any(n not in scores for n, _ in one.target_counts)]
            cache = self._runner.cache_prefix(prefix) if left else None
            for batch in left:
                # logits have no name: one would keep them during the next forward pass
                log_probs, greedy = _target_log_probs(
                    self._logits(batch, len(prefix), cache), batch
                )
                found, start = {}, 0
                for index, length in batch.target_counts:
                    own = slice(start, start + length)
                    found[index] = (float(log_probs[own].sum()), bool(greedy[own].all()))
                    start += length
                if journal:
                    journal.add_logliks(found)
                scores |= found
        return [scores.get(index, (math.nan, False)) for index in range(count)]

    def differentiable(self, plan: Iterable[PrefixBatches]) -> Tensor:
        """Return the log-likelihoods (n,) of all planned requests in the order of their indices.

        They are float32 on the model's device. The plan has no prefixes, whose keys and values
        have no gradients.
        """
        found: dict[int, Tensor] = {}
        for _, batches in plan:
            for batch in batches:
                logits = self._logits(batch, 0, None)  # (m, vocabulary)
                log_probs = logits.log_softmax(-1, dtype=SOFTMAX_DTYPE)
                chosen = log_probs[batch.sources, batch.targets]
                indices, lengths = zip(*batch.target_counts, strict=True)
                parts = torch.split(chosen, list(lengths))
                found |= {index: part.sum() for index, part in zip(indices, parts, strict=True)}
        return torch.stack([found[index] for index in sorted(found)])

    def _logits(self, batch: TreeBatch, prefix: int, cache: DynamicCache | None) -> Tensor:
        """Return logits at the batch's predicting positions, (m, vocabulary)."""
        settings: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            settings["past_key_values"] = repeat_cache(cache, len(batch.tokens))
        if batch.subtree_ends is not None:
            dtype = self._runner.model.dtype
            settings["attention_mask"] = _tree_mask(batch.subtree_ends, prefix, dtype)
            settings["position_ids"] = batch.positions
        return self._runner.logits_at(batch.predicting, batch.tokens, **settings)


def _pad(rows: Sequence[TokenTree], device: torch.device) -> TreeBatch:
    shape = (len(rows), max(map(len, rows)))
    tokens = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    # padding attends to itself: a softmax over nothing would be NaN
    ends = torch.arange(1, shape[1] + 1).repeat(len(rows), 1)
    predicting = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row.tokens)
        positions[number, : len(row)] = torch.tensor(row.positions)
        ends[number, : len(row)] = torch.tensor(row.subtree_ends)
        for prediction in row.predictions:
            predicting[number, list(prediction.nodes)] = True
    source = predicting.flatten().cumsum(0).reshape(shape) - 1
    predictions = [(number, each) for number, row in enumerate(rows) for each in row.predictions]
    causal = all(row.is_chain and row.positions[0] == 0 for row in rows)
    return TreeBatch(
        tokens=tokens.to(device),
        positions=positions.to(device),
        subtree_ends=None if causal else ends.to(device),
        predicting=predicting.to(device),
        sources=torch.cat([source[n, list(each.nodes)] for n, each in predictions]).to(device),
        targets=torch.tensor([t for _, each in predictions for t in each.targets], device=device),
        target_counts=tuple((each.index, len(each.targets)) for _, each in predictions),
    )


def _tree_mask(subtree_ends: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask (b, 1, t, prefix + t) of trees behind a prefix.

    It is 0 where a node may attend, the prefix included, and the dtype's lowest number elsewhere.
    """
    rows, length = subtree_ends.shape
    node = torch.arange(length, device=subtree_ends.device)
    key, query = node[None, None, :], node[None, :, None]
    hidden = (key > query) | (query >= subtree_ends[:, None, :])  # (b, t, t)
    mask = torch.zeros(rows, length, prefix + length, dtype=dtype, device=node.device)
    mask[:, :, prefix:].masked_fill_(hidden, torch.finfo(dtype).min)
    return mask[:, None]


def _target_log_probs(logits: Tensor, batch: TreeBatch) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability and whether it is the argmax, both (n), on the CPU.

    ``logits`` (m, vocabulary) are at the batch's predicting positions.
    """
    sources = batch.sources.to(logits.device)  # the head may be on another device than the inputs
    targets_of = batch.targets.to(logits.device)
    log_probs = torch.empty(len(sources), dtype=SOFTMAX_DTYPE, device=logits.device)
    greedy = torch.zeros(len(sources), dtype=torch.bool, device=logits.device)
    for first in range(0, len(logits), _SOFTMAX_ROWS):
        part = logits[first : first + _SOFTMAX_ROWS]
        chosen = ((sources >= first) & (sources < first + len(part))).nonzero()[:, 0]
        rows, targets = sources[chosen] - first, targets_of[chosen]
        part_log_probs = part.log_softmax(-1, dtype=SOFTMAX_DTYPE)  # (m', vocabulary)
        log_probs[chosen] = part_log_probs[rows, targets]
        # argmax takes six times as long as amax and matters only where a target has the maximum
        largest = (log_probs[chosen] == part_log_probs.amax(-1)[rows]).nonzero()[:, 0]
        for few in torch.split(largest, _ARGMAX_ROWS):  # rows are copied
            greedy[chosen[few]] = part_log_probs[rows[few]].argmax(-1) == targets[few]
    return log_probs.cpu(), greedy.cpu()
