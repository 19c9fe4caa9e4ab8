"""Tiny models with vocabularies of their own: tokens in any order, added ones, rows to spare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import make_llama

ENDS = ("<eos>", "<pad>", "<unk>")


def make_with_tokens(
    folder: Path,
    tokens: Sequence[str],
    added: Sequence[str] = (),
    *,
    rows: int,
    seed: int,
    template: Any = None,
) -> Path:
    """Write a random llama whose tokenizer has these tokens, ``added`` as special ones at the end.

    ``ENDS`` are among the tokens; each character of a text is a token.
    """
    numbers = {token: number for number, token in enumerate(tokens)}
    ids = {"pad_token_id": numbers["<pad>"], "eos_token_id": numbers["<eos>"]}
    make_llama(folder, seed=seed, vocab_size=rows, num_hidden_layers=2, **ids)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    backend = Tokenizer(models.BPE(numbers, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = dict(zip(("eos_token", "pad_token", "unk_token"), ENDS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
