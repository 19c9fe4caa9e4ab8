"""A tiny llama on disk, and the tokenizer of one character a token that goes with it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789=: ?."]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


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
    """A llama of 3 layers; with ``base``, that one plus normal noise of std ``delta``."""
    torch.manual_seed(seed)
    if base is None:
        shape = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
        depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        options = shape | depth | ends | {"max_position_embeddings": 64} | config
        model = LlamaForCausalLM(LlamaConfig(**options))
    else:
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=delta)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder
