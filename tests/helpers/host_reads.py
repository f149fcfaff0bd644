"""A dispatch mode that finds what makes the host wait for values on a device."""

import sys
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nsa

PACKAGE, TESTS = Path(nsa.__file__).parent, Path(__file__).parents[1]

# What copies from the device, or has a size that depends on values; or, lift_fresh, copies a tensor
# of Python data to the device.
READS = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "lift_fresh", "masked_select",
    "nonzero", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Raises on a read that comes from the package, and not from an emulated kernel."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else ()
        masked = any(x is not None and x.dtype == torch.bool for x in indices)
        if (name in READS or masked) and _caller() == PACKAGE:
            raise AssertionError(f"{name} makes the host wait")
        return func(*args, **(kwargs or {}))


def _caller() -> Path:
    """Where the innermost file is, of the package or of the emulated kernels, that is being run."""
    frame = sys._getframe(2)
    while frame is not None:
        folder = _folder(frame.f_code.co_filename)
        if folder is not None:
            return folder
        frame = frame.f_back
    return TESTS


@cache
def _folder(name: str) -> Path | None:
    return next((x for x in (PACKAGE, TESTS) if Path(name).is_relative_to(x)), None)
