"""docs/ARCHITECTURE.md names files, functions and words that exist."""

import ast
import re
import sys
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import nsa
from nsa.fused import decode_calls
from nsa.fused import pipeline as fused_pipeline
from nsa.reference import pipeline as reference_pipeline
from nsa.testing import make_inputs
from tests.helpers.small_configs import tile_config, token_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
PATH = re.compile(r"`((?:nsa|tests|tools|benchmarks|docs)/[\w./-]+|pyproject\.toml)`")
NAME_IN_PATH = re.compile(r"`([\w.]+)` in\s+`([\w./]+\.py)`")
IDENTIFIER = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)?)`")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


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

    visit(parsed(path).body)
    return names


@cache
def words_of_the_package() -> set[str]:
    """Everything that the package defines, and the names of arguments and fields."""
    names = set()
    for path in (ROOT / "nsa").rglob("*.py"):
        names |= definitions(path)
        for node in ast.walk(parsed(path)):
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


MOST_CALLS = 5
"""From nsa.forward to a branch."""


@pytest.fixture
def ways(monkeypatch):
    """A function that watches one of a module, and the ways to those that are watched: functions or
    classes of ours that were called one after another, and their files."""
    found = []

    def watch(module, name):
        function = getattr(module, name)

        def noted(*args, **kwargs):
            frame, way = sys._getframe(1), []
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(ROOT / "nsa"):
                    top_name = frame.f_code.co_qualname.split(".")[0]
                    way.insert(0, (top_name, str(path.relative_to(ROOT))))
                frame = frame.f_back
            found.append((name, way))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    return watch, found


def call_branches(ways, module, names, call) -> dict[str, list[tuple[str, str]]]:
    """The ways that ``call()`` takes to functions of a module."""
    watch, found = ways
    for name in names:
        watch(module, name)
    call()
    assert found
    for name, way in found:
        assert len(way) <= MOST_CALLS, (name, way)
        assert len(set(way)) == len(way), (name, way)
    return dict(found)


def forward_of(config, grad, backend, function=nsa.forward, **options):
    q, k, v = make_inputs((1, 300), 4, 2, 16)
    function(q.requires_grad_(grad), k, v, config=config, backend=backend, **options)


def chains() -> dict[str, list[tuple[str, str]]]:
    """The ways that the page names, from the public function to what calls the branches."""
    section = PAGE.split("## Ways to a branch")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    return {row[1].strip(): NAME_IN_PATH.findall(row[2]) for row in rows}


BRANCHES = ("compressed_attention", "selected_attention", "window_attention")
CLOSING = ("closing_attention", "closing_window")
CONFIGS = {"token": token_config(), "tile": tile_config()}


@pytest.mark.parametrize("last", ["window", "selected"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", CONFIGS)
def test_a_branch_is_few_calls_away(mode, grad, last, ways, fused_on_cpu, monkeypatch):
    if last == "window":
        monkeypatch.setattr(fused_pipeline, "SHORT_TOKENS", 0)
    names, call = (*BRANCHES, *CLOSING), partial(forward_of, CONFIGS[mode], grad, "fused")
    found = call_branches(ways, fused_pipeline, names, call)
    chain = chains()["training" if grad else "inference"]
    assert all(way == chain for way in found.values())
    if grad:
        section = PAGE.split("## Life of a call")[1].split("\n## ")[0]
        assert chain == re.findall(r"^\d\. `(\w+)` in `([\w./]+)`", section, re.MULTILINE)


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_branch_of_a_compiled_call_is_few_calls_away(mode, ways, fused_on_cpu):
    torch.compiler.reset()
    compiled = torch.compile(nsa.forward, backend="aot_eager")
    call = partial(forward_of, CONFIGS[mode], True, "fused", compiled)
    found = call_branches(ways, fused_pipeline, (*BRANCHES, *CLOSING), call)
    assert all(way == chains()["compiled"] for way in found.values())


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_branch_of_a_prompt_is_few_calls_away(mode, ways, fused_on_cpu):
    cache = nsa.Cache(CONFIGS[mode], 1, 320, 2, 16)
    call = partial(forward_of, CONFIGS[mode], False, "fused", cache=cache)
    found = call_branches(ways, fused_pipeline, (*BRANCHES, *CLOSING), call)
    assert all(way == chains()["prompt"] for way in found.values())


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_branch_of_the_reference_is_few_calls_away(mode, ways):
    call = partial(forward_of, CONFIGS[mode], True, "reference")
    found = call_branches(ways, reference_pipeline, BRANCHES, call)
    assert all(way == chains()["reference"] for way in found.values())


def test_a_kernel_of_a_decoding_step_is_few_calls_away(ways, fused_on_cpu):
    watch, found = ways
    q, k, v = make_inputs((1, 1), 4, 2, 32)
    config = nsa.NSAConfig.paper(num_selected_blocks=4, window_size=40)
    cache = nsa.Cache(config, 1, 64, 2, 32)
    watch(decode_calls, "decode_compressed")
    nsa.forward(q, k, v, cache=cache, backend="fused")
    assert found == [("decode_compressed", chains()["decoding step"])]


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


def test_every_file_of_kernels_has_a_line():
    text = ast.get_docstring(ast.parse((ROOT / "nsa/fused/kernels/__init__.py").read_text()))
    named = [
        name
        for line in text.partition("\nOperations:\n")[2].splitlines()
        if line.startswith("- ")
        for name in re.findall(r"``(\w+)``", line.partition(": ")[0])
    ]
    files = {path.stem for path in (ROOT / "nsa/fused/kernels").glob("*.py")}
    assert sorted(named) == sorted(files - {"__init__"})


def tuples_of(function: ast.FunctionDef) -> set[str]:
    """Names of a function for tuples that are written out in it."""
    return {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


OPS = {"apply", "run_node", "save_for_backward", "_gradients", "plain_layer"}
"""Autograd nodes and custom ops, whose arguments have positions alone."""

OF_ANY_NUMBER = {"autocast_tensors", "needs_gradients", "empty"}
"""Functions of any number of tensors or sizes."""


def test_arguments_are_not_packed_for_a_call():
    """A reader follows an argument by its name, or by its position in the call."""
    packed = []
    for path in (ROOT / "nsa").rglob("*.py"):
        if "kernels" in path.parts or path.name == "layer_ops.py":
            continue
        for function in ast.walk(parsed(path)):
            if not isinstance(function, ast.FunctionDef):
                continue
            tuples = tuples_of(function)
            for call in ast.walk(function):
                if not isinstance(call, ast.Call):
                    continue
                name = ast.unparse(call.func).split(".")[-1]
                for x in call.args:
                    value = x.value if isinstance(x, ast.Starred) else None
                    written = isinstance(value, ast.Tuple) or (
                        isinstance(value, ast.Name) and value.id in tuples
                    )
                    if written and name not in OPS | OF_ANY_NUMBER:
                        packed.append(f"{path.name}:{call.lineno} {name}")
    assert not packed


LAYERS = [
    {"config"},
    {"precision", "host", "blocks", "segments", "results"},
    {"geometry", "packing", "testing"},
    {"boundaries"},
    {"validation", "rope", "recorded_memory", "recorded_graphs", "recorded_plan"},
    {"recorded_code"},
    {"block_index_checks", "derivatives"},
    {"recorded_call", "recorded_streams", "recorded_zeros"},
    {"recorded_parts"},
    {"recorder"},
    {"rehearsal"},
    {"recordings"},
    {"cache"},
    {"reference", "fused"},
    {"backends", "call_checks", "flat_arguments"},
    {"dispatch"},
    {"selected_dispatch"},
    {"linears", "plain_modules"},
    {"compressor", "cached_layer", "layer_checks"},
    {"layer_compression", "recorded_layer", "whole_layer"},
    {"distributed"},
    {"layers", "integrations", "transformers"},
    {"__init__"},
    {"__main__"},
]
"""Modules and packages of nsa, those that import nothing of it first."""


@cache
def imports(path: Path) -> set[str]:
    """The modules that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "nsa":
            names |= {f"nsa.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def imported_modules(path: Path) -> set[str]:
    """The modules and packages of nsa that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("nsa.")}


def test_files_have_a_name_of_their_own():
    """A stage has the same name in both backends, and no other file has it."""
    places = defaultdict(set)
    for path in (ROOT / "nsa").rglob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            places[path.stem].add(str(path.parent.relative_to(ROOT)))
    assert len(places) > 150
    backends = {"nsa/reference", "nsa/fused"}
    twice = {name: found for name, found in places.items() if len(found) > 1 and found != backends}
    assert not twice


def test_classes_have_a_name_of_their_own():
    """Private ones of kernels' files, as ``_Tensors``, are words of a file alone."""
    names = Counter(
        node.name
        for path in (ROOT / "nsa").rglob("*.py")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
        if not (node.name.startswith("_") and "kernels" in path.parts)
    )
    assert len(names) > 200
    assert not {name for name, count in names.items() if count > 1}


def test_one_file_imports_flash_attention():
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "nsa").rglob("*.py")
        if {"flash_attn", "quack"} & {name.split(".")[0] for name in imports(path)}
    }
    assert files == {"nsa/fused/kernels/hopper.py"}


def test_no_arrow_points_up():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in (ROOT / "nsa").rglob("*.py"):
        own = path.relative_to(ROOT / "nsa").parts[0].removesuffix(".py")
        for name in imported_modules(path) - {own}:
            assert rank[name] < rank[own], f"{path} imports nsa.{name}"
