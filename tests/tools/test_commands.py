"""The scripts around the library: what ``make`` and CI install and run, with stand-ins for both."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from nsa.fused import fa4

ROOT = Path(__file__).resolve().parents[2]

# It notes its arguments, and "makes" a virtual environment with itself in it.
PYTHON = """\
#!/bin/sh
echo "$@" >>"$NOTES"
[ "$1 $2" != "-m venv" ] || { mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; }
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def installed(tmp_path: Path, gpu: bool, **environment: str) -> list[str]:
    """What ``setup_venv.sh`` asks pip for, in order."""
    python = script(tmp_path / "python", PYTHON)
    script(tmp_path / "nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")
    script(tmp_path / "uname", "#!/bin/sh\necho Linux\n")
    given = dict(
        PYTHON=str(python), NOTES=str(tmp_path / "notes"), PATH=f"{tmp_path}:/usr/bin:/bin"
    )
    inherited = {name: x for name, x in os.environ.items() if name != "TORCH_VERSION"}
    command = [ROOT / "tools" / "setup_venv.sh", tmp_path / "venv", "test,lint"]
    subprocess.run(command, env=inherited | given | environment, check=True, capture_output=True)
    notes = (tmp_path / "notes").read_text()
    return re.findall(r"pip install .*? (torch==\S+(?: --editable \S+)?)$", notes, re.MULTILINE)


@pytest.mark.parametrize("version", [None, "2.12.0"])
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_the_pytorch_that_results_are_of_is_installed(gpu, version, tmp_path):
    environment = {} if version is None else dict(TORCH_VERSION=version)
    torch = f"torch=={version or '2.11.0'}" if gpu else f"torch=={version or '2.13.0'}+cpu"
    extras = "test,lint,fused" if gpu else "test,lint"
    expected = [torch, f"{torch} --editable .[{extras}]"]
    assert installed(tmp_path, gpu, **environment) == expected


def make(target: str, **environment: str) -> str:
    """The commands that a target would run in a virtual environment that exists."""
    command = ["make", "--dry-run", "--no-print-directory", "-o", "venv/.installed", target]
    inherited = {n: x for n, x in os.environ.items() if n not in ("EXTRAS", "MAKEFLAGS", "TOOL")}
    result = subprocess.run(
        [*command, "VENV=venv"],
        cwd=ROOT, env=inherited | environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return result.stdout


def test_gpu_tests_require_a_gpu_and_show_their_seed():
    command = make("test-gpu")
    assert command.startswith('NSA_REQUIRE_GPU=1 venv/bin/python -m pytest -m "gpu and not large"')
    # It hides the header.
    assert " -q" not in command
    assert "NSA_REQUIRE_GPU" not in make("test")


@pytest.mark.parametrize(
    ("tool", "run"), [({}, "memcheck racecheck"), (dict(TOOL="racecheck"),) * 2]
)
def test_the_sanitizer_to_run_can_be_chosen(tool, run):
    run = tool.get("TOOL", run)
    assert make("sanitize", **tool) == f"venv/bin/python tools/sanitize.py {run}\n"


def test_ci_tests_with_the_fused_extra():
    """A CPU runs tests of what calls its packages; CI fails where they cannot."""
    ci = (ROOT / ".ci" / "run").read_text()
    tests = ci.index("\nmake test\n")
    assert ci.index("export EXTRAS=test,tools,lint,docs,release,transformers,fused") < tests
    assert ci.index("export CI=true") < tests
    assert f"flash-attn-4=={fa4.WRITTEN_FOR}" in (ROOT / "pyproject.toml").read_text()
