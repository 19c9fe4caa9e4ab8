"""Detect quantised weights, which cannot be merged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from merge_engine.models.alignment import text_config

_ANY = "load it with AutoModelForCausalLM, dequantise and save it"
_BNB = "call its dequantize() in transformers and save it"
# Kinds, the name of a tensor that only they store, and how to get full precision.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (
        "bitsandbytes 4-bit",
        r"\.quant_state\.bitsandbytes__\w+$|\.weight\.(absmax|quant_map)$",
        _BNB,
    ),
    ("bitsandbytes 8-bit", r"\.(SCB|weight_format)$", _BNB),
    ("MXFP4", r"_blocks$", "load it with quantization_config=Mxfp4Config(dequantize=True)"),
    ("compressed-tensors", r"\.weight_(packed|shape)$", _ANY),
    ("GPTQ", r"\.g_idx$", _ANY),
    ("AWQ", r"\.qzeros$", _ANY),
    ("packed integers", r"\.qweight$", _ANY),
    (
        "FP8",
        r"\.weight_scale_inv$",
        "load it with quantization_config=FineGrainedFP8Config(dequantize=True)",
    ),
)
_METHODS = {  # of config.json's quantization_config, in their usual spelling
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
}
# Integer tensors of full-precision models.
_INDEX = re.compile(r"(position_ids|num_batches_tracked|attn\.bias|attention\.bias)$")
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of full precision, as in safetensors headers


class Quantised(NamedTuple):
    """How a model is quantised."""

    kind: str  # the method's name
    tensor: str  # one that shows it
    advice: str  # how to get full precision


def find_quantised(dtypes: Mapping[str, str], config: Mapping[str, Any]) -> Quantised | None:
    """Return how a model is quantised; None if its weights are in full precision.

    The tensors decide: the config may still have the ``quantization_config`` of an earlier model.

    Args:
        dtypes: Name of each tensor's dtype, as in safetensors headers.
        config: The model's ``config.json``; it names the method if there is one.
    """
    settings = quantisation_of(config) or quantisation_of(text_config(config))
    method = _METHODS.get(str(settings.get("quant_method")))
    for kind, pattern, advice in _KINDS:
        shows = re.compile(pattern)
        for name in dtypes:
            if shows.search(name) and (kind != "MXFP4" or f"{name[:-7]}_scales" in dtypes):
                same = method in (None, kind)
                return Quantised(kind if same else str(method), name, advice if same else _ANY)
    for name, dtype in dtypes.items():
        if dtype.startswith(("F8", "float8")):
            return Quantised(method or "FP8", name, _ANY)
        # If there is a quantization_config, any integers are quantised weights.
        suspect = settings and dtype != "BOOL" and not _INDEX.search(name)
        if dtype not in FLOATS and (suspect or name.endswith(".weight")):
            other = settings.get("quant_method") or f"{dtype} weights"
            return Quantised(method or str(other), name, _ANY)
    return None


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config's ``quantization_config``; empty if there is none."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}
