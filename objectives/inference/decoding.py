"""Greedy decoding of many prompts in one loop, each with its own stop strings and token limit.

Prompts are prefilled in batches and then decoded side by side in *slots* (``slots``). A slot whose
text has ended is given to the next waiting prompt (continuous batching). Models that cannot use
slots, because of a sliding window or a recurrent state, decode each batch on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from objectives.inference.decoding_plan import (
    Continuation,
    DecodingPlan,
    Pool,
    Prompt,
    PromptBatch,
    StopCriteria,
    plan_decoding,
)
from objectives.inference.forward import ModelRunner, repeat_cache
from objectives.inference.nan_watch import NanWatch
from objectives.inference.slots import Capture, DecodingStep, SlotCache, cuda_graphs, run_again
from objectives.inference.token_tree import Tokens

# finished texts are removed from a batch once at most this share of it is unfinished: removing
# them copies the keys and values of all others
_UNFINISHED = 0.5

Keep = Callable[[Sequence[int], Sequence[int]], None]  # of texts' indices, and their next tokens


@dataclass(eq=False)
class _Text:
    """A text being generated; its row is its index in a list of texts."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)

    @property
    def column(self) -> int:
        """Column of its latest token."""
        return len(self.prompt.wanted.prompt) + len(self.tokens) - 1


@dataclass(frozen=True)
class _Noted:
    """Records every pass: whether its logits are NaN, and each prompt's next token."""

    nan: NanWatch
    keep: Keep | None


