"""Options of several scripts."""

from argparse import ArgumentTypeError

import torch


def usable_device(text: str) -> str:
    """A device that PyTorch can use here, as the ``type`` of an argument."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError(f"needs an NVIDIA GPU, and PyTorch finds none, got {text!r}")
    return text


def usable_seed(text: str) -> int:
    """A seed that PyTorch's generators take, as the ``type`` of an argument."""
    seed = int(text)
    if not -(2**63) <= seed < 2**64:
        raise ArgumentTypeError(f"must lie in [-2**63, 2**64), got {text}")
    return seed
