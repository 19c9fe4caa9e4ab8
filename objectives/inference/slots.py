"""A key-value cache in fixed storage, whose rows have lengths of their own.

A ``DynamicCache`` has the same columns for all rows, and copies them all for every token. Here a
row is a *slot*: its keys and values are in columns 0 to its length, new ones are written in place,
and when its text ends the slot is given to another prompt. Storage at a fixed address can also be
used by a captured pass (a CUDA graph), which saves launching each kernel anew.

Shapes: b rows in use, R slots, c columns in use, C columns a slot.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from objectives.inference.forward import ModelRunner

_COLUMNS = 256  # a captured pass reads a multiple of this many columns

Work = Callable[[], Tensor]
Capture = Callable[[Work], Work]  # records work on fixed storage; returns its replay


class SlotCache(Cache):
    """Keys and values of up to R rows with lengths of their own.

    Attributes:
        rows: Number of slots, R.
        columns: Maximum tokens per slot, C.
    """

    def __init__(self, rows: int, columns: int) -> None:
        # Weakly, so that storage is freed with its cache, not when cycles are next collected.
        self._itself: SlotCache = weakref.proxy(self)
        layer = functools.partial(_SlotLayer, self._itself)
        super().__init__(layer_class_to_replicate=layer)  # type: ignore[arg-type]
        self.rows, self.columns = rows, columns
        self.written: dict[
            torch.device, Tensor
        ] = {}  # column of each row's new token, (b), per device
        self.read = 0  # columns that attention reads, c

    def take(self, source: Cache, rows: Sequence[int], first: int) -> None:
        """Copy rows of a prefill's cache into the slots from ``first`` on."""
        selected = torch.tensor(rows)  # on the CPU, where it may index a tensor of any device
        for number, layer in enumerate(source.layers):
            while len(self.layers) <= number:
                self.layers.append(_SlotLayer(self._itself))
            if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
                own, keys, values = self.layers[number], layer.keys, layer.values
                assert isinstance(own, _SlotLayer)
                assert keys is not None
                assert values is not None
                own.take(keys[selected], values[selected], first)

    def move(self, slots: Mapping[int, int]) -> None:
        """Copy slots to others, given as {to: from}."""
        to, source = torch.tensor([*slots]), torch.tensor([*slots.values()])
        for layer in self._kept():
            layer.keys[to], layer.values[to] = layer.keys[source], layer.values[source]

    def clear(self) -> None:
        """Zero the storage: a NaN of an earlier candidate would pass through the attention mask."""
        for layer in self._kept():
            layer.keys.zero_()
            layer.values.zero_()

    def begin(self, written: Tensor, read: int) -> None:
        """Set the columns of the next pass's tokens, (b), and how many columns it reads."""
        self.written, self.read = {written.device: written}, read

    def written_on(self, device: torch.device) -> Tensor:
        """Return the columns of this pass's tokens, (b), on the device of a layer's keys."""
        if device not in self.written:
            self.written[device] = next(iter(self.written.values())).to(device)
        return self.written[device]

    def zeros(self, states: Tensor) -> Tensor:
        """Return storage for states (b, heads, t, d), of shape (R, heads, C, d)."""
        return states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3])

    def _kept(self) -> list[_SlotLayer]:
        return [one for one in self.layers if isinstance(one, _SlotLayer) and one.is_initialized]


class _SlotLayer(CacheLayerMixin):
    """One layer of a ``SlotCache``; a pass appends one token to each row."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._slots.zeros(key_states), self._slots.zeros(value_states)
        self.is_initialized = True

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **settings: object
    ) -> tuple[Tensor, Tensor]:
        columns = self._slots.written_on(self.keys.device)
        count = len(columns)
        rows = torch.arange(count, device=columns.device)
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        read = self._slots.read
        return self.keys[:count, :, :read], self.values[:count, :, :read]

    def take(self, keys: Tensor, values: Tensor, first: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        rows = slice(first, first + len(keys))
        for own, states in ((self.keys, keys), (self.values, values)):
            own[rows, :, : states.shape[2]] = states
            own[rows, :, states.shape[2] :] = 0

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.read, 0

    @override
    def get_seq_length(self) -> int:
        return self._slots.read - 1  # those before the token of this pass

    @override
    def get_max_length(self) -> int:
        return self._slots.columns


class DecodingStep:
    """Runs one forward pass for the next token of every row in use.

    With ``capture``, passes are recorded for a few numbers of rows and columns and replayed; the
    results of unused rows are dropped. Without it, a pass has only the rows and columns in use.
    """

    def __init__(self, runner: ModelRunner, cache: SlotCache, capture: Capture | None) -> None:
        self.cache = cache
        self._runner = runner
        self._capture = capture
        self._recorded: dict[tuple[int, int], Work] = {}  # by rows and columns
        if capture is not None:
            # tokens, and their columns
            self._given = torch.zeros(2, cache.rows, dtype=torch.long, device=runner.device)

    def __call__(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Return logits (b, vocabulary) after each row's latest token, at its column."""
        count, read = len(tokens), max(columns) + 1
        if self._capture is None:
            return self._logits(torch.tensor([tokens, columns], device=self._runner.device), read)
        rows = min(self.cache.rows, 1 << (count - 1).bit_length())
        read = min(self.cache.columns, -(-read // _COLUMNS) * _COLUMNS)
        none = [0] * (rows - count)
        given = self._given[:, :rows]
        given.copy_(torch.tensor([[*tokens, *none], [*columns, *none]]))
        if (rows, read) not in self._recorded:
            self._recorded[rows, read] = self._capture(lambda: self._logits(given, read))
        return self._recorded[rows, read]()[:count]

    def _logits(self, given: Tensor, read: int) -> Tensor:
        """Run a pass for tokens and their columns, stacked to (2, b)."""
        tokens, columns = given[:, :, None]  # (b, 1) each
        dtype = self._runner.model.dtype
        mask = torch.zeros(len(columns), read, dtype=dtype, device=given.device)
        mask.masked_fill_(torch.arange(read, device=given.device) > columns, torch.finfo(dtype).min)
        self.cache.begin(given[1], read)
        return self._runner.next_token_logits(
            tokens,
            attention_mask=mask[:, None, None],  # (b, 1, 1, c)
            position_ids=columns,
            past_key_values=self.cache,
        )


def cuda_graphs() -> Capture:
    """Return a function that captures work as CUDA graphs with one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Work) -> Work:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose kernels and workspaces before
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            found = work()

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay

    return capture


def run_again(work: Work) -> Work:
    """Return the work itself: replaying then runs it, so that a CPU can test the same code."""
    return work
