"""Tiny models of random weights of many architectures, as transformers makes and saves them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from tiny_models import SHAPE, make_tokenizer

# Sizes of a text model, by the names that configs have for them; a config takes those it knows.
_TEXT = SHAPE | {
    "head_dim": 8,
    "sliding_window": 48,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_intermediate_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "intermediate_size_mlp",
        ),
        32,
    ),
    # latent attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    # linear attention and state-space layers
    **dict.fromkeys(("linear_num_key_heads", "n_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    # several embeddings
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "vocab_size_per_layer_input": SHAPE["vocab_size"],
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
}
_VISION = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "vision_output_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "spatial_merge_size"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size"), 16),
    "intermediate_size": 64,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DENSE = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_5_text", "gemma2", "gemma3_text"),
    *("phi3", "olmo2", "olmo3", "granite", "smollm3", "exaone4", "cohere2", "glm4", "gpt_oss"),
    *("llama4_text", "lfm2", "ernie4_5", "seed_oss", "apertus", "hunyuan_v1_dense"),
    *("gpt_neox", "gpt2", "falcon_h1", "jamba", "mamba"),
)
EXPERTS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_next", "deepseek_v3", "glm4_moe"),
    *("ernie4_5_moe", "gpt_oss", "granitemoehybrid", "nemotron_h", "minimax"),
)
MULTIMODAL = (
    *("gemma3", "qwen3_5", "llama4", "mistral3", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm"),
    "gemma4",
)
ENCODER_DECODER = ("t5", "bart")
ENCODERS = ("bert",)
# What a type needs besides the common sizes: of its config, and of its parts' by name.
_OWN: Mapping[str, dict[str, object]] = {
    "qwen3_next": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "minimax": _LINEAR,
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_moe_text": _LINEAR,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    | {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
    "bart": dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    | {"d_model": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "deepseek_v3": {"num_key_value_heads": 4},
    "qwen2_5_vl_text": {
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    },
}


def make_config(model_type: str, **changes: object) -> PreTrainedConfig:
    """Return a tiny config of a model type."""
    found = type(AutoConfig.for_model(model_type))
    own = _known(found, _TEXT) | _OWN.get(model_type, {}) | changes
    parts = {}
    for name in found.sub_configs:
        part = getattr(found(), name)
        if part is None or "audio" in name:
            parts[name] = None
            continue
        sizes = _TEXT if name == "text_config" else _VISION
        parts[name] = _known(type(part), sizes) | {"model_type": part.model_type}
        parts[name] |= _OWN.get(part.model_type, {})
    return found(**{name: size for name, size in own.items() if name not in parts}, **parts)


def _known(config: type[PreTrainedConfig], sizes: Mapping[str, object]) -> dict[str, object]:
    known = {field.name for field in fields(config)} | set(config.attribute_map)
    return {name: size for name, size in sizes.items() if name in known}


def make_architecture(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """Return a tiny model of a type, of random weights."""
    torch.manual_seed(seed)
    config = make_config(model_type, **changes)
    auto = AutoModelForCausalLM
    if "vision_config" in config.sub_configs:
        auto = AutoModelForImageTextToText
    elif model_type in ENCODER_DECODER:
        auto = AutoModelForSeq2SeqLM
    elif model_type in ENCODERS:
        auto = AutoModelForSequenceClassification
    return auto.from_config(config, dtype=dtype).eval()


def save_family(
    folder: Path, model_type: str, donors: Sequence[str] = ("a", "b"), **changes: object
) -> Path:
    """Write a base and fine-tunes of it, each as transformers saves it; returns the folder."""
    base = make_architecture(model_type, **changes)
    for seed, name in enumerate(("base", *donors)):
        model = make_architecture(model_type, **changes)
        torch.manual_seed(seed)
        with torch.no_grad():
            for own, start in zip(model.parameters(), base.parameters(), strict=True):
                own.copy_(start + 0.05 * seed * torch.randn_like(start))
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder
