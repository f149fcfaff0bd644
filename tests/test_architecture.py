"""docs/ARCHITECTURE.md names files, functions and words that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
PATH = re.compile(r"`((?:nsa|tests|tools|benchmarks|docs)/[\w./-]+|pyproject\.toml)`")
NAME_IN_PATH = re.compile(r"`([\w.]+)` in\s+`([\w./]+\.py)`")
IDENTIFIER = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)?)`")


@cache
def definitions(path: Path) -> set[str]:
    """Functions, classes, their methods and attributes, and names that are assigned."""
    names = set()

    def visit(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            if isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
                names.update(alias.asname or alias.name for alias in node.names)
            if isinstance(node, ast.AnnAssign):
                names.add(prefix + node.target.id)
            if isinstance(node, ast.Assign):
                names.update(prefix + x.id for x in node.targets if isinstance(x, ast.Name))

    visit(ast.parse(path.read_text()).body)
    return names


@cache
def words_of_the_package() -> set[str]:
    """Everything that the package defines, and the names of arguments and fields."""
    names = set()
    for path in (ROOT / "nsa").rglob("*.py"):
        names |= definitions(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg):
                names.add(node.arg)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def test_the_page_walks_through_the_code():
    assert len(NAME_IN_PATH.findall(PAGE)) >= 15
    assert len(PATH.findall(PAGE)) >= 30


@pytest.mark.parametrize("path", sorted(set(PATH.findall(PAGE))))
def test_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "path"), sorted(set(NAME_IN_PATH.findall(PAGE))))
def test_names_are_where_the_page_says(name, path):
    assert name in definitions(ROOT / path)


def stage_rows() -> list[tuple[list[str], list[str]]]:
    """Functions of each stage, and the files of both backends."""
    section = PAGE.split("## Stages")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    return [(IDENTIFIER.findall(row[2]), PATH.findall(row[3] + row[4])) for row in rows]


def test_the_same_stage_has_the_same_name_in_both_backends():
    rows = stage_rows()
    assert len(rows) == 8
    for names, paths in rows:
        assert names
        assert [path.split("/")[1] for path in paths] == ["reference", "fused"]
        for path in paths:
            assert set(names) <= definitions(ROOT / path), path


def test_words_in_code_exist():
    # Letters are the paper's.
    found = IDENTIFIER.findall(PAGE)
    words = {x for x in found if len(x) > 1 and not x.startswith(("nsa.", "pyproject."))}
    assert not words - words_of_the_package()


def test_every_module_of_the_large_packages_has_a_place_on_the_page():
    package = ROOT / "nsa"
    folders = (package / "fused", package / "fused" / "attention", package / "distributed")
    modules = [path for folder in folders for path in folder.glob("*.py")]
    named = set(PATH.findall(PAGE))
    missing = {str(path.relative_to(ROOT)) for path in modules if path.stem != "__init__"} - named
    assert not missing


LAYERS = [
    {"config"},
    {"precision", "host", "blocks", "segments", "results"},
    {"geometry", "packing", "testing"},
    {"validation", "rope", "recorded_call"},
    {"block_index_checks", "recorder"},
    {"recordings"},
    {"cache"},
    {"reference", "fused"},
    {"backends", "call_checks", "flat_arguments"},
    {"dispatch"},
    {"selected_branch"},
    {"linears", "plain_modules", "layer_checks"},
    {"compressor", "cached_layer"},
    {"distributed", "joint_products"},
    {"layers", "integrations", "transformers"},
    {"__init__"},
    {"__main__"},
]
"""Modules and packages of nsa, those that import nothing of it first."""


def imported_modules(path: Path) -> set[str]:
    """The modules and packages of nsa that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "nsa":
            names |= {f"nsa.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("nsa.")}


def test_no_arrow_points_up():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in (ROOT / "nsa").rglob("*.py"):
        own = path.relative_to(ROOT / "nsa").parts[0].removesuffix(".py")
        for name in imported_modules(path) - {own}:
            assert rank[name] < rank[own], f"{path} imports nsa.{name}"
