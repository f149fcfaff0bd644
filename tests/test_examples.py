"""The scripts in examples/ run, each in a process of its own, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import run_python
from tests.helpers.requirements import missing_gpu

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NAMES = (
    "compile_and_graph",
    "convert_llama",
    "generate",
    "look_at_selection",
    "packed_batch",
    "transformer_block",
)

on_gpu = pytest.mark.parametrize(
    "gpu",
    [
        False,
        pytest.param(
            True,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(missing_gpu() is not None, reason=str(missing_gpu())),
            ],
        ),
    ],
    ids=["cpu", "gpu"],
)


def run(name: str, folder: Path, gpu: bool, *options: str) -> str:
    """What an example prints."""
    command = (EXAMPLES / f"{name}.py", *options)
    if gpu:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        result = subprocess.run(
            [sys.executable, *command], cwd=folder, env=os.environ | dict(PYTHONPATH=path),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    else:
        result = run_python(*command, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def differences(printed: str) -> dict[str, float]:
    """The largest differences that an example prints, by what it compares."""
    found = re.findall(r"^(.*): largest difference (\S+)", printed, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_every_example_is_tested():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_examples_say_how_to_run_them_and_use_public_names(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"\n    python examples/{name}.py\n" in text
    assert "import nsa\n" in text
    assert not re.search(r"from nsa|import nsa\.(?!transformers\n)|nsa\._", text)


@on_gpu
def test_packed_batch(tmp_path, gpu):
    printed = run("packed_batch", tmp_path, gpu)
    assert "Packing(sequences=5, tokens=866, max_seqlen=500)" in printed
    rows = re.findall(r"^ *(\d+) +(\d\.\d+) +(\d\.\d+)$", printed, re.MULTILINE)
    assert [int(length) for length, *_ in rows] == [300, 0, 1, 65, 500]
    for _, packed, alone in rows:
        assert float(packed) == pytest.approx(float(alone), abs=0.01 if gpu else 1e-4)
    found = differences(printed)
    assert list(found) == ["output", "dq", "dk", "dv"]
    assert max(found.values()) < (0.05 if gpu else 1e-5)


@on_gpu
def test_transformer_block(tmp_path, gpu):
    losses = [float(x) for x in re.findall(r"loss (\S+)", run("transformer_block", tmp_path, gpu))]
    assert len(losses) == 5
    # Random logits add to log 16 = 2.77.
    assert 2.5 < losses[0] < 3.5
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.unmeasured
@on_gpu
def test_convert_llama(tmp_path, gpu):
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    printed = run("convert_llama", tmp_path, gpu, "--steps", "4", "--batch", "2")
    losses = re.findall(r"^(.*): (\S+) nats per byte$", printed, re.MULTILINE)
    assert [name for name, _ in losses] == [
        "dense, before the switch",
        "NSA, at the switch",
        "dense, trained on",
        "NSA, trained on",
    ]
    before, at, dense, after = (float(loss) for _, loss in losses)
    # A byte is one of 256: log 256 = 5.55.
    assert 4 < before < 5.5
    assert abs(at - before) < 0.1
    assert max(dense, after) < min(before, at)
    path = re.search(r"^wrote (.*)$", printed, re.MULTILINE)
    assert "no matplotlib" in printed if path is None else Path(path[1]).stat().st_size > 5000


@pytest.mark.unmeasured
@on_gpu
def test_compile_and_graph(tmp_path, gpu):
    printed = run("compile_and_graph", tmp_path, gpu)
    assert f"backend: {'fused' if gpu else 'reference'}" in printed
    assert ("skipped" in printed) == (not gpu)
    found = differences(printed)
    assert list(found)[:2] == ["compiled, 400 tokens", "compiled, 300 tokens"]
    assert any(name.startswith("CUDA graph") for name in found) == gpu
    assert max(found.values()) < (0.1 if gpu else 1e-5)


@on_gpu
def test_look_at_selection(tmp_path, gpu):
    printed = run("look_at_selection", tmp_path, gpu)
    rows = re.findall(r"^ *(\d+) ([#.]+)$", printed, re.MULTILINE)
    assert [int(token) for token, _ in rows] == list(range(63, 1024, 64))
    for block, (_, marks) in enumerate(rows):
        assert len(marks) == block + 1
        assert marks.count("#") == min(5, block + 1)
        assert marks[0] == marks[-1] == "#"
        if block < 5:
            continue
        # Two more than the first and the last two, of the row's topic where there are such.
        same = [marks[other] for other in range(1, block - 1) if other % 4 == block % 4]
        assert same.count("#") == min(2, len(same))
    path = re.search(r"^wrote (.*)$", printed, re.MULTILINE)
    if path is None:
        assert "no matplotlib" in printed
    else:
        assert Path(path[1]).read_bytes().startswith(b"\x89PNG")
        assert Path(path[1]).parent.parent.samefile(tmp_path)
    found = differences(printed)
    assert found["the same selection given"] < (0.05 if gpu else 1e-6)
    assert found["two blocks of my own"] > 0.1
