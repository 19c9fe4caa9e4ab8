"""Write the config of stacked layers: per-layer entries follow their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.errors import MergeError

# Lists of layer numbers, of the layers of one kind.
_NUMBERS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "ple_layer_ids"),
    *("cross_attention_layers", "rope_scaling_layers", "hybrid_layer_ids", "attn_layer_idx"),
)
# Lists with an entry per layer, besides those with "layer" in their key.
_ENTRIES = (
    *("intermediate_size", "num_query_heads", "num_kv_heads", "num_key_value_heads"),
    *("ffn_multipliers", "block_configs", "attention_types", "activation_sparsity_pattern"),
)


def with_layers(
    config: Mapping[str, Any], layers: Sequence[int], count_keys: Sequence[str]
) -> dict[str, Any]:
    """Return a config for a stack of layers.

    Args:
        config: Of a model whose layers are stacked.
        layers: For each layer of the result its number in that model.
        count_keys: Keys with the number of layers.

    Raises:
        MergeError: The config cannot say which of the result's layers are dense.
    """
    count = config[count_keys[0]]
    changed = dict(config)
    if [*layers] != [*range(count)]:
        changed |= _implied_lists(config, count)
    for key, value in tuple(changed.items()):
        if key in count_keys:
            changed[key] = len(layers)
        elif not isinstance(value, list):
            continue
        elif key in _NUMBERS:
            changed[key] = [number for number, layer in enumerate(layers) if layer in value]
        elif ("layer" in key or key in _ENTRIES) and len(value) == count:
            changed[key] = [value[layer] for layer in layers if layer < count]
    return changed | _dense_layers(config, changed, layers)


def _implied_lists(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return per-layer lists that a config leaves to its class's defaults."""
    from transformers import CONFIG_MAPPING

    try:
        known = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception:  # each config class raises its own; an unknown model has no defaults
        return {}
    return {
        key: value
        for key, value in known.items()
        if isinstance(value, list)
        and len(value) == count
        and "layer" in key
        and key not in _NUMBERS
        and config.get(key) is None
    }


def _dense_layers(
    config: Mapping[str, Any], changed: Mapping[str, Any], layers: Sequence[int]
) -> dict[str, Any]:
    """Return the keys by which a mixture of experts says which layers are dense."""
    if (step := config.get("decoder_sparse_step") or 1) > 1:
        listed = config.get("mlp_only_layers") or ()
        dense = [n for n, layer in enumerate(layers) if (layer + 1) % step or layer in listed]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    first = config.get("first_k_dense_replace")
    if not isinstance(first, int):
        return {}
    kinds = [layer < first for layer in layers]
    leading = kinds.index(False) if False in kinds else len(kinds)
    if any(kinds[leading:]) and "mlp_layer_types" not in changed:
        raise MergeError(
            f"the stack has dense layers after layers of experts, and first_k_dense_replace "
            f"({first}) in config.json can only say how many come first; begin the later slices "
            f"at layer {first}"
        )
    return {"first_k_dense_replace": leading}
