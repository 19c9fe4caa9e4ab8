from importlib import resources

import pytest
from transformers import AutoTokenizer

from merge_engine.errors import MergeError
from merge_engine.models.chat_templates import CHAT_TEMPLATES, read_chat_template
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


@pytest.mark.parametrize(
    "template", [None, "one {{ messages }}", {"tool_use": "other", "default": "one"}]
)
def test_template_read_from_a_folder_is_the_one_transformers_reads(tmp_path, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    for jinja in (True, False):  # a file of its own, or a key of tokenizer_config.json
        folder = tmp_path / str(jinja)
        tokenizer.save_pretrained(folder, save_jinja_files=jinja)
        read = AutoTokenizer.from_pretrained(folder)
        expected = None if template is None else read.get_chat_template()
        assert read_chat_template(folder) == expected


def test_damaged_template_is_refused_by_its_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(MergeError, match=r"tokenizer_config\.json: its chat_template is damaged"):
        read_chat_template(tmp_path)
