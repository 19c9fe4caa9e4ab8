import pytest

from merge_engine.models.quantised import find_quantised

LAYER = "model.layers.0.mlp.up_proj"
FULL = {f"{LAYER}.weight": "BF16", "model.norm.weight": "F32", "position_ids": "I64"}


@pytest.mark.parametrize(
    ("kind", "stored", "method"),
    [
        ("FP8", {f"{LAYER}.weight": "F8_E4M3", f"{LAYER}.weight_scale_inv": "F32"}, "fp8"),
        ("FP8", {f"{LAYER}.weight": "F8_E4M3"}, None),
        ("FP8", {f"{LAYER}.weight": "float8_e4m3fn"}, None),
        ("MXFP4", {f"{LAYER}_blocks": "U8", f"{LAYER}_scales": "U8"}, "mxfp4"),
        ("bitsandbytes 8-bit", {f"{LAYER}.weight": "I8", f"{LAYER}.SCB": "F32"}, "bitsandbytes"),
        (
            "bitsandbytes 4-bit",
            {f"{LAYER}.weight": "U8", f"{LAYER}.weight.quant_state.bitsandbytes__nf4": "U8"},
            "bitsandbytes",
        ),
        ("GPTQ", {f"{LAYER}.qweight": "I32", f"{LAYER}.g_idx": "I32"}, None),
        ("GPTQ", {f"{LAYER}.qweight": "I32", f"{LAYER}.qzeros": "I32"}, "gptq"),
        ("AWQ", {f"{LAYER}.qweight": "I32", f"{LAYER}.qzeros": "I32"}, "awq"),
        ("compressed-tensors", {f"{LAYER}.weight_packed": "I32"}, None),
        (
            "compressed-tensors",
            {f"{LAYER}.weight": "F8_E4M3", f"{LAYER}.weight_scale": "BF16"},
            "compressed-tensors",
        ),
        ("quanto", {f"{LAYER}.weight": "I8"}, "quanto"),
        ("I8 weights", {f"{LAYER}.weight": "I8"}, None),
    ],
)
def test_kind_is_named(kind, stored, method):
    config = {"quantization_config": {"quant_method": method}} if method else {}
    assert find_quantised(FULL | stored, config).kind == kind


def test_tensors_decide_and_not_the_config():
    assert find_quantised(FULL, {"quantization_config": {"quant_method": "fp8"}}) is None
    assert find_quantised(FULL | {"building_blocks": "F32"}, {}) is None
