"""Who may import whom, and that our flat package names clash with nobody's."""

import ast
import importlib.metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARROWS = {
    "search": {"search", "merge_engine", "objectives"},
    "merge_engine": {"merge_engine"},
    "objectives": {"objectives"},
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", ARROWS)
def test_package_imports_only_what_it_may(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) & ARROWS.keys() <= ARROWS[package], file


def test_mergekit_is_never_imported_at_run_time():
    for package in ARROWS:
        assert not any("mergekit" in imported(file) for file in (ROOT / package).rglob("*.py"))


def test_no_other_distribution_ships_our_names():
    owners = importlib.metadata.packages_distributions()
    for package in ARROWS:
        assert set(owners.get(package, [])) <= {"mergesearch"}
