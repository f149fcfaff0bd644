"""``make sanitize``, as far as a CPU can tell: what it runs, and how it judges what tools say."""

import re
import subprocess
import sys

import pytest

import sanitize

CLEAN = """\
========= COMPUTE-SANITIZER
all steps ran
========= ERROR SUMMARY: 0 errors
"""
BAD_ACCESS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at ours+0x70 in gating.py:7
=========     by thread (0,0,0) in block (0,0,0)
=========
all steps ran
========= ERROR SUMMARY: 1 error
"""
FA4 = "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at_"
RACE = """\
========= Error: Race reported between Write access at {0}+0x430
=========     and Read access at {0}+0x770 [248 hazards]
=========     and Read access at {0}+0x7a0 [248 hazards]
=========
"""
RACES = (
    "all steps ran\n{}========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"
)


def races(*kernels: str) -> str:
    count = len(kernels)
    return RACES.format("".join(map(RACE.format, kernels)), count, count)


@pytest.mark.parametrize(
    ("tool", "said", "passed", "counts"),
    [
        ("memcheck", CLEAN, True, (0, 0)),
        ("memcheck", BAD_ACCESS, False, (1, 0)),
        ("racecheck", races(), True, (0, 0)),
        ("racecheck", races(FA4, FA4), True, (0, 2)),
        ("racecheck", races(FA4, "ours"), False, (1, 1)),
        ("racecheck", races("nvjet_sm90_tst_64x8_64x16_2x4_h_badd_TNT", FA4), True, (0, 2)),
        ("racecheck", races("ours_nvjet_sm90_"), False, (1, 0)),
        # It does not excuse what another tool says.
        ("memcheck", BAD_ACCESS.replace("ours", FA4), False, (1, 0)),
    ],
)
def test_errors_fail_but_for_known_races(tool, said, passed, counts):
    verdict = sanitize.judge(tool, said, 0)
    assert verdict.passed == passed
    assert (len(verdict.reports), len(verdict.known)) == counts
    assert ("passed" if passed else "FAILED") in sanitize.describe(tool, verdict)[-1]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (CLEAN.replace(sanitize.DONE, "Segmentation fault"), r"not come to their end .* code 139"),
        (CLEAN.replace("ERROR SUMMARY: 0 errors", "Device not supported"), "no summary"),
        (CLEAN.replace("0 errors", "3 errors"), "counts 3 errors, of which 0"),
    ],
)
def test_what_was_not_checked_fails(said, reason):
    verdict = sanitize.judge("memcheck", said, 139)
    assert not verdict.passed
    assert re.search(reason, verdict.failure)


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    """A compute-sanitizer that says what a file of the tool's name has, and notes its command."""
    script = tmp_path / "compute-sanitizer"
    script.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/commands"\ncat "{tmp_path}/$2"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitize, "require_gpu", lambda: None)
    monkeypatch.setattr(sanitize, "step_command", lambda: [sys.executable, "-c", "pass"])
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "tools"),
    [([], ["memcheck", "racecheck"]), (["racecheck"], ["racecheck"])],
)
def test_each_tool_runs_and_is_summed_up(arguments, tools, fake_sanitizer, capsys):
    (fake_sanitizer / "memcheck").write_text(CLEAN)
    (fake_sanitizer / "racecheck").write_text(races(FA4, "ours"))
    with pytest.raises(SystemExit) as stop:
        sanitize.main([*arguments, "--output", str(fake_sanitizer / "logs")])
    assert stop.value.code == 1
    commands = (fake_sanitizer / "commands").read_text().splitlines()
    assert [command.split()[1] for command in commands] == tools
    printed = capsys.readouterr().out
    assert "racecheck: FAILED, 1 reports, 1 about known kernels of others" in printed
    assert "Race reported between Write access at ours+0x430" in printed
    assert (fake_sanitizer / "logs" / "racecheck.log").read_text() == races(FA4, "ours")


def test_no_errors_exit_with_0(fake_sanitizer):
    (fake_sanitizer / "memcheck").write_text(CLEAN)
    with pytest.raises(SystemExit) as stop:
        sanitize.main(["memcheck", "--output", str(fake_sanitizer / "logs")])
    assert stop.value.code == 0


def test_steps_that_fail_by_themselves_are_not_sanitized(fake_sanitizer, monkeypatch):
    monkeypatch.setattr(sanitize, "step_command", lambda: [sys.executable, "-c", "exit(1)"])
    with pytest.raises(SystemExit, match="fail under no tool"):
        sanitize.main(["--output", str(fake_sanitizer / "logs")])
    assert not (fake_sanitizer / "commands").exists()


def test_the_steps_run_themselves():
    """By the command that the tools are given, here to print its help."""
    command = [*sanitize.step_command(), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "memcheck" in result.stdout


@pytest.mark.usefixtures("fused_on_cpu")
def test_steps_to_sanitize_are_of_both_modes(capsys):
    sanitize.run_steps("cpu")
    assert capsys.readouterr().out == f"{sanitize.DONE}\n"
