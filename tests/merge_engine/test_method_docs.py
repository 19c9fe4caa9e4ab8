"""The README of the merge methods agrees with METHODS."""

import math
import re
from pathlib import Path

import pytest
import yaml

from merge_engine.methods import METHODS, Elementwise, Linear, preparation
from merge_engine.methods.contract import Param
from merge_engine.recipe.recipe_file import parse_recipe
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.study.reading import parse_study

PAGE = (Path(__file__).parents[2] / "merge_engine/methods/README.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))
LINKS = dict(re.findall(r"^\[(.+)\]: (.+)$", PAGE, re.MULTILINE))
SPARSE = [m for m, row in METHODS.items() if isinstance(row, Elementwise) and row.combine]
FAMILY = PAGE.partition("## Sparse task vectors")[2].partition("### `ties`")[0]
SHARED = ("weight", "density", "lambda", "normalize", "rescale")  # by the sparse methods
COMBINED = {"plain": preparation.plain_sum, "elected": preparation.elected_sum}


def rows(text: str) -> list[list[str]]:
    """The rows of a text's tables, without their headers and the lines under these."""
    tables = re.findall(r"^\|.*\n\|---.*\n((?:\|.*\n)*)", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def table(header: str, text: str = PAGE) -> list[list[str]]:
    (found,) = re.findall(rf"^\| {header}.*\n(?:\|.*\n)+", text, re.MULTILINE)
    return rows(found)


def link(method: str) -> str:
    return f"[`{method}`](#{method})"


def space_of(method: str) -> Space:
    """What a study of this method alone searches by default."""
    mapping = {
        "base_model": "base",
        "models": ["a", "b"],
        "search": {"methods": [method]},
        "objective": {"tasks": ["t"]},
    }
    return Space.from_spec(parse_study(mapping, Path(), where="test"), (), "float32")


def value(of: object) -> str:
    if of is None:
        return "required"
    return str(of).lower() if isinstance(of, bool) else f"`{of:g}`"


def legal(param: Param) -> str:
    if param.kind is bool:
        return "true, false"
    low, high = param.valid
    if high == math.inf:
        return "any" if low == -math.inf else f"at least {low:g}"
    return f"[{low:g}, {high:g}]"


def searched(space: Space, name: str, param: Param) -> str:
    (method,) = space.methods
    points = [space.point(method, weights) for weights in ((0.2, 0.6), (1.0, 0.4))]
    one, other = (to_recipe(space, point).values("x", 0.0) for point in points)
    key = f"{name}_" if name == "lambda" else name
    if one[key] != other[key]:
        return "derived"
    return "[{:g}, {:g}]".format(*space.ranges[name]) if name in space.ranges else "no"


def parameter_rows(method: str) -> list[list[str]]:
    """The rows of a method's parameters, without those of no effect."""
    space = space_of(method)
    return [
        [
            f"`{name}`",
            value(param.default),
            legal(param),
            searched(space, name, param),
            "yes" if param.per_donor else "no",
        ]
        for name, param in METHODS[method].params.items()
        if param.effect
    ]


def parameters_in_overview(method: str) -> str:
    names = [name for name, param in METHODS[method].params.items() if param.effect]
    shared = ["shared"] if method in SPARSE else []
    own = [f"`{name}`" for name in names if not shared or name not in SHARED]
    return ", ".join(shared + own) or "none"


def input_row(method: str) -> list[str]:
    row = METHODS[method]
    fewest, most = row.donors
    count = f"{fewest}" if fewest == most else f"{fewest} or more"
    random = "yes" if isinstance(row, Elementwise) and row.random else "no"
    return [f"`{method}`", row.base.value, count, random]


def test_every_method_has_a_section_and_nothing_else_has():
    assert SECTIONS.keys() == METHODS.keys()


def test_overview_agrees_with_the_table():
    found = [
        [name, parameters, LINKS[source[1:-1]]]
        for name, _, parameters, source in table(r"method \| merged")
    ]
    assert found == [[link(m), parameters_in_overview(m), METHODS[m].paper] for m in SECTIONS]


def test_inputs_agree_with_the_table():
    assert [row[:4] for row in table(r"method \| base")] == [input_row(m) for m in SECTIONS]


@pytest.mark.parametrize("method", METHODS)
def test_parameters_agree_with_the_table(method):
    own = [] if method in SPARSE else parameter_rows(method)
    assert rows(SECTIONS[method]) == own


@pytest.mark.parametrize("method", SPARSE)
def test_parameters_of_sparse_methods_agree_with_the_table(method):
    ((_, _, how, normalize, rescale, besides),) = [
        row for row in table(r"method \| mask") if row[0] == link(method)
    ]
    assert METHODS[method].combine is COMBINED[how]
    defaults = {"`normalize`": normalize, "`rescale`": rescale}
    derived = "derived" if normalize == "true" else "no"
    found = [
        [name, defaults.get(name, default), legal, derived if name == "`lambda`" else searched, per]
        for name, default, legal, searched, per in table("parameter", FAMILY)
        if name.strip("`") in SHARED or name == besides
    ]
    assert found == parameter_rows(method)


@pytest.mark.parametrize("method", METHODS)
def test_section_names_source_and_code(method):
    row = METHODS[method]
    code = (
        [row.coefficients] if isinstance(row, Linear) else [row.sparsify or row.kernel, row.prepare]
    )
    names = [f"`{f.__module__.split('.')[-1]}.{f.__name__}`" for f in code if f is not None]
    sources = [name for name, target in LINKS.items() if target == row.paper]
    for part in (f"[{sources[0]}]", *names):
        assert part in SECTIONS[method].replace("\n", " ")


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_example_recipe_is_complete(example):
    recipe, notes = parse_recipe(yaml.safe_load(example), where="README.md")
    assert not notes
    for part in recipe.parts:
        part.recipe.values("model.layers.0.mlp.up_proj.weight", 0.0)


def test_every_link_has_a_target():
    titles = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    anchors = {title.strip("`").lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors
    named = re.findall(r"\[([A-Z][\w' ]+|alchemonaut 2024)\](?![:(])", PAGE)
    assert set(named) == LINKS.keys()
