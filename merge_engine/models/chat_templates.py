"""Chat templates: those a recipe may name, and a model's own, read from its tokenizer folder.

Named templates are generated from the texts that a format puts around each message.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from merge_engine.errors import MergeError, reading
from merge_engine.models.model_folder import read_json

_END_OF_TURN = "[|endofturn|]"


class _Format(NamedTuple):
    """The texts around the content of a message, by role; a role that is missing has none."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    opening: str  # of the answer that the model is to write
    start: str = ""  # an expression: what the whole begins with
    eos: bool = False  # whether the tokenizer's end of text follows an answer


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_ROLES = ("system", "user", "assistant")
_FORMATS = {
    "alpaca": _Format(
        {"user": "### Instruction:\n", "assistant": "### Response:\n"},
        dict.fromkeys(_ROLES, "\n\n"),
        "### Response:\n",
        eos=True,
    ),
    "chatml": _Format(
        {role: f"<|im_start|>{role}\n" for role in _ROLES},
        dict.fromkeys(_ROLES, "<|im_end|>\n"),
        "<|im_start|>assistant\n",
    ),
    "exaone": _Format(
        {role: f"[|{role}|]" for role in _ROLES},
        {"system": f"{_END_OF_TURN}\n", "user": "\n", "assistant": f"{_END_OF_TURN}\n"},
        "[|assistant|]",
        f"'' if messages[0].role == 'system' else '[|system|]{_END_OF_TURN}\\n'",
    ),
    "llama3": _Format(
        {role: _header(role) for role in _ROLES},
        dict.fromkeys(_ROLES, "<|eot_id|>"),
        _header("assistant"),
        "bos_token",
    ),
    "mistral": _Format(
        {"system": " [INST] ", "user": " [INST] ", "assistant": " "},
        {"system": "\n\n", "user": " [/INST]"},
        "",
        "bos_token",
        eos=True,
    ),
}


def _template(form: _Format) -> str:
    """Return a format as a Jinja template.

    If system and user messages begin alike, the system message is put inside the first user's.
    """
    pieces = [f"{{{{ {form.start} }}}}"] if form.start else []
    pieces += [f"{{% set before, after = {dict(form.before)!r}, {dict(form.after)!r} %}}"]
    pieces += ["{% for message in messages %}"]
    part = "{% if not (loop.previtem and loop.previtem.role == 'system') %}"
    joined = form.before.get("system") == form.before["user"]
    pieces += [part] * joined + ["{{ before.get(message.role, '') }}"] + ["{% endif %}"] * joined
    pieces += ["{{ message.content }}"]
    pieces += ["{{ eos_token if message.role == 'assistant' }}"] * form.eos
    pieces += ["{{ after.get(message.role, '') }}{% endfor %}"]
    if form.opening:
        pieces += [f"{{% if add_generation_prompt %}}{{{{ {form.opening!r} }}}}{{% endif %}}"]
    return "".join(pieces)


CHAT_TEMPLATES: Final[Mapping[str, str]] = {
    name: _template(form) for name, form in _FORMATS.items()
}


def read_chat_template(folder: Path) -> str | None:
    """Read the chat template of a tokenizer's folder, without loading the tokenizer.

    If there are several, the one named "default"; None: there is none.

    Raises:
        MergeError: A file is damaged.
    """
    if (file := folder / "chat_template.jinja").is_file():
        with reading(f"{file}: no text", "save it as UTF-8"):
            return file.read_text(encoding="utf-8")
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    found = read_json(file).get("chat_template")
    try:
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
    except (LookupError, TypeError):
        raise MergeError(f"{file}: its chat_template is damaged; fetch it again") from None
    return found if isinstance(found, str) else None
