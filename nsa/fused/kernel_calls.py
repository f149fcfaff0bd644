"""The one file that calls our own CuTe DSL kernels, as ``fa4`` is for FA4's.

A kernel file is imported on its first call, because CuTe takes seconds to import. Callers write
``kernel_calls.gating_forward(...)``, so that a test can replace the functions of this module.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


@cache
def _kernels(name: str) -> ModuleType:
    return import_module(f"nsa.fused.kernels.{name}")


def gating_forward(*args) -> Tensor:
    """See :func:`nsa.fused.kernels.gates.gating_forward`."""
    return _kernels("gates").gating_forward(*args)


def gating_backward(*args) -> tuple[Tensor | None, ...]:
    """See :func:`nsa.fused.kernels.gates.gating_backward`."""
    return _kernels("gates").gating_backward(*args)


def query_gradient(*args) -> Tensor:
    """See :func:`nsa.fused.kernels.query_gradient.query_gradient`."""
    return _kernels("query_gradient").query_gradient(*args)


def mean_forward(*args, **kwargs) -> Tensor:
    """See :func:`nsa.fused.kernels.means.mean_forward`."""
    return _kernels("means").mean_forward(*args, **kwargs)


def mean_backward(*args) -> tuple[Tensor, Tensor]:
    """See :func:`nsa.fused.kernels.means.mean_backward`."""
    return _kernels("means").mean_backward(*args)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of ``x``, 0 where -1: a mean over blocks of one.

    Args:
        x: ``(B, T, H, D)``, D a multiple of 8.
        index: int32 ``(B * R,)``, rows of ``(B * T, H, D)``.

    Returns:
        ``(B, R, H, D)`` in the dtype of ``x``.
    """
    return mean_forward(x, index, 1, x.dtype)


def list_key_blocks(*args) -> tuple[Tensor | None, ...]:
    """See :func:`nsa.fused.kernels.lists.list_key_blocks`."""
    return _kernels("lists").list_key_blocks(*args)


def count_query_tiles(*args) -> Tensor:
    """See :func:`nsa.fused.kernels.lists.count_query_tiles`."""
    return _kernels("lists").count_query_tiles(*args)


def list_query_tiles(*args) -> tuple[Tensor, Tensor]:
    """See :func:`nsa.fused.kernels.lists.list_query_tiles`."""
    return _kernels("lists").list_query_tiles(*args)


def listed_backward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nsa.fused.kernels.listed_backward.listed_backward`."""
    return _kernels("listed_backward").listed_backward(*args)


def importance_scores(*args) -> None:
    """See :func:`nsa.fused.kernels.importance.importance_scores`."""
    _kernels("importance").importance_scores(*args)


def selected_forward(*args) -> tuple[Tensor, Tensor]:
    """See :func:`nsa.fused.kernels.selected_forward.selected_forward`."""
    return _kernels("selected_forward").selected_forward(*args)


def selected_backward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nsa.fused.kernels.selected_backward.selected_backward`."""
    return _kernels("selected_backward").selected_backward(*args)


def top_blocks(*args, **kwargs) -> None:
    """See :func:`nsa.fused.kernels.top_blocks.top_blocks`."""
    _kernels("top_blocks").top_blocks(*args, **kwargs)


def float32_products(a: Tensor, b: Tensor) -> Tensor:
    """``a (X, R, K) @ b (X, K, W)`` of bfloat16, summed and returned in float32.

    No kernel of ours, but PyTorch has this product on a GPU only.
    """
    return torch.bmm(a, b, out_dtype=torch.float32)
