"""The rules of precision that both backends share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 for 16-bit inputs, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast, so that the dtypes of the inputs alone set the precision."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; None without autocast."""
    # Not is_autocast_available: torch.compile of PyTorch 2.11 does not know it.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


# The dtypes that autocast casts. float64 is not one.
_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def autocast_tensors(*tensors):
    """Cast the arguments of a call to the autocast dtype, if autocast is on and dtypes differ.

    Arguments are tensors, tuples of tensors, or None. If any is something else, or has another
    dtype than those above, none is cast.
    """
    q = tensors[0]
    dtype = autocast_dtype(q.device) if isinstance(q, Tensor) else None
    if dtype is None:
        return tensors
    flat = [x for part in tensors for x in (part if isinstance(part, (tuple, list)) else (part,))]
    dtypes = {x.dtype if isinstance(x, Tensor) else None for x in flat if x is not None}
    if len(dtypes) < 2 or not dtypes.issubset(_AUTOCAST_DTYPES):
        return tensors

    def cast(part):
        if not isinstance(part, (tuple, list)):
            return None if part is None else part.to(dtype)
        if all(x is part[0] for x in part):
            # One tensor for all branches stays one tensor.
            return (part[0].to(dtype),) * len(part)
        return tuple(x.to(dtype) for x in part)

    return tuple(map(cast, tensors))
