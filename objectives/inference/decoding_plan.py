"""Plan which prompts are read together, and which texts share slots, for greedy decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from objectives.inference.forward import ModelRunner, plain_length
from objectives.inference.token_tree import Tokens, batches_by_length, group_by_prefix

# while other prompts wait, a prefill batch has at most this share of the slots
_REFILLED = 0.25
# texts share slots if their maximum lengths differ by at most this factor
_LONGER = 2


@dataclass(frozen=True)
class StopCriteria:
    """What ends a generated text, besides the model's end-of-text tokens."""

    max_tokens: int  # limit of generated tokens, at least 1
    strings: tuple[str, ...] = ()  # stop strings, searched for in the last `lookback` tokens
    lookback: int = 1

    @classmethod
    def from_strings(
        cls, strings: Sequence[str], max_tokens: int, tokenizer: PreTrainedTokenizerBase
    ) -> StopCriteria:
        """Return criteria whose lookback is long enough for every stop string."""
        lengths = (len(tokenizer.encode(string, add_special_tokens=False)) for string in strings)
        # a stop string may be written in more tokens than its own encoding; lm-eval adds two too
        return cls(max_tokens, tuple(strings), max(lengths, default=0) + 2)


class Continuation(NamedTuple):
    """A text to be generated."""

    prompt: Tokens
    criteria: StopCriteria
    begun: Tokens = ()  # tokens generated so far

    @property
    def columns(self) -> int:
        """Maximum tokens of prompt and generated text together."""
        return len(self.prompt) + self.criteria.max_tokens


@dataclass(frozen=True)
class Prompt:
    """What is read before a text is generated."""

    index: int  # of the text
    wanted: Continuation
    tokens: Tokens  # prompt and begun text, without the shared prefix

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trunk(self) -> Tokens:
        """Tokens that may be cut off: logits are needed at the last."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that share a prefix and are prefilled together, padded to one length."""

    prefix: Tokens
    prompts: tuple[Prompt, ...]
    tokens: Tensor  # (b, t)
    mask: Tensor  # (b, t), 1 at tokens and 0 at padding


@dataclass(frozen=True)
class Pool:
    """Prompts that share a set of slots."""

    rows: int  # number of slots
    columns: int  # tokens per slot
    batches: tuple[PromptBatch, ...]  # prefill batches, none with more prompts than slots


@dataclass(frozen=True)
class DecodingPlan:
    """The layout of prompts for decoding."""

    pools: tuple[Pool, ...]  # decoded in slots
    batches: tuple[PromptBatch, ...]  # decoded batch by batch


def plan_decoding(
    texts: Iterable[Continuation], runner: ModelRunner, most_rows: int | None = None
) -> DecodingPlan:
    """Plan the batches of texts' prompts, ``most_rows`` texts at once; None: as memory allows."""
    plain = plain_length(runner.model.config)
    within: list[Prompt] = []  # texts that the model reads with plain causal attention
    beyond: list[Prompt] = []
    for index, wanted in enumerate(texts):
        prompt = Prompt(index, wanted, wanted.prompt + wanted.begun)
        (within if wanted.columns <= plain else beyond).append(prompt)
    if runner.modes.refilled:
        pools = tuple(_pools(within, runner, most_rows))
        return DecodingPlan(pools, tuple(_batches([((), beyond)], runner, left=True)))
    groups = [*_groups(within, runner), ((), beyond)]
    return DecodingPlan((), tuple(_batches(groups, runner, left=True)))


def _pools(prompts: Iterable[Prompt], runner: ModelRunner, most_rows: int | None) -> Iterator[Pool]:
    """Divide prompts into pools of similar length: short texts do not use long slots."""
    rest = sorted(prompts, key=lambda prompt: prompt.wanted.columns, reverse=True)
    while rest:
        columns = rest[0].wanted.columns
        rows = max(1, runner.held_tokens // columns)
        rows = min(rows, most_rows or rows)
        alike = sum(_LONGER * one.wanted.columns >= columns for one in rest)
        together, rest = rest[: max(rows, alike)], rest[max(rows, alike) :]
        most = max(1, int(_REFILLED * rows)) if len(together) > rows else rows
        batches = _batches(_groups(together, runner), runner, most, left=False)
        yield Pool(min(rows, len(together)), columns, tuple(batches))


def _groups(
    prompts: Sequence[Prompt], runner: ModelRunner
) -> Iterable[tuple[Tokens, Sequence[Prompt]]]:
    """Group prompts by shared prefix."""
    return group_by_prefix(prompts) if runner.modes.prefix else [((), prompts)]


def _batches(
    groups: Iterable[tuple[Tokens, Sequence[Prompt]]],
    runner: ModelRunner,
    most_rows: int | None = None,
    *,
    left: bool,
) -> Iterator[PromptBatch]:
    """Cut groups into batches of at most ``most_rows`` prompts, padded on one side."""
    for prefix, group in groups:
        new = max((one.wanted.criteria.max_tokens for one in group), default=0)
        for rows in batches_by_length(
            [replace(one, tokens=one.tokens[len(prefix) :]) for one in group],
            runner.tokens_per_batch,
            runner.held_tokens,
            len(prefix) + new,
        ):
            size = most_rows or len(rows)
            for first in range(0, len(rows), size):
                yield _pad(prefix, rows[first : first + size], runner.device, left=left)


def _pad(
    prefix: Tokens, prompts: Sequence[Prompt], device: torch.device, *, left: bool
) -> PromptBatch:
    shape = (len(prompts), max(map(len, prompts)))
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        first = shape[1] - len(prompt) if left else 0
        tokens[row, first : first + len(prompt)] = torch.tensor(prompt.tokens)
        mask[row, first : first + len(prompt)] = 1
    return PromptBatch(prefix, tuple(prompts), tokens.to(device), mask.to(device))
