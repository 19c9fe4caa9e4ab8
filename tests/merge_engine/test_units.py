import pytest

from architectures import save_family
from merge_engine.building.units import Units, without_expert
from merge_engine.models.alignment import live_names
from merge_engine.models.model_set import ModelSet


def test_first_filter_that_matches_decides():
    names = ["l.0.attn.w", "l.0.mlp.w", "l.1.attn.w", "norm.w"]
    units = Units.of_filters(names, [("attn",), ("l.0.", "l.1.")])
    assert units.index == {"l.0.attn.w": 0, "l.0.mlp.w": 1, "l.1.attn.w": 0}
    assert len(Units.of_filters(names, [("attn",), ()]).index) == 4


def test_a_name_within_another_comes_after_it():
    units = Units.of_tensors(["norm.w", "l.0.norm.w"])
    assert units.filters == (("l.0.norm.w",), ("norm.w",))
    assert units == Units.of_filters(["norm.w", "l.0.norm.w"], units.filters)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "minimax", "nemotron_h"])
def test_a_tensor_is_found_by_the_live_models_name_too(name, tmp_path):
    folder = save_family(tmp_path, name, ()) / "base"
    models = ModelSet.open([str(folder)])
    plain = Units.of_tensors({*map(without_expert, models.names)})
    units = Units.of_filters(models.names, plain.filters).with_live_names(models)
    live = live_names(folder, models.names)
    found = Units.of_filters(live.values(), units.filters)
    assert found.index == {live[own]: unit for own, unit in units.index.items()}
    assert Units.of_filters(models.names, units.filters).index == units.index
