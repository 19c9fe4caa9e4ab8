"""Pictures of tuned weights: where each unit's weight is drawn."""

import re

import numpy as np
import pytest

from search.proposing.tuned_path import TunedUnits
from search.showing.svg import heat_map
from search.showing.tuning_charts import arranged


def units_of(*filters):
    return TunedUnits(tuple(filters), (0,) * len(filters))


def test_tensors_of_a_kind_are_a_row_with_a_column_for_each_layer_and_others_follow():
    names = [f"model.layers.{n}.{kind}.weight" for n in (10, 2) for kind in ("mlp.up", "attn.q")]
    units = units_of(*((name,) for name in (*names, "model.embed_tokens.weight")))
    layers, rows = arranged(units, np.arange(5.0))
    assert layers == [2, 10]
    assert [(row.name, [*row.values]) for row in rows] == [
        ("attn.q", [3.0, 1.0]),
        ("mlp.up", [2.0, 0.0]),
        ("embed_tokens", [4.0]),
    ]


def test_a_group_of_layers_fills_all_of_its_cells_and_what_is_left_has_a_row():
    units = units_of(("layers.0.", "layers.1."), ("layers.2.",), ())
    layers, rows = arranged(units, np.array([0.5, 1.0, 0.2]))
    assert layers == [0, 1, 2]
    assert [(row.name, [*row.values]) for row in rows] == [
        ("layer", [0.5, 0.5, 1.0]),
        ("all else", [0.2]),
    ]


def test_two_stacks_of_layers_have_rows_of_their_own():
    units = units_of(("encoder.block.0.q.weight",), ("decoder.block.0.q.weight",))
    _, rows = arranged(units, np.array([1.0, 2.0]))
    assert [(row.name, [*row.values]) for row in rows] == [
        ("decoder.block.q", [2.0]),
        ("encoder.block.q", [1.0]),
    ]


def test_cells_are_the_darker_the_farther_from_zero_and_say_their_number():
    units = units_of(*((f"layers.{n}.q.weight",) for n in range(3)))
    layers, rows = arranged(units, np.array([2.0, -1.0, 0.0]))
    svg = str(heat_map(layers, rows, 2.0, "weights"))
    cells = re.findall(r'class="(\w+)"[^>]*fill-opacity="([\d.]+)"><title>(.*?)</title>', svg)
    assert [(kind, float(opacity)) for kind, opacity, _ in cells] == [
        ("cell", pytest.approx(1.0)),
        ("below", pytest.approx(0.5)),
        ("cell", pytest.approx(0.0)),
    ]
    assert cells[1][2] == "q, layer 1: -1.000"


def test_other_names_of_a_units_tensors_are_not_drawn():
    stored, live = "backbone.layers.{}.norm.weight", "model.layers.{}.norm.weight"
    units = units_of(*(tuple(each.format(n) for each in (stored, live)) for n in (0, 1)))
    layers, rows = arranged(units, np.array([0.5, 1.0]))
    assert layers == [0, 1]
    assert [(row.name, [*row.values]) for row in rows] == [("norm", [0.5, 1.0])]
