from merge_engine.building.units import Units


def test_first_filter_that_matches_decides():
    names = ["l.0.attn.w", "l.0.mlp.w", "l.1.attn.w", "norm.w"]
    units = Units.of_filters(names, [("attn",), ("l.0.", "l.1.")])
    assert units.index == {"l.0.attn.w": 0, "l.0.mlp.w": 1, "l.1.attn.w": 0}
    assert len(Units.of_filters(names, [("attn",), ()]).index) == 4


def test_a_name_within_another_comes_after_it():
    units = Units.of_tensors(["norm.w", "l.0.norm.w"])
    assert units.filters == (("l.0.norm.w",), ("norm.w",))
    assert units == Units.of_filters(["norm.w", "l.0.norm.w"], units.filters)
