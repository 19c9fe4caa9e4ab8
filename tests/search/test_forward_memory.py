"""What forward passes take, by a model's config."""

import pytest

from search.preparing.forward_memory import BATCH, forward_passes, tuned_tokens
from search.proposing.tuning import AT_ONCE

CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def test_numbers_of_layers_count_by_the_largest():
    listed = CONFIG | {"intermediate_size": [128, 256], "num_key_value_heads": [2, 1, None]}
    assert forward_passes(listed, 2, tuned=1024) == forward_passes(CONFIG, 2, tuned=1024)


@pytest.mark.parametrize("name", CONFIG)
def test_a_number_that_is_missing_or_none_is_not_counted(name):
    for config in (CONFIG | {name: None}, {k: CONFIG[k] for k in CONFIG if k != name}):
        assert forward_passes(config, 2, tuned=1024).scoring >= 0


class Loaded:
    """A loaded task, as far as it is asked."""

    def __init__(self, sample, shots):
        self.sample, self.task = sample, self
        self._shots = shots

    def get_config(self, key):
        return {"num_fewshot": self._shots}[key]


def test_examples_that_items_share_are_counted_once_for_each_task():
    long, longer = "x" * 400, "x" * 800
    assert tuned_tokens([Loaded(long, 0)], len) == AT_ONCE * 400
    assert tuned_tokens([Loaded(long, 5)], len) == AT_ONCE * 400 + 5 * 400
    both = [Loaded(long, 5), Loaded(longer, 1)]
    assert tuned_tokens(both, len) == AT_ONCE * 600 + 5 * 400 + 800
    assert tuned_tokens([Loaded("short", 0)], len) == tuned_tokens([], len) == BATCH


def test_passes_take_as_much_more_as_tokens_go_backward():
    none, some, more = (forward_passes(CONFIG, 2, tuned=tokens) for tokens in (0, 100, 200))
    assert none.tuning == 0
    assert none.scoring == some.scoring == more.scoring
    constant = 2 * some.tuning - more.tuning  # the gradient of the largest tensor
    assert constant == pytest.approx(2 * 64 * 1000 * 2, rel=0.01)
