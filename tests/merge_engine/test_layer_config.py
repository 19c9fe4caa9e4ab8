import pytest

from merge_engine.building.layer_config import with_layers
from merge_engine.errors import MergeError

COUNT = ["num_hidden_layers"]


def stacked(layers, **config):
    return with_layers({"num_hidden_layers": 4, **config}, layers, COUNT)


def test_numbers_of_layers_follow_the_layers():
    found = stacked([0, 1, 2, 3] * 2, mlp_only_layers=[0])
    assert found == {"num_hidden_layers": 8, "mlp_only_layers": [0, 4]}
    assert stacked([2, 3, 2], moe_layers=[1, 3])["moe_layers"] == [1]


def test_numbers_as_many_as_layers_are_still_numbers():
    assert stacked([3, 3], mlp_only_layers=[0, 1, 2, 3])["mlp_only_layers"] == [0, 1]


def test_entries_of_layers_follow_the_layers():
    assert stacked([1, 1, 3], layer_types=[*"abcd"])["layer_types"] == ["b", "b", "d"]
    assert stacked([0, 2], intermediate_size=[1, 2, 3, 4])["intermediate_size"] == [1, 3]
    assert stacked([0, 2], eos_token_id=[1, 2, 3, 4])["eos_token_id"] == [1, 2, 3, 4]


def test_kinds_that_a_model_derives_from_layers_numbers_are_written_out():
    found = stacked([0, 1, 1, 2], model_type="gemma2")
    sliding, full = "sliding_attention", "full_attention"
    assert found["layer_types"] == [sliding, full, full, sliding]
    assert "layer_types" not in stacked([0, 1, 2, 3], model_type="gemma2")


def test_every_second_layer_of_experts_becomes_a_list():
    found = stacked([0, 1, 1, 2], decoder_sparse_step=2, mlp_only_layers=[])
    assert (found["decoder_sparse_step"], found["mlp_only_layers"]) == (1, [0, 3])


def test_dense_layers_can_only_come_first():
    assert stacked([0, 1, 1, 2], first_k_dense_replace=1)["first_k_dense_replace"] == 1
    assert stacked([0, 0, 1], first_k_dense_replace=1)["first_k_dense_replace"] == 2
    with pytest.raises(MergeError, match=r"first_k_dense_replace \(1\) .* at layer 1"):
        stacked([0, 1, 0, 1], first_k_dense_replace=1)
