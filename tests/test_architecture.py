"""The house: which room may import which, no circles, small modules, and nobody else's names."""

import ast
import importlib.metadata
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "search": {"search", "merge_engine", "objectives"},
    "merge_engine": {"merge_engine"},
    "objectives": {"objectives"},
}
# Lowest first: a room may import those before it, and its own modules.
ROOMS = {
    "search": [
        *("wording", "study", "racing", "storing", "proposing", "preparing", "process"),
        *("running", "showing", "options", "pipeline", "session", "arguments", "commands", "cli"),
    ],
    "merge_engine": [
        "out_of_memory",
        "errors",
        "plain_files",
        "schema",
        "replacing",
        "numerics",
        "methods",
        "recipe",
        "models",
        "building",
    ],
    "objectives": [
        "journal",
        "base",
        "entries",
        "items",
        "scores",
        "inference",
        "harness",
        "plugin",
    ],
}
MODULE, CLASS, FUNCTION = 400, 220, 60  # lines at most
BY_TOPIC = {  # test files of several modules, or of what is no module
    *("test_methods", "test_method_docs", "test_published_recipes"),
    *("test_leaderboard", "test_pitfalls"),
}


@cache
def modules() -> dict[str, Path]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


@cache
def imports(module: str) -> frozenset[str]:
    """Full names of what a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    return {name for name in imports(module) if name in modules()} - {module}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_it_may(package):
    mine = [module for module in modules() if module.split(".")[0] == package]
    assert mine
    for module in mine:
        packages = {name.split(".")[0] for name in imports(module)}
        assert packages & PACKAGES.keys() <= PACKAGES[package], module


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_rooms_below_them(package):
    order = ROOMS[package]
    mine = [module for module in modules() if module.startswith(f"{package}.")]
    assert {room(module) for module in mine} == set(order), "a room is missing from the order"
    for module in mine:
        others = {room(name) for name in own_imports(module) if name.startswith(f"{package}.")}
        upward = {other for other in others if order.index(other) > order.index(room(module))}
        assert not upward, f"{module} imports upward: {upward}"


def test_no_circle_of_imports_exists():
    TopologicalSorter({module: own_imports(module) for module in modules()}).prepare()


def test_modules_classes_and_functions_are_small():
    for module, file in modules().items():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MODULE, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                most = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
                assert lines <= most, f"{module}: {node.name} has {lines} lines"


def test_mergekit_is_never_imported_at_run_time():
    for module in modules():
        assert not any(name.split(".")[0] == "mergekit" for name in imports(module)), module


def test_no_other_distribution_ships_our_names():
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners.get(package, [])) <= {"mergesearch"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_test_file_is_named_after_a_module(package):
    known = {f"test_{file.stem}" for file in (ROOT / package).rglob("*.py")}
    files = {file.stem for file in (ROOT / "tests" / package).glob("test_*.py")}
    assert files - known <= BY_TOPIC
