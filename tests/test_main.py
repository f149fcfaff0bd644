"""``python -m nsa`` prints what a report of a problem needs."""

from pathlib import Path

import pytest
import torch

import nsa
from nsa import __main__ as command
from nsa.fused import constraints, fa4
from tests.helpers.forked import run_python

ROOT = Path(__file__).resolve().parents[1]


def test_the_command_prints_versions_devices_and_backends():
    result = run_python("-m", "nsa", folder=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"nsa {nsa.__version__}\n")
    assert f"PyTorch {torch.__version__}" in result.stdout
    assert "\ncpu: " in result.stdout
    for name in command.CONFIGS:
        assert f"{name}: backend: reference (fused cannot do this: it needs a CUDA" in result.stdout


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "built for the CPU"), ("13.0", "no GPU or no driver")]
)
def test_it_says_why_there_is_no_gpu(cuda, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert reason in command.report()[-1]


def test_it_says_what_the_fused_backend_can_do(monkeypatch):
    monkeypatch.setattr(constraints, "_device_limit", lambda *_: None)
    monkeypatch.setattr(fa4, "version_problem", lambda: None)
    for line in command.backend_lines(torch.device("cpu")):
        assert line.endswith("backend: fused (fused can do this)")


def test_it_names_a_missing_package_even_where_the_device_is_the_first_reason(monkeypatch):
    monkeypatch.setattr(fa4, "version_problem", lambda: "FlashAttention-4 is not installed")
    lines = command.backend_lines(torch.device("cpu"))
    assert lines[-1] == "also missing: FlashAttention-4 is not installed"


def test_a_device_that_fails_is_a_line_of_the_report(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(torch, "empty", fail)
    lines = command.backend_lines(torch.device("cpu"))
    assert lines == ["cannot be used: CUDA error: out of memory"]


def test_versions_stand_beside_those_that_are_tested(monkeypatch):
    requirements = [
        "torch>=2.11",
        'flash-attn-4==4.0.0b36; extra == "fused"',
        'nvidia-cutlass-dsl==4.8.1; extra == "fused"',
        'triton; extra == "fused"',
        'ruff==1.0; extra == "lint"',
    ]
    versions = {"nsa": "1.0", "flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.0"}
    monkeypatch.setattr(command.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(command, "_version", versions.get)
    assert command.package_lines() == [
        "flash-attn-4 4.0.0b36",
        "nvidia-cutlass-dsl 4.8.0 (tested with 4.8.1)",
        "triton not installed",
    ]
    del versions["nsa"]
    assert command.package_lines() == ["unknown: this copy of nsa was not installed by pip"]
