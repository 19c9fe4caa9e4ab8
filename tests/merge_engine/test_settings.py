import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.recipe.settings import dump_setting, parse_setting, value_at

NUMBERS = st.floats(-3, 3)
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=2, max_size=5))
CLAUSES = st.builds(
    lambda name, value: {"value": value} | ({"filter": name} if name else {}),
    st.sampled_from(["", "mlp", "self_attn", "layers.1."]),
    VALUES,
)


@given(st.one_of(VALUES, st.lists(CLAUSES, min_size=1, max_size=4)))
def test_parse_and_dump_are_inverse(raw):
    setting = parse_setting(raw)
    assert parse_setting(dump_setting(setting)) == setting


def test_first_matching_filter_wins_and_none_matching_gives_none():
    setting = parse_setting([{"filter": "mlp", "value": 1}, {"filter": "mlp.up", "value": 2}])
    assert value_at(setting, "model.layers.0.mlp.up_proj.weight", 0.0) == 1
    assert value_at(setting, "model.norm.weight", 0.0) is None


@pytest.mark.parametrize(("depth", "value"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 0.0)])
def test_gradient_is_interpolated_over_depth(depth, value):
    assert value_at(parse_setting([0.0, 1.0, 0.0]), "x", depth) == value


def test_gradient_of_booleans_is_a_step_function():
    assert value_at(parse_setting([True, False]), "x", 0.9) is True
    assert value_at(parse_setting([True, False]), "x", 1.0) is False


@pytest.mark.parametrize("raw", [None, [], {"filter": "mlp"}, {"value": 1, "filer": "mlp"}, [[1]]])
def test_a_malformed_setting_is_refused(raw):
    with pytest.raises(ValueError, match=r"expected a number|a clause has the keys"):
        parse_setting(raw)


def test_list_of_filters_stands_for_a_clause_each():
    setting = parse_setting([{"filter": ["self_attn", "mlp"], "value": 1}, {"value": 2}])
    names = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "norm")
    assert [value_at(setting, name, 0.0) for name in names] == [1, 1, 2]
    assert parse_setting(dump_setting(setting)) == setting


@given(st.lists(st.text("ab", max_size=4), min_size=1), st.lists(st.text("ab", max_size=6)))
def test_the_first_clause_in_the_list_whose_filter_is_in_the_name_is_used(filters, names):
    setting = parse_setting([{"filter": each, "value": n} for n, each in enumerate(filters)])
    for name in names:
        matching = [n for n, each in enumerate(filters) if each in name]
        assert value_at(setting, name, 0.0) == (matching[0] if matching else None)


def test_settings_with_equal_filters_search_a_name_once():
    raw = [{"filter": "layers.11.", "value": 1}, {"filter": "layers.1.", "value": 2}]
    setting, other = (
        parse_setting(raw),
        parse_setting([*raw[:1], {"filter": "layers.1.", "value": 3}]),
    )
    assert setting.first_matches is other.first_matches
    assert value_at(setting, "layers.11.w", 0.0) == 1
    assert value_at(other, "layers.1.w", 0.0) == 3
