"""tools/train_lm.py under torchrun: the losses of one process, on any number of ranks."""

import csv
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import train_lm
from tests.helpers.forked import run_python

ROOT = Path(__file__).resolve().parents[2]
# Each of 2 ranks has two pieces of a tile.
OPTIONS = ["--attention", "nsa", "--context", "128", "--batch-size", "2", "--log-every", "1"]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return path


FORKED = ("--start-method", "fork", "--run-path")
"""Ranks fork from torchrun, which has imported PyTorch; what one raises is then not printed."""


def torchrun(
    ranks: int, event: str, *options: str, start: Sequence[str] = FORKED
) -> subprocess.CompletedProcess:
    script = ROOT / "tests" / "tools" / "parallel_training.py"
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"
    )
    return run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
        *start, script, event, *options, folder=ROOT, environment=environment,
    )  # fmt: skip


def losses(path: Path) -> list[tuple[float, float]]:
    with open(path) as file:
        return [(float(r["train_loss"]), float(r["heldout_loss"])) for r in csv.DictReader(file)]


@pytest.mark.unmeasured
def test_stopped_and_resumed_on_other_ranks_equals_one_process(text, tmp_path, monkeypatch):
    options = [*OPTIONS, "--text", str(text), "--steps", "5"]
    monkeypatch.setattr(train_lm, "SAMPLE_BYTES", 2)
    assert train_lm.main([*options, "--output", str(tmp_path / "one")]) == 0
    torch.use_deterministic_algorithms(False)
    options += ["--output", str(tmp_path / "many")]
    # An earlier run had more steps.
    for step in (7, 9):
        (tmp_path / "many" / "nsa" / f"step-{step}").mkdir(parents=True)
    # Only rank 1 gets the signal.
    stopped = torchrun(2, "signal", *options, "--context-parallel", "2", "--fresh")
    assert stopped.returncode != 0
    assert stopped.stdout.count("interrupted; the same command continues") == 1
    assert [path.name for path in (tmp_path / "many" / "nsa").iterdir()] == ["step-3"]
    assert len(losses(tmp_path / "many" / "nsa.csv")) == 3
    resumed = torchrun(1, "nothing", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "nsa after step 3" in resumed.stdout
    expected, found = (losses(tmp_path / name / "nsa.csv") for name in ("one", "many"))
    assert len(found) == 5
    for row, other in zip(expected, found, strict=True):
        assert other == pytest.approx(row, rel=1e-4)


@pytest.mark.unmeasured
def test_a_rank_that_dies_ends_the_run(text, tmp_path):
    """The batch is shared here, and not the sequences."""
    options = [*OPTIONS, "--text", str(text), "--steps", "5", "--output", str(tmp_path / "many")]
    died = torchrun(2, "death", *options, start=())
    assert died.returncode != 0
    assert "rank 1 is ill" in died.stderr
    assert "rank      : 1 " in died.stderr


def test_one_process_cannot_share_a_sequence(text, tmp_path, capsys):
    options = [*OPTIONS, "--text", str(text), "--output", str(tmp_path)]
    assert train_lm.main([*options, "--context-parallel", "2"]) == 2
    assert "--context-parallel=2 needs several processes: use torchrun" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_lm.main(["--context-parallel", "2"])
    assert "--context-parallel needs --attention nsa, got both" in capsys.readouterr().err
