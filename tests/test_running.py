"""How the tests run: examples and their seed, and what may be skipped. In runs of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa.fused import fa4
from tests.helpers import profiles, requirements
from tests.helpers.forked import run_python

TESTS = Path(__file__).parent

CODE = """
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tests.helpers import requirements
from tests.helpers.profiles import gpu_property

REASON = requirements.missing_gpu()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["one", "two", "three", "four"])
def test_draws(name):
    drawn = []

    @gpu_property(name, 3)
    @given(number=st.integers(0, 10**9))
    def check(number):
        drawn.append(number)

    check()
    Path(os.environ["DRAWN"], name).write_text(str(drawn))
    assert name != "four", "fails"


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_kernel():
    pass
"""


def run(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``CODE`` with the repository's configuration and conftest, on no GPU."""
    (tmp_path / "test_it.py").write_text(CODE)
    own = ("PYTEST_", "COV_", "CI", profiles.SEED, requirements.REQUIRE_GPU)
    inherited = {name: x for name, x in os.environ.items() if not name.startswith(own)}
    given = dict(PYTHONPATH=str(TESTS.parent), DRAWN=str(tmp_path))
    return run_python(
        "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path,
        "-c", TESTS.parent / "pyproject.toml", "-W", "ignore:Module already imported", *options,
        "test_it.py",
        folder=tmp_path, environment=inherited | given | environment,
    )  # fmt: skip


def draw(tmp_path: Path, *options: str, **environment: str) -> tuple[str, dict[str, str]]:
    """The seed that a run prints, and what each of its tests drew."""
    result = run(tmp_path, "-rs", *options, **environment)
    assert "1 failed, 3 passed, 1 skipped" in result.stdout, result.stdout + result.stderr
    assert "needs an NVIDIA GPU" in result.stdout
    (header,) = re.findall(r"GPU property tests draw from NSA_SEED=(\w+)", result.stdout)
    (failure,) = re.findall(r"NSA_SEED=(\w+) draws the same examples again", result.stdout)
    assert header == failure
    drawn = {x: (tmp_path / x).read_text() for x in ("one", "two", "three", "four")}
    assert len(set(drawn.values())) == 4, "each test draws its own"
    return header, drawn


@pytest.mark.unmeasured
def test_gpu_property_tests_draw_from_a_seed_that_can_be_given(tmp_path):
    seed, drawn = draw(tmp_path, "-n1")
    assert draw(tmp_path, "-n0", NSA_SEED=seed) == (seed, drawn)


def test_without_a_seed_each_run_has_its_own(monkeypatch):
    seeds = set()
    for _ in range(3):
        monkeypatch.delenv(profiles.SEED, raising=False)
        profiles.choose_seed()
        seeds.add(profiles.seed_line())
    assert len(seeds) == 3


def test_a_run_that_requires_a_gpu_fails_without_one(tmp_path):
    failed = run(tmp_path, "-n2", NSA_REQUIRE_GPU="1")
    assert failed.returncode == pytest.ExitCode.USAGE_ERROR
    assert "every GPU test would be skipped: needs an NVIDIA GPU" in failed.stderr


@pytest.mark.parametrize(
    ("available", "capability", "version", "reason"),
    [
        (False, None, fa4.WRITTEN_FOR, "needs an NVIDIA GPU"),
        (True, (8, 0), fa4.WRITTEN_FOR, "needs compute capability 9.0"),
        (True, (9, 0), "4.0.0b35", "flash-attn-4 is 4.0.0b35"),
        (True, (9, 0), None, "FlashAttention-4 is not installed"),
        (True, (9, 0), fa4.WRITTEN_FOR, None),
    ],
)
def test_what_a_required_gpu_lacks(available, capability, version, reason, monkeypatch):
    def installed(_):
        if version is None:
            raise fa4.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(fa4.metadata, "version", installed)
    monkeypatch.setattr(fa4, "version_problem", fa4._version_problem.__wrapped__)
    monkeypatch.setenv(requirements.REQUIRE_GPU, "1")
    if reason is None:
        requirements.check_gpu()
    else:
        with pytest.raises(pytest.UsageError, match=reason):
            requirements.check_gpu()
    monkeypatch.delenv(requirements.REQUIRE_GPU)
    requirements.check_gpu()


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_without_the_fused_extra_tests_skip_but_in_ci(ci, outcome, monkeypatch):
    monkeypatch.setattr(requirements, "FUSED_PROBLEM", "not installed")
    monkeypatch.setenv("CI", ci)
    # Of either kind, because a skip that is not expected would skip this test.
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as raised:
        requirements.import_fused("json")
    assert raised.type is outcome
    assert "not installed" in str(raised.value)


@pytest.mark.parametrize("ci", ["true", ""])
def test_with_the_fused_extra_they_import_it(ci, monkeypatch):
    monkeypatch.setattr(requirements, "FUSED_PROBLEM", None)
    monkeypatch.setenv("CI", ci)
    assert requirements.import_fused("json").loads("1") == 1


def test_the_thorough_profile_tries_more():
    code = "from tests.helpers.profiles import examples; print(examples(20), examples(120))"
    counts = {}
    for profile in ("ci", "thorough"):
        environment = dict(os.environ, PYTHONPATH=str(TESTS.parent), HYPOTHESIS_PROFILE=profile)
        command = [sys.executable, "-c", code]
        counts[profile] = subprocess.check_output(command, env=environment, text=True).split()
    assert counts == dict(ci=["20", "120"], thorough=["333", "2000"])


def test_no_test_imports_a_test_and_no_two_have_one_name():
    """What two share is in tests/helpers."""
    own = {"__init__.py", "conftest.py"}  # names that Python and pytest give
    modules = [path for path in TESTS.rglob("*.py") if path.name not in own]
    assert len({path.name for path in modules}) == len(modules)
    imports = re.compile(r"^\s*(?:from|import) .*\btest_\w+", re.MULTILINE)
    assert not [path.name for path in modules if imports.search(path.read_text("utf-8"))]


def test_no_property_test_has_a_number_of_examples_of_its_own():
    """Such a number would be the same in every profile."""
    fixed = re.compile(r"max_examples=\d")
    found = [path.name for path in TESTS.rglob("*.py") if fixed.search(path.read_text("utf-8"))]
    assert set(found) <= {"profiles.py"}
