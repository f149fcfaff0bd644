"""What a machine lacks for some tests, and when that fails tests instead of skipping them.

NSA_REQUIRE_GPU=1 (``make test-gpu``) fails a run whose GPU tests would all be skipped. CI=true
fails tests that need the extras ``fused`` and ``transformers`` where they are not installed.
"""

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import pytest
import torch

from nsa.fused import fa4

REQUIRE_GPU = "NSA_REQUIRE_GPU"

FUSED_PROBLEM = fa4.version_problem()
"""Why the extra ``fused`` cannot be used; read here, before a fixture says that it can."""


def missing_gpu() -> str | None:
    """Why this machine cannot run the fused kernels, or None."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "needs compute capability 9.0"
    return fa4.version_problem()


def check_gpu() -> None:
    """Stop the run where the environment requires a GPU and the kernels cannot run."""
    if os.environ.get(REQUIRE_GPU) != "1":
        return
    reason = missing_gpu()
    if reason is not None:
        raise pytest.UsageError(f"{REQUIRE_GPU}=1, but every GPU test would be skipped: {reason}")


def import_transformers() -> ModuleType:
    """``nsa.transformers``; skip without the extra ``transformers``, or fail in CI."""
    if importlib.util.find_spec("transformers") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI installs the extra `transformers`", pytrace=False)
        pytest.skip("transformers is not installed", allow_module_level=True)
    with warnings.catch_warnings():
        # It warns about packages of its own.
        warnings.simplefilter("ignore")
        return importlib.import_module("nsa.transformers")


def import_fused(name: str) -> ModuleType:
    """Import a module that needs the extra ``fused``; skip without it, or fail in CI."""
    if os.environ.get("CI") == "true":
        if FUSED_PROBLEM is not None:
            pytest.fail(f"CI installs the extra `fused`: {FUSED_PROBLEM}", pytrace=False)
    elif FUSED_PROBLEM is not None:
        pytest.skip(FUSED_PROBLEM, allow_module_level=True)
    with warnings.catch_warnings():
        # FA4 and the DSL warn about themselves.
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
