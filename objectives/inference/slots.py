"""Texts written side by side in fixed storage, each row as long as its own text.

A ``DynamicCache`` has the same columns for all rows, and copies them all for every token. Here a
row is a *slot*: its keys and values lie at columns 0 to its length, new ones are written in place,
and a slot whose text has ended takes another prompt at once. Storage that stays where it is can
also be read by a captured step (a CUDA graph), which saves launching each kernel anew.

Shapes: b rows being written, R slots, c columns in use, C columns of storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from objectives.inference.forward import ModelRunner

_GROWTH = 1.5  # of columns that have become too few
_COLUMNS = 256  # a captured step reads columns in multiples of this

Work = Callable[[], Tensor]
Capture = Callable[[Work], Work]  # work over fixed storage to the same work, replayed


class SlotCache(Cache):
    """Keys and values of up to R rows with lengths of their own.

    Attributes:
        rows: Slots, R.
        columns: Most tokens of a row.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: _SlotLayer(self))  # type: ignore[arg-type]
        self.rows, self.columns = rows, columns
        self.written: dict[torch.device, Tensor] = {}  # column of each row's token, (b) per device
        self.read = 0  # columns that attention reads, c
        self._stored = 0  # columns of storage, C

    def reserve(self, columns: int) -> None:
        """Make room for so many columns in every slot."""
        if columns > self._stored:
            self._stored = min(self.columns, max(columns, int(_GROWTH * self._stored)))
            for layer in self._kept():
                layer.widen(self._stored)

    def take(self, source: Cache, rows: Sequence[int], first: int) -> None:
        """Copy rows of a cache that was read at once into the slots from ``first`` on."""
        selected = torch.tensor(rows)  # on the CPU, where it may index a tensor of any device
        for number, layer in enumerate(source.layers):
            while len(self.layers) <= number:
                self.layers.append(_SlotLayer(self))
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
        """Forget everything: a NaN of another candidate would be read where it is masked."""
        for layer in self._kept():
            layer.keys.zero_()
            layer.values.zero_()

    def begin(self, written: Tensor, read: int) -> None:
        """Say where the tokens of the next pass go, (b), and how many columns it reads."""
        self.written, self.read = {written.device: written}, read

    def written_on(self, device: torch.device) -> Tensor:
        """Return where the tokens of this pass go, on the device of a layer's keys."""
        if device not in self.written:
            self.written[device] = next(iter(self.written.values())).to(device)
        return self.written[device]

    def zeros(self, states: Tensor) -> Tensor:
        """Return storage for states (b, heads, t, d), of shape (R, heads, C, d)."""
        return states.new_zeros(self.rows, states.shape[1], self._stored, states.shape[3])

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

    def widen(self, columns: int) -> None:
        more = columns - self.keys.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))

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
    """One pass that gives each row being written its next token's logits.

    With ``capture`` passes are recorded for a few numbers of rows and columns, and replayed with
    rows that nobody reads; without, every pass has the rows and columns there are.
    """

    def __init__(self, runner: ModelRunner, cache: SlotCache, capture: Capture | None) -> None:
        self.cache = cache
        self._runner = runner
        self._capture = capture
        self._recorded: dict[tuple[int, int], Work] = {}  # by rows and columns
        if capture is not None:
            cache.reserve(cache.columns)  # storage that a recorded pass reads must stay
            # tokens, and the columns they go to
            self._given = torch.zeros(2, cache.rows, dtype=torch.long, device=runner.device)

    def __call__(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Return logits (b, vocabulary) after each row's latest token, at its column."""
        count, read = len(tokens), max(columns) + 1
        if self._capture is None:
            self.cache.reserve(read)
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
        """Run a pass over tokens and the columns they go to, (2, b)."""
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
    """Return a way to capture work as CUDA graphs, which share their memory."""
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
    """Capture nothing: what is replayed is run, so that a CPU can take the same way."""
    return work
