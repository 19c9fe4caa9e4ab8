"""What forward passes take, by a model's config."""

import pytest

from search.preparing.forward_memory import forward_passes

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
    assert forward_passes(listed, 2, tuned=True) == forward_passes(CONFIG, 2, tuned=True)


@pytest.mark.parametrize("name", CONFIG)
def test_a_number_that_is_missing_or_none_is_not_counted(name):
    for config in (CONFIG | {name: None}, {k: CONFIG[k] for k in CONFIG if k != name}):
        assert forward_passes(config, 2, tuned=True).scoring >= 0
