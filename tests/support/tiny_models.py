"""Tiny models of random weights, in memory and on disk, and tokenizers of one character a token."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789=: ?."

SHAPE = {
    "vocab_size": 3 + len(CHARACTERS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that answers differ from question to question
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DONOR_SHAPE = {
    "vocab_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 48},  # shorter than many rows
    "Gemma2": {"head_dim": 8, "sliding_window": 48},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 48},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {},
    "GPTNeoX": {},
    "GPT2": _GPT2,
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
}


def make_model(
    name: str = "Llama", dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: object
) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SHAPE | MODELS[name] | changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_llama(
    folder: Path,
    *,
    seed: int,
    base: Path | None = None,
    delta: float = 0.02,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    **config: object,
) -> Path:
    """Write a llama of 3 layers; with ``base``, that one plus normal noise of std ``delta``."""
    if base is None:
        model = make_model(seed=seed, **DONOR_SHAPE | config)
    else:
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=delta)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pickled_twin(model: Path, folder: Path, shards: int = 1, *, legacy: bool = False) -> Path:
    """Copy a model with its weights as ``pytorch_model.bin``, as transformers 4 saved them.

    Tied tensors share memory, every second matrix is a transposed view of a
    Parameter. ``legacy``: in the format before PyTorch 1.6, which is not a zip file.
    """
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    state = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    names = list(state)
    for name in names[1::2]:
        if state[name].dim() == 2 and name != "lm_head.weight":
            state[name] = torch.nn.Parameter(state[name].t().contiguous().t())
    files = [f"pytorch_model-{n:05d}-of-{shards:05d}.bin" for n in range(1, shards + 1)]
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    for number, file in enumerate(files):
        torch.save({name: state[name] for name in names[number::shards]}, folder / file)
    weight_map = {name: files[number % shards] for number, name in enumerate(names)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def make_tokenizer(first: str = "<unk>") -> PreTrainedTokenizerFast:
    """Return the tokenizer of ``make_model``; ``first`` is the token with number 0."""
    tokens = sorted(["<unk>", "<s>", "</s>", *CHARACTERS], key=lambda token: token != first)
    return _character_tokenizer(tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of ``make_llama``, of letters, digits and little else."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return _character_tokenizer([*special.values(), *LETTERS], **special)


def _character_tokenizer(tokens: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
