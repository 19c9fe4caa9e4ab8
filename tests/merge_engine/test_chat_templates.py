from importlib import resources

import pytest

from merge_engine.models.chat_templates import CHAT_TEMPLATES
from tiny_models import make_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Thanks"},
]


def rendered(template, messages, **options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:3]])
@pytest.mark.parametrize("prompt", [False, True])
def test_template_renders_what_mergekits_renders(name, messages, prompt):
    text = resources.files("mergekit._data.chat_templates").joinpath(f"{name}.jinja").read_text()
    options = {"add_generation_prompt": prompt}
    mine, theirs = (rendered(t, messages, **options) for t in (CHAT_TEMPLATES[name], text))
    # mergekit's have line ends of their own between messages, which the formats lack.
    assert mine == (theirs if name != "llama3" else theirs.replace("<|eot_id|>\n", "<|eot_id|>"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nTwo and two?\n\n### Response:\nFour.</s>\n\n"
            "### Instruction:\nThanks\n\n### Response:\n",
        ),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Two and two?\n"
            "[|assistant|]Four.[|endofturn|]\n[|user|]Thanks\n[|assistant|]",
        ),
    ],
)
def test_template_renders_the_format(name, expected):
    assert rendered(CHAT_TEMPLATES[name], CHAT, add_generation_prompt=True) == expected
    assert rendered(CHAT_TEMPLATES[name], CHAT[1:]).startswith(("###", "[|system|][|endofturn|]"))
