"""Forward passes of a causal language model that compute logits only where they are used."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from objectives.inference.token_tree import Tokens


@dataclass(frozen=True)
class Modes:
    """Shortcuts that are on; with all of them off, lm-eval's own code evaluates the model."""

    scoring: bool = False  # log-likelihoods in batches of our own; the next four require it
    sparse_logits: bool = False  # logits only at positions that predict a target token
    sparse_mlp: bool = False  # the last layer's MLP only at those positions
    tree: bool = False  # the answers to one question as branches of one token tree
    prefix: bool = False  # keys and values of a shared prefix computed once
    generation: bool = False  # greedy decoding in batches of our own; the next two require it
    refilled: bool = False  # decoding in slots, which waiting prompts take as texts end
    captured: bool = False  # passes over slots captured as CUDA graphs


# cached keys and values of a token take less memory than the activations of a token being read
CACHED_PER_READ = 8


class ModelRunner:
    """Runs forward passes of one live model, whose weights may be rewritten between calls.

    Attributes:
        device: Device of the model's inputs.
        tokens_per_batch: Maximum tokens of a batch, padding included.
        held_bytes: Maximum bytes of cached keys and values; None: ``tokens_per_batch`` decides.
        modes: Shortcuts that are on; none at first.
        spans_devices: Whether the model's layers are on several devices.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, tokens_per_batch: int) -> None:
        self.model = model
        self.device = device
        self.tokens_per_batch = tokens_per_batch
        self.held_bytes: int | None = None
        self.modes = Modes()
        self.spans_devices = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        self._last_mlp = _last_mlp(model)

    @property
    def held_tokens(self) -> int:
        """Maximum number of tokens whose keys and values are cached at once."""
        if self.held_bytes is None:
            return CACHED_PER_READ * self.tokens_per_batch
        return max(1, self.held_bytes // self.bytes_per_token)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, measured on the model."""
        with torch.no_grad():
            cache = self.cache_prefix((0,))
        layers: list[Any] = cache.layers if cache else []
        held = [one for one in layers if getattr(one, "keys", None) is not None]
        total: int = sum(one.keys.nbytes + one.values.nbytes for one in held)
        return max(1, total)

    def cache_prefix(self, prefix: Tokens) -> DynamicCache | None:
        """Return keys and values of a prefix, for one row; None without a prefix."""
        if not prefix:
            return None
        cache = DynamicCache(config=self.model.config)
        self.next_token_logits(torch.tensor([prefix], device=self.device), past_key_values=cache)
        return cache

    def next_token_logits(self, tokens: Tensor, **settings: Any) -> Tensor:
        """Return logits at the last of tokens (b, t), of shape (b, vocabulary)."""
        if self.modes.sparse_logits:
            settings["logits_to_keep"] = 1
        used = torch.zeros_like(tokens, dtype=torch.bool)
        used[:, -1] = True
        return self._logits(tokens, used, use_cache=True, **settings)[:, -1]

    def logits_at(self, used: Tensor, tokens: Tensor, **settings: Any) -> Tensor:
        """Return logits where ``used`` (b, t) is True, of shape (used.sum(), vocabulary)."""
        if self.modes.sparse_logits:
            return self._logits(tokens, used, logits_to_keep=used, **settings)
        logits = self._logits(tokens, used, **settings)
        return logits[used.to(logits.device)]

    def _logits(self, tokens: Tensor, used: Tensor, **settings: Any) -> Tensor:
        """Return the model's logits of tokens (b, t), valid where ``used`` (b, t) is True."""
        if self.spans_devices:
            used = used.cpu()  # where it may index a tensor of any device
            if isinstance(kept := settings.get("logits_to_keep"), Tensor):
                settings["logits_to_keep"] = kept.cpu()
        mlp = self._last_mlp if self.modes.sparse_mlp and tokens.shape[1] > 1 else None
        with _only_at(mlp, used) if mlp is not None else contextlib.nullcontext():
            return cast("Tensor", self.model(tokens, **settings).logits)


def plain_length(config: PreTrainedConfig) -> float:
    """Return the longest sequence with full causal attention and constant position embeddings.

    Beyond a sliding window or an attention chunk a token no longer attends to all before it, and
    some rotary embeddings change for all tokens once a sequence exceeds the original length.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rope = getattr(text, "rope_parameters", None) or {}
    limits += [
        settings.get("original_max_position_embeddings")
        for settings in (rope, *(own for own in rope.values() if isinstance(own, dict)))
        if settings.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((limit for limit in limits if limit), default=math.inf)


def _last_mlp(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the last layer's MLP; None if it does not have one of the usual names."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    last = max(layers, key=len, default=[None])[-1]
    return getattr(last, "mlp", None) or getattr(last, "feed_forward", None)


@contextlib.contextmanager
def _only_at(module: torch.nn.Module, used: Tensor) -> Iterator[None]:
    """Apply a position-wise module only where ``used`` (b, t) is True.

    Elsewhere its output is 0; after the last layer nothing reads it.
    """

    def gather(_: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][used][None],)  # (1, m, d)

    def scatter(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        full = output.new_zeros(*used.shape, output.shape[-1])  # (b, t, d)
        full[used] = output[0]
        return full

    hooks = module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def repeat_cache(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a one-row cache expanded to ``rows`` rows, without copying keys and values."""
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])  # (rows, heads, t, d)
            layer.values = layer.values.expand(rows, *layer.values.shape[1:])
    repeated = copy.copy(cache)
    repeated.layers = layers
    return repeated