class GreedyDecoder:
    """Plans batches of prompts and continues them greedily until their stop criteria are met.

    Attributes:
        most_rows: Maximum number of texts decoded at once; None: limited by memory alone.
        kept: Slots and captured passes, reused for every candidate; None: none so far.
    """

    def __init__(self, runner: ModelRunner, tokenizer: PreTrainedTokenizerBase) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self.most_rows: int | None = None
        self.kept: DecodingStep | None = None

    def plan(self, texts: Iterable[Continuation]) -> DecodingPlan:
        """Plan the batches of texts' prompts (``plan_decoding``)."""
        return plan_decoding(texts, self._runner, self.most_rows)

    @torch.no_grad()
    def decode(self, plan: DecodingPlan, keep: Keep | None = None) -> list[list[int]]:
        """Return the tokens generated after each prompt, including the one that ended the text.

        ``keep`` receives the tokens of each pass, as long as no logits are NaN.

        Raises:
            NanError: The model's logits are not numbers.
        """
        texts: dict[int, list[int]] = {}
        noted = _Noted(NanWatch(), keep)
        for pool in plan.pools:
            texts |= self._generate_in_slots(pool, noted)
        prefixes = _Prefixes(self._runner)
        for batch in plan.batches:
            cache = prefixes.cache(batch.prefix, len(batch.prompts))
            texts |= self._generate_batch(batch, cache, noted)
        noted.nan.raise_if_seen()
        return [texts[index] for index in sorted(texts)]

    def release(self) -> None:
        """Free the slots and captured passes that were kept."""
        self.kept = None

    def _generate_in_slots(self, pool: Pool, noted: _Noted) -> dict[int, list[int]]:
        """Return the tokens generated after each prompt of a pool, by prompt index."""
        found: dict[int, list[int]] = {}
        waiting = list(reversed(pool.batches))
        prefixes = _Prefixes(self._runner)
        step = self._step(pool)
        texts: list[_Text] = []  # in the order of their slots
        while waiting or texts:
            while waiting and len(texts) + len(waiting[-1].prompts) <= pool.rows:
                batch = waiting.pop()
                cache = prefixes.cache(batch.prefix, len(batch.prompts))
                begun = self._read(batch, cache, noted)
                found |= {text.prompt.index: text.tokens for text in begun}
                rows = self._unfinished(begun)
                if rows:
                    step.cache.take(cache, rows, len(texts))
                texts += [begun[row] for row in rows]
                del cache  # the slots have what is needed of it
            if texts:
                latest = [text.tokens[-1] for text in texts]
                logits = step(latest, [text.column for text in texts])
                _append(texts, logits, noted)
                texts = self._compact(texts, step.cache)
        return found

    def _read(self, batch: PromptBatch, cache: DynamicCache, noted: _Noted) -> list[_Text]:
        """Prefill prompts; return their texts, each with its first new token."""
        lengths = torch.tensor([len(prompt) for prompt in batch.prompts])
        last = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        last[torch.arange(len(lengths)), lengths - 1] = True
        # padding on the right is read by no token before it: plain causal attention needs no mask
        logits = self._runner.logits_at(
            last.to(self._runner.device), batch.tokens, past_key_values=cache, use_cache=True
        )
        texts = _texts_of(batch)
        _append(texts, logits, noted)
        return texts

    def _compact(self, texts: list[_Text], cache: SlotCache) -> list[_Text]:
        """Drop finished texts, and move the last unfinished ones into their slots."""
        rows = self._unfinished(texts)
        if len(rows) == len(texts):
            return texts
        kept, outside = set(rows), [row for row in rows if row >= len(rows)]
        free = [row for row in range(len(rows)) if row not in kept]
        moved = dict(zip(free, outside, strict=True))
        if moved:
            cache.move(moved)
        return [texts[moved.get(row, row)] for row in range(len(rows))]

    def _step(self, pool: Pool) -> DecodingStep:
        """Return the decoding step of a pool; one with captured passes is kept for later pools."""
        if not self._runner.modes.captured:
            return DecodingStep(self._runner, SlotCache(pool.rows, pool.columns), None)
        kept = self.kept and self.kept.cache
        if not kept or kept.rows < pool.rows or kept.columns < pool.columns:
            self.kept = None  # its memory is needed for the next
            cache = SlotCache(pool.rows, pool.columns)
            self.kept = DecodingStep(self._runner, cache, capture_for(self._runner.device))
        assert self.kept is not None
        self.kept.cache.clear()
        return self.kept

    def _generate_batch(
        self, batch: PromptBatch, cache: DynamicCache, noted: _Noted
    ) -> dict[int, list[int]]:
        """Return the tokens generated after each prompt of a batch, by prompt index."""
        texts = _texts_of(batch)
        found = {text.prompt.index: text.tokens for text in texts}
        before = batch.mask.new_ones(len(texts), len(batch.prefix))
        mask = torch.cat([before, batch.mask], dim=1)  # (b, prefix + t)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, len(batch.prefix) :]  # (b, t)
        tokens, unfinished = batch.tokens, [*range(len(texts))]
        while True:
            logits = self._runner.next_token_logits(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            chosen = _append([texts[row] for row in unfinished], logits, noted, unfinished)
            rows = self._unfinished([texts[row] for row in unfinished])
            unfinished = [unfinished[row] for row in rows]
            if not unfinished:
                return found
            if len(unfinished) <= _UNFINISHED * len(texts):
                selected = torch.tensor(unfinished)  # on the CPU: layers may be on several devices
                cache.batch_select_indices(selected)
                chosen, mask, positions = chosen[selected], mask[selected], positions[selected]
                texts = [texts[row] for row in unfinished]
                unfinished = [*range(len(texts))]
            tokens = chosen[:, None].to(self._runner.device)
            mask = torch.cat([mask, mask.new_ones(len(texts), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def length_until_end(self, tokens: Sequence[int], criteria: StopCriteria) -> int:
        """Return the length of a text: its tokens up to the one that ends it."""
        lengths = range(1, len(tokens))
        ends = (length for length in lengths if self.has_ended(tokens[:length], criteria))
        return next(ends, len(tokens))

    def has_ended(self, tokens: Sequence[int], criteria: StopCriteria) -> bool:
        """Return whether a text's latest token ends it."""
        return not self._unfinished([_Text(Prompt(0, Continuation((), criteria), ()), [*tokens])])

    def _unfinished(self, texts: Sequence[_Text]) -> list[int]:
        """Return the indices of the texts that their latest token does not end."""
        ends = self._runner.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        open_now = [
            row
            for row, text in enumerate(texts)
            if len(text.tokens) < text.prompt.wanted.criteria.max_tokens
            and text.tokens[-1] not in ends
        ]
        stopping = [row for row in open_now if texts[row].prompt.wanted.criteria.strings]
        if not stopping:
            return open_now
        latest = self._tokenizer.batch_decode(
            [texts[row].tokens[-texts[row].prompt.wanted.criteria.lookback :] for row in stopping]
        )
        stopped = {
            row
            for row, text in zip(stopping, latest, strict=True)
            if any(string in text for string in texts[row].prompt.wanted.criteria.strings)
        }
        return [row for row in open_now if row not in stopped]


class _Prefixes:
    """Keys and values of the latest prefix, computed once for all batches that share it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._prefix: Tokens = ()
        self._cache: DynamicCache | None = None

    def cache(self, prefix: Tokens, rows: int) -> DynamicCache:
        """Return a key-value cache with the prefix in each of ``rows`` rows."""
        if prefix != self._prefix:
            self._prefix, self._cache = prefix, self._runner.cache_prefix(prefix)
        if self._cache is None:
            return DynamicCache(config=self._runner.model.config)
        return repeat_cache(self._cache, rows)


def captures(runner: ModelRunner) -> bool:
    """Return whether to try captured passes, which save the time of launching kernels.

    They cannot contain the copies of a model on several devices or partly on the host.
    """
    return runner.device.type == "cuda" and not runner.spans_devices


def capture_for(device: torch.device) -> Capture:
    """Return the function that captures passes on a device."""
    return cuda_graphs() if device.type == "cuda" else run_again


def _texts_of(batch: PromptBatch) -> list[_Text]:
    return [_Text(one, [*one.wanted.begun]) for one in batch.prompts]


def _append(
    texts: Sequence[_Text], logits: Tensor, noted: _Noted, rows: Sequence[int] | None = None
) -> Tensor:
    """Append the greedy tokens (b) of logits (b, vocabulary) to the texts of all or some rows."""
    noted.nan.see(logits)
    chosen = logits.argmax(-1)
    tokens = chosen.tolist()
    tokens = tokens if rows is None else [tokens[row] for row in rows]
    for text, token in zip(texts, tokens, strict=True):
        text.tokens.append(token)
    if noted.keep and not noted.nan.seen:
        noted.keep([text.prompt.index for text in texts], tokens)
    return chosen
