"""The README of the merge methods agrees with METHODS."""

import math
import re
from pathlib import Path

import pytest
import yaml

from merge_engine.methods import METHODS, Elementwise, Linear
from merge_engine.methods.contract import Param
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import parse_recipe
from search.proposing.recipes import to_recipe
from search.proposing.space import Space
from search.study.reading import parse_study

PAGE = (Path(__file__).parents[2] / "merge_engine/methods/README.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))
HEADER = ["parameter", "default", "legal", "searched", "per donor"]


def rows(text: str) -> list[list[str]]:
    """The rows of a text's tables, without the lines under their headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if not line.startswith("|---")
    ]


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
    if not param.effect:
        return "no effect"
    if one[key] != other[key]:
        return "derived"
    return "[{:g}, {:g}]".format(*space.ranges[name]) if name in space.ranges else "no"


def parameter_rows(method: str) -> list[list[str]]:
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
    ]


def overview_row(method: str) -> list[str]:
    row = METHODS[method]
    fewest, most = row.donors
    count = f"{fewest}" if fewest == most else f"{fewest} or more"
    random = "yes" if isinstance(row, Elementwise) and row.random else "no"
    return [f"[`{method}`](#{method})", row.base.value, count, random]


def recipe_of(method: str) -> tuple[Recipe, list[str]]:
    (text,) = re.findall(r"```yaml\n(.*?)```", SECTIONS[method], re.DOTALL)
    return parse_recipe(yaml.safe_load(text), where=method)


def test_every_method_has_a_section_and_nothing_else_has():
    assert SECTIONS.keys() == METHODS.keys()


def test_overview_agrees_with_the_table():
    ((_, text),) = re.findall(r"^(\| method \|.*\n)((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert [row[:4] for row in rows(text)] == [overview_row(method) for method in SECTIONS]


@pytest.mark.parametrize("method", METHODS)
def test_parameters_agree_with_the_table(method):
    wanted = [HEADER, *parameter_rows(method)] if METHODS[method].params else []
    assert rows(SECTIONS[method]) == wanted


@pytest.mark.parametrize("method", METHODS)
def test_section_names_source_and_code(method):
    row = METHODS[method]
    code = [row.coefficients] if isinstance(row, Linear) else [row.kernel, row.prepare]
    names = [f"`{f.__module__.split('.')[-1]}.{f.__name__}`" for f in code if f is not None]
    for part in (f"({row.paper})", *names):
        assert part in SECTIONS[method]


@pytest.mark.parametrize("method", METHODS)
def test_example_recipe_is_complete_and_of_the_method(method):
    recipe, notes = recipe_of(method)
    assert recipe.merge_method == method
    assert not notes
    for part in recipe.parts:
        part.recipe.values("model.layers.0.mlp.up_proj.weight", 0.0)


def test_every_link_within_the_page_has_a_target():
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= SECTIONS.keys()
