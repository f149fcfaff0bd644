"""Native Sparse Attention (https://arxiv.org/abs/2502.11089) for training and inference."""

from importlib import import_module

from nsa.cache import Cache
from nsa.config import NSAConfig
from nsa.dispatch import explain_backend, forward, select_blocks
from nsa.layers import NativeSparseAttention
from nsa.packing import Packing
from nsa.selected_dispatch import selected_attention
from nsa.validation import UnsupportedError

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "NSAConfig",
    "NativeSparseAttention",
    "Packing",
    "UnsupportedError",
    "explain_backend",
    "forward",
    "select_blocks",
    "selected_attention",
]


def __getattr__(name: str):
    # At first use, because they import torch.distributed and transformers.
    if name in ("distributed", "integrations", "transformers"):
        return import_module(f"nsa.{name}")
    raise AttributeError(f"module 'nsa' has no attribute {name!r}")
