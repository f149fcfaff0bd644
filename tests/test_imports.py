"""The reference needs torch alone: fresh interpreters whose import system refuses or spies."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

BLOCK = """
import sys

PACKAGES = {"flash_attn", "cutlass", "triton", "quack", "tvm_ffi", "cuda", "transformers"}

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Finder())
"""

USE = """
import runpy

import torch
import nsa

for config in (nsa.NSAConfig(), nsa.NSAConfig.paper()):
    q = torch.randn(1, 300, 4, 16, requires_grad=True)
    k, v = (torch.randn(1, 300, 2, 16, requires_grad=True) for _ in range(2))
    nsa.forward(q, k, v, config=config).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert nsa.select_blocks(q, k, config=config).dtype == torch.int32
    assert "reference" in nsa.explain_backend(q, k, v, config=config)
    try:
        nsa.forward(q, k, v, config=config, backend="fused")
    except nsa.UnsupportedError:
        pass
    else:
        raise AssertionError("the fused backend cannot have run")
runpy.run_module("nsa", run_name="__main__")
print("done")
"""

# Stand-ins that exist, so that importing them by mistake succeeds and shows.
PRESENT = """
import importlib.machinery
import sys

PACKAGES = {"flash_attn", "cutlass", "quack", "tvm_ffi", "transformers"}
asked = []

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            asked.append(name)
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__path__ = []

import torch

sys.meta_path.insert(0, Finder())
before = set(sys.modules)
import nsa

assert not asked, asked
added = {name for name in set(sys.modules) - before if name.startswith("torch.distributed")}
assert not added, added
assert "nsa.distributed" not in sys.modules
assert nsa.distributed.forward.__module__ == "nsa.distributed.interface"
try:
    nsa.distribute
except AttributeError as error:
    assert "'distribute'" in str(error)
else:
    raise AssertionError("nsa has no such attribute")
print("done")
"""


def _run(code: str):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("done")


def test_the_reference_runs_where_every_optional_package_is_absent():
    _run(BLOCK + USE)


def test_import_leaves_optional_packages_and_torch_distributed_alone():
    """The packages where they are present, and torch.distributed until its first use."""
    _run(PRESENT)
