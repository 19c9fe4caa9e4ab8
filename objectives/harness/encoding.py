"""Try an untrusted tokenizer and its chat template in isolation before they are used."""

from __future__ import annotations

import string
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from objectives.base import ObjectiveError
from objectives.harness.isolation import attempt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_SECONDS: Final = 10.0  # for one conversation
# Characters of a template, and of what it makes; the longest published have some ten thousand.
_TEMPLATE_LENGTH: Final = 1_000_000
_MEMORY: Final = 1 << 30  # bytes
# With long words, on which regular expressions may never end.
_TRIED: Final = f"{string.printable} {'a' * 99} {'1' * 99}\n"


@dataclass(frozen=True)
class Prompting:
    """Prompt settings of every task of a study."""

    apply_chat_template: bool = False  # format prompts with the tokenizer's chat template
    # The system prompt or, without a template, the text that every prompt begins with.
    system_instruction: str | None = None


def check_encoding(tokenizer: PreTrainedTokenizerBase, prompting: Prompting) -> None:
    """Encode a text, and apply the chat template if it is used, in a separate process.

    Raises:
        ObjectiveError: That fails, takes too long or too much memory.
    """
    where, tokenizer = tokenizer.name_or_path, deepcopy(tokenizer)  # as lm-eval is given it
    if fault := attempt(lambda: tokenizer.encode(_TRIED), TEMPLATE_SECONDS, _MEMORY):
        raise ObjectiveError(
            f"{where}: its tokenizer {fault} when it encodes {_TRIED[:10]!r} and other letters; "
            "fetch its files again"
        )
    if not prompting.apply_chat_template:
        return
    template: object = tokenizer.chat_template
    texts = template.values() if isinstance(template, Mapping) else [template]
    if any(len(str(text)) > _TEMPLATE_LENGTH for text in texts):
        raise ObjectiveError(
            f"{where}: its chat template has more than {_TEMPLATE_LENGTH:,} characters; fetch it "
            "again, or unset apply_chat_template"
        )
    chat = [{"role": "user", "content": _TRIED}]

    def apply() -> None:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if len(str(text)) > _TEMPLATE_LENGTH:
            raise ValueError(f"it makes {len(str(text)):,} characters")
        if not str(text).strip():
            raise ValueError("it makes no text")

    if fault := attempt(apply, TEMPLATE_SECONDS, _MEMORY):
        raise ObjectiveError(
            f"{where}: its chat template {fault} for a user's message; correct it, or unset "
            "apply_chat_template"
        )
