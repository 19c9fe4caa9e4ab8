"""What forward passes take, by a model's config."""

import json

import pytest

from objectives.inference.forward import CACHED_PER_READ
from search.preparing.forward_memory import (
    BATCH,
    CACHED,
    JOB_ITEMS,
    TEMPLATE,
    Tokens,
    forward_passes,
    scored_tokens,
    tuned_tokens,
)
from search.proposing.tuning import AT_ONCE

CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
BATCH_OF_CHOICES = Tokens(BATCH, 100)


def passes(config=CONFIG, scored=BATCH_OF_CHOICES, tuned=BATCH_OF_CHOICES):
    return forward_passes(config, 2, scored=[scored], tuned=tuned)


def test_numbers_of_layers_count_by_the_largest():
    listed = CONFIG | {"intermediate_size": [128, 256], "num_key_value_heads": [2, 1, None]}
    assert passes(listed) == passes()


@pytest.mark.parametrize("name", CONFIG)
def test_a_number_that_is_missing_or_none_is_not_counted(name):
    for config in (CONFIG | {name: None}, {k: CONFIG[k] for k in CONFIG if k != name}):
        assert passes(config).scoring >= 0


class Loaded:
    """A loaded task, as far as it is asked."""

    weight = 1.0

    def __init__(self, size, shots=0, choices=None, target="t", kind="multiple_choice", new=None):
        self.task, self.OUTPUT_TYPE = self, kind
        self._config = {"num_fewshot": shots, "generation_kwargs": {"max_gen_toks": new}}
        answers = choices or (target if isinstance(target, list) else [target])
        self.sample = json.dumps(["x" * (size - sum(map(len, answers))), choices, target])

    def get_config(self, key):
        return self._config[key]


def scored(tasks, chat=False):
    return scored_tokens(tasks, len, chat=chat)


def backward(tasks, chat=False):
    return tuned_tokens(tasks, len, chat=chat)


def test_items_that_go_backward_are_padded_to_the_longest_unless_their_prompts_begin_alike():
    assert backward([Loaded(400)]).read == AT_ONCE * 400
    mixed = [Loaded(40), Loaded(120)]
    assert backward(mixed).read == AT_ONCE * 120
    assert backward(mixed, chat=True).read == AT_ONCE * 80
    assert backward([Loaded(40), Loaded(1000)]).read == AT_ONCE * 520  # of batches of like lengths
    assert backward([]).read == BATCH


def test_examples_that_items_share_are_counted_once_for_each_task():
    assert backward([Loaded(400, 5)]).read == AT_ONCE * 400 + 5 * 400
    both = [Loaded(400, 5), Loaded(800, 1)]
    assert backward(both).read == AT_ONCE * 600 + 5 * 400 + 800


def test_tokens_of_choices_have_logits():
    task = Loaded(128, choices=["a" * 8, "b" * 24])
    rows = BATCH // 128
    assert scored([task]) == [Tokens(BATCH, rows * 32)]
    assert backward([task]) == Tokens(AT_ONCE * 128, AT_ONCE * 32)
    rolling = Loaded(1000, target="y" * 980)
    assert scored([task, rolling])[1] == Tokens(1000, 980)
    assert scored([]) == [Tokens(BATCH, BATCH // 2)]


def test_a_batch_has_no_more_tokens_than_the_items_of_a_job():
    short = Loaded(40, choices=["a", "b"])
    assert scored([short] * 10) == [Tokens(10 * 40, 10 * 2)] * 10
    assert scored([Loaded(3000, target="y")]) == [Tokens(3000, 1)]


def test_examples_have_keys_and_values_in_each_row():
    few = Loaded(128, shots=2, choices=["a", "b"])
    assert scored([few]) == [Tokens(BATCH, BATCH // 128 * 2, BATCH * 3)]
    many = Loaded(128, shots=20, choices=["a", "b"])
    examples = 20 * 128  # are read alone
    assert scored([many]) == [Tokens(examples, BATCH // 128 * 2, CACHED)]


def test_a_chat_template_makes_every_row_longer():
    task = Loaded(32, choices=["a", "b"])
    rows = BATCH // (32 + TEMPLATE)
    assert scored([task], chat=True) == [Tokens(BATCH, rows * 2, BATCH)]


def test_texts_that_are_generated_at_once_have_keys_and_values():
    short = Loaded(46, kind="generate_until", new=8, target=["yes", "not"])
    read = BATCH // 40 * 40  # answers are not
    assert scored([short]) == [Tokens(read, JOB_ITEMS, read + JOB_ITEMS * 48)]
    _, half = scored([short, Loaded(40, choices=["a"])])
    assert half == Tokens(read, JOB_ITEMS // 2, read + JOB_ITEMS // 2 * 48)
    long = Loaded(501, kind="generate_until", new=500)
    assert scored([short, long])[0].cached == CACHED + 1000
    unlimited = Loaded(21, kind="generate_until", new=None)  # null in YAML: lm-eval's default
    assert scored([unlimited] * 10)[0].cached == 10 * 20 + min(CACHED, 100 * (20 + 256))
    more, less = (passes(scored=Tokens(BATCH, 0, cached)).scoring for cached in (100, 0))
    assert more - less == 100 * 2 * 4 * 2 * (64 // 8) * 2  # layers, heads, their size, bytes


def test_passes_take_as_much_more_as_tokens_go_backward():
    none, some, more = (passes(tuned=t) for t in (None, Tokens(100, 10), Tokens(200, 20)))
    assert none.tuning == 0
    assert none.scoring == some.scoring == more.scoring
    constant = 2 * some.tuning - more.tuning  # the gradient of the largest tensor
    assert constant == pytest.approx(2 * 64 * 1000 * 2, rel=0.01)


def test_as_many_tokens_are_cached_as_the_forward_passes_keep():
    assert CACHED == CACHED_PER_READ * BATCH
