"""The machine and the versions of a measurement: the last columns of every table."""

import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

FIELDS = ("gpu", "host", "torch", "cuda", "flash_attn_4", "cutlass_dsl", "nsa_commit", "time")


def columns() -> dict[str, str]:
    """One value for each of ``FIELDS``; the time is now."""
    values = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        host(),
        torch.__version__,
        torch.version.cuda or "none",
        version("flash-attn-4"),
        version("nvidia-cutlass-dsl"),
        commit(),
        time.strftime("%Y-%m-%dT%H:%M:%S"),
    )
    return dict(zip(FIELDS, values, strict=True))


@cache
def host() -> str:
    """The processor and its number of cores, on which times without a CUDA graph depend."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} x {os.cpu_count()}"


def version(package: str) -> str:
    """The installed version of a package, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@cache
def commit() -> str:
    """The commit of this checkout, with "-dirty" if files differ; "unknown" outside of git.

    NSA_COMMIT overrides it, for a run on a copy of a checkout, where Git finds no repository or
    other files. Take its value from the checkout, with ``git describe --always --dirty``.
    """
    named = os.environ.get("NSA_COMMIT")
    if named:
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def require_gpu():
    """Exit with a message if the fused backend has no GPU to run on."""
    if not torch.cuda.is_available():
        sys.exit("this measures the fused backend and needs an NVIDIA GPU; PyTorch sees none")
