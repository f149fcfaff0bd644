"""Compiled kernels are kept on disk: a second process loads what the first one compiled."""

import os
from pathlib import Path

import pytest

import nsa
from tests.helpers.forked import run_python
from tests.helpers.requirements import import_fused

COUNT = """
import warnings
warnings.simplefilter("ignore")
import torch
from cutlass import cute
compiled, compile = [], cute.compile
class Counted:
    def __call__(self, *arguments, **options):
        compiled.append(arguments[0])
        return compile(*arguments, **options)
cute.compile = Counted()
{code}
print("compiled", len(compiled))
"""

ONE_KERNEL = """
from nsa.fused.kernels import gated_sum
for _ in range(2):
    gated_sum.compile_forward(torch.bfloat16, 64, "gates", (False, False))
"""

MASKS = """
from nsa.fused.fa4_variants import Mask, Variant
from nsa.fused.kernels import fa4_sm90
for ends in ((16, 31), (16, 0), (16, 31)):
    fa4_sm90.compile_forward(Variant(torch.bfloat16, 64, 64, 4, Mask(block_ends=ends)))
"""


def compiled_kernels(folder: Path, code: str = ONE_KERNEL, **environment) -> int:
    """How many kernels a new process compiles for ``code``."""
    script = folder / "count.py"
    script.write_text(COUNT.format(code=code))
    environment = os.environ | dict(CUTE_DSL_ARCH="sm_90a") | environment
    done = run_python(script, folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("compiled")[1])


@pytest.mark.unmeasured
@pytest.mark.filterwarnings("default")
def test_a_second_process_compiles_nothing(tmp_path):
    import_fused("quack.cache")
    folder = dict(folder=tmp_path, QUACK_CACHE_DIR=str(tmp_path / "kernels"))
    # FA4's kernels with our masks, of which there are two, and one of ours.
    assert [compiled_kernels(code=MASKS + ONE_KERNEL, **folder) for _ in range(2)] == [3, 0]
    # Of another GPU or with nothing kept, kernels are compiled.
    assert compiled_kernels(**folder, CUTE_DSL_ARCH="sm_100a") == 1
    assert compiled_kernels(**folder, QUACK_CACHE_ENABLED="0") == 1


@pytest.mark.filterwarnings("default")
def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path):
    import_fused("quack.cache")
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    assert compiled_kernels(tmp_path, QUACK_CACHE_DIR=str(no_folder / "kernels")) == 1


@pytest.mark.filterwarnings("default")
def test_kernels_of_other_sources_or_settings_are_others(tmp_path, monkeypatch):
    compiled = import_fused("nsa.fused.kernels.compiled")
    source = tmp_path / "kernel.py"
    monkeypatch.setattr(compiled, "_SOURCES", (tmp_path,))
    seen = set()
    for text, setting in (("a", "0"), ("b", "0"), ("b", "1")):
        source.write_text(text)
        monkeypatch.setenv("CUTE_DSL_LINEINFO", setting)
        compiled._fingerprint.cache_clear()
        seen.add(compiled._fingerprint())
    compiled._fingerprint.cache_clear()
    assert len(seen) == 3


def test_all_sources_of_the_package_count():
    """A kernel has numbers from outside of its folder in it, such as the weights of nsa.blocks."""
    compiled = import_fused("nsa.fused.kernels.compiled")
    assert Path(nsa.__file__).parent in compiled._SOURCES
