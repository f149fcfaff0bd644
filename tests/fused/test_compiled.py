"""Compiled kernels are kept on disk: a second process loads what the first one compiled."""

import os
import subprocess
import sys

import pytest
from requirements import import_fused

SCRIPT = """
import warnings
warnings.simplefilter("ignore")
import torch
from cutlass import cute
from nsa.fused.kernels import gating, top_blocks
compiled, compile = [], cute.compile
class Counted:
    def __call__(self, *arguments, **options):
        compiled.append(arguments[0])
        return compile(*arguments, **options)
cute.compile = Counted()
for _ in range(2):
    top_blocks.compile_top_blocks(16, 4)
    gating.compile_forward(torch.bfloat16, 64, "gates", (False, False))
print("compiled", len(compiled))
"""


def compiled_kernels(**environment) -> int:
    """How many kernels a new process compiles of the two that it needs."""
    target = {"CUDA_VISIBLE_DEVICES": "", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_ARCH": "90"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | target | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("compiled")[1])


@pytest.mark.filterwarnings("default")
def test_a_second_process_compiles_nothing(tmp_path):
    import_fused("quack.cache")
    folder = {"QUACK_CACHE_DIR": str(tmp_path)}
    assert compiled_kernels(**folder) == 2
    assert compiled_kernels(**folder) == 0
    # Of another GPU or with nothing kept, kernels are compiled.
    assert compiled_kernels(**folder, CUTE_DSL_ARCH="sm_100a") == 2
    assert compiled_kernels(**folder, QUACK_CACHE_ENABLED="0") == 2
