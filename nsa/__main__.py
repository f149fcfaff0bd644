"""``python -m nsa``: versions, devices, and what the fused backend can do here and why not.

It prints plain text and runs no kernel. Please add it to reports of problems.
"""

import platform
import re
from importlib import metadata

import torch

import nsa
from nsa.fused import fa4

CONFIGS = {"NSAConfig()": nsa.NSAConfig(), "NSAConfig.paper()": nsa.NSAConfig.paper()}

_FUSED = re.compile(r"""([\w.-]+)(?:==([\w.]+))?.*extra == ["']fused["']""")


def main():
    """Print the report."""
    print("\n".join(report()))


def report() -> list[str]:
    """The lines of the report."""
    lines = [
        f"nsa {nsa.__version__}",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"PyTorch {torch.__version__}, built for {_build()}",
        "",
        "Packages of the extra `fused`:",
        *_indented(package_lines()),
    ]
    for device in devices():
        lines += ["", f"{device}: {describe(device)}", *_indented(backend_lines(device))]
    if len(devices()) == 1:
        lines += ["", f"no CUDA device: {_why_no_cuda()}"]
    return lines


def package_lines() -> list[str]:
    """A line for each package of the extra ``fused``: its version, and another that is tested."""
    pins = _pins()
    if not pins:
        return ["unknown: this copy of nsa was not installed by pip"]
    lines = []
    for name, pin in pins.items():
        version = _version(name) or "not installed"
        wanted = "" if pin in ("", version) else f" (tested with {pin})"
        lines.append(f"{name} {version}{wanted}")
    return lines


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def describe(device: torch.device) -> str:
    """Name and size of a device."""
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    gib = found.total_memory / 2**30
    return f"{found.name}, compute capability {found.major}.{found.minor}, {gib:.0f} GiB"


def backend_lines(device: torch.device) -> list[str]:
    """What ``backend="auto"`` uses for 16-bit inputs on a device, and why not the other."""
    try:
        q = torch.empty(1, 64, 4, 128, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:  # a full or broken device, which the rest of the report outlives
        return [f"cannot be used: {str(error).splitlines()[0]}"]
    lines = [f"{x}: {nsa.explain_backend(q, q, q, config=config)}" for x, config in CONFIGS.items()]
    problem = fa4.version_problem()
    if problem and not any(problem in line for line in lines):
        lines.append(f"also missing: {problem}")
    return lines


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this PyTorch is built for {_build()}"
    return "PyTorch finds no GPU or no driver; see nvidia-smi and CUDA_VISIBLE_DEVICES"


def _build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU"


def _pins() -> dict[str, str]:
    """Packages of the extra ``fused`` and their pinned versions ("" if not pinned)."""
    requirements = metadata.requires("nsa") if _version("nsa") else []
    found = (_FUSED.match(x) for x in requirements or [])
    return {match[1]: match[2] or "" for match in found if match}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


if __name__ == "__main__":
    main()
