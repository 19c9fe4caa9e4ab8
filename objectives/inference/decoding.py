"""Greedy decoding in batches that finished texts leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from objectives.inference.forward import ModelRunner, plain_length, repeat_cache
from objectives.inference.token_tree import Tokens, batches_by_length, group_by_prefix

# finished texts leave a batch once at most this share of its rows is unfinished: removing them
# copies the keys and values of all others
_UNFINISHED = 0.5


@dataclass(frozen=True)
class StopCriteria:
    """When a generated text ends, besides at the model's end-of-text tokens."""

    max_tokens: int  # most tokens, at least one
    strings: tuple[str, ...] = ()  # stop strings, searched for in the `lookback` latest tokens
    lookback: int = 1

    @classmethod
    def from_strings(
        cls, strings: Sequence[str], max_tokens: int, tokenizer: PreTrainedTokenizerBase
    ) -> StopCriteria:
        """Return criteria with a lookback long enough for each stop string."""
        lengths = (len(tokenizer.encode(string, add_special_tokens=False)) for string in strings)
        # a stop string may be written in more tokens than its own encoding; lm-eval adds two too
        return cls(max_tokens, tuple(strings), max(lengths, default=0) + 2)


@dataclass(frozen=True)
class _Prompt:
    index: int
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trunk(self) -> Tokens:
        return self.tokens[:-1]  # logits at the last token are needed


@dataclass(frozen=True)
class PromptBatch:
    """Prompts behind one prefix, padded on the left."""

    prefix: Tokens
    tokens: Tensor  # (b, t)
    mask: Tensor  # (b, t), 1 at tokens and 0 at padding
    indices: Tokens  # (b), index of each prompt in the caller's list


class GreedyDecoder:
    """Plans batches of prompts and continues them greedily, up to an end token or stop string."""

    def __init__(self, runner: ModelRunner, tokenizer: PreTrainedTokenizerBase) -> None:
        self._runner = runner
        self._tokenizer = tokenizer

    def plan(self, prompts: Iterable[Tokens], max_tokens: int) -> tuple[PromptBatch, ...]:
        """Lay out prompts, to be continued by up to ``max_tokens``, in batches."""
        runner = self._runner
        plain = plain_length(runner.model.config) if runner.modes.prefix else 0
        within: list[_Prompt] = []  # texts short enough to share a prefix
        beyond: list[_Prompt] = []
        for index, tokens in enumerate(prompts):
            fits = len(tokens) + max_tokens <= plain
            (within if fits else beyond).append(_Prompt(index, tokens))
        return tuple(
            _pad(prefix, rows, runner.device)
            for prefix, group in [*group_by_prefix(within), ((), beyond)]
            for rows in batches_by_length(
                [replace(prompt, tokens=prompt.tokens[len(prefix) :]) for prompt in group],
                runner.tokens_per_batch,
                len(prefix) + max_tokens,
            )
        )

    @torch.no_grad()
    def decode(self, plan: Iterable[PromptBatch], criteria: StopCriteria) -> list[list[int]]:
        """Return the tokens generated after each prompt, including the one that ended the text."""
        generated: dict[int, list[int]] = {}
        prefix: Tokens = ()
        cache: DynamicCache | None = None
        for batch in plan:
            if batch.prefix != prefix:
                prefix, cache = batch.prefix, self._runner.cache_prefix(batch.prefix)
            generated |= self._decode_batch(batch, cache, criteria)
        return [generated[index] for index in sorted(generated)]

    def _decode_batch(
        self, batch: PromptBatch, prefix: DynamicCache | None, criteria: StopCriteria
    ) -> dict[int, list[int]]:
        """Return the tokens generated after each prompt of a batch, by prompt index."""
        rows = list(batch.indices)  # prompt index of each row still in the batch
        unfinished = set(rows)
        generated: dict[int, list[int]] = {index: [] for index in rows}
        if prefix is None:
            cache = DynamicCache(config=self._runner.model.config)
        else:
            cache = repeat_cache(prefix, len(rows))
        before = batch.mask.new_ones(len(rows), len(batch.prefix))
        mask = torch.cat([before, batch.mask], dim=1)  # (b, prefix + t)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, len(batch.prefix) :]  # (b, t)
        tokens = batch.tokens
        while True:
            logits = self._runner.next_token_logits(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            chosen = logits.float().argmax(-1)  # (b)
            for index, token in zip(rows, chosen.tolist(), strict=True):
                if index in unfinished:
                    generated[index].append(token)
            unfinished = self._unfinished({i: generated[i] for i in unfinished}, criteria)
            if not unfinished:
                return generated
            if len(unfinished) <= _UNFINISHED * len(rows):
                kept = [row for row, index in enumerate(rows) if index in unfinished]
                rows = [rows[row] for row in kept]
                selected = torch.tensor(kept, device=self._runner.device)
                cache.batch_select_indices(selected)
                chosen, mask, positions = chosen[selected], mask[selected], positions[selected]
            tokens = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def length_until_end(self, tokens: Sequence[int], criteria: StopCriteria) -> int:
        """Return how many of the tokens a text has, up to the one that ends it."""
        for length in range(1, len(tokens)):
            if not self._unfinished({0: tokens[:length]}, criteria):
                return length
        return len(tokens)

    def _unfinished(
        self, generated: Mapping[int, Sequence[int]], criteria: StopCriteria
    ) -> set[int]:
        """Return the indices of texts that have not ended with their latest token."""
        ends = self._runner.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        latest = self._tokenizer.batch_decode(
            [list(tokens[-criteria.lookback :]) for tokens in generated.values()]
        )
        return {
            index
            for (index, tokens), text in zip(generated.items(), latest, strict=True)
            if len(tokens) < criteria.max_tokens
            and tokens[-1] not in ends
            and not any(string in text for string in criteria.strings)
        }


def _pad(prefix: Tokens, prompts: Sequence[_Prompt], device: torch.device) -> PromptBatch:
    shape = (len(prompts), max(map(len, prompts)))
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, shape[1] - len(prompt) :] = torch.tensor(prompt.tokens)
        mask[row, shape[1] - len(prompt) :] = 1
    indices = tuple(prompt.index for prompt in prompts)
    return PromptBatch(prefix, tokens.to(device), mask.to(device), indices)
