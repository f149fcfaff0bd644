"""Calls of FlashAttention-4 (CuTe DSL) on Hopper.

Callers write ``fa4.dense_forward(...)``, so that tests can replace the functions of this module
with PyTorch, on a CPU and in any float dtype. For all of them:

- Query head ``h`` attends KV head ``h // (H / H_kv)``.
- ``scale`` multiplies ``q @ k^T``. Softmax is over the visible keys of a query. A query that sees
  none gets output 0 and ``lse`` -inf, and sends no gradient.
- ``lse`` is float32: the natural logarithm of the sum of ``exp(scale * q . k)`` over visible keys.
- Inputs may be strided (copied unless the last dimension is contiguous). A gradient has the layout
  of its input. Gradients of ``k`` and ``v`` are summed over the heads of a group.
- Forward gives the same bits each time. Backward adds into float32 in any order, unless it is
  ``deterministic``.
- Values that no query may see must still be finite: they are multiplied by 0, not skipped.
- Backward takes, of the forward's results, only ``statistics``: :class:`RowStatistics`. ``dout`` is
  the gradient of ``out``, or of what ``out`` is multiplied by a gate for; then the gate is in the
  statistics.

It is written for flash-attn-4 4.0.0b36 (``WRITTEN_FOR``) and uses its kernel classes for SM90,
because its functions take neither tiles nor buffers for results. :mod:`nsa.fused.fa4_variants` says
which kernel a call needs. :mod:`nsa.fused.kernels.fa4_sm90` compiles and calls it.

Head dimensions are 64, 96, 128 and 256, because backward is wrong or fails to compile at some
others. In backward, key blocks have 128 keys up to head dimension 128, and 64 keys above. Query
blocks are multiples of 64 queries, or of 128 at head dimension 64.
"""

import math
from functools import lru_cache
from importlib import import_module, metadata
from types import ModuleType

import torch
from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.fa4_call import Call, segment_tiles
from nsa.fused.fa4_lists import sparse_call
from nsa.fused.fa4_variants import Mask, Window, closing_fits, dense_mask
from nsa.fused.kernel_inputs import BlockLists, Pair, RowStatistics

WRITTEN_FOR = "4.0.0b36"


@torch.compiler.assume_constant_result
def version_problem() -> str | None:
    """Why FlashAttention-4 cannot be used here, with the remedy; None if it is as expected."""
    return _version_problem()


@lru_cache(maxsize=None)
def _version_problem() -> str | None:
    try:
        version = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return f"FlashAttention-4 is not installed; pip install flash-attn-4=={WRITTEN_FOR}"
    if version != WRITTEN_FOR:
        return (
            f"flash-attn-4 is {version} and its kernel classes are used as {WRITTEN_FOR} has "
            f"them; pip install flash-attn-4=={WRITTEN_FOR}"
        )
    return None


def dense_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window_size: Window,
    block_ends: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of batched or packed sequences, aligned at their ends.

    Query ``i`` of ``Sq`` has the position of key ``i + Sk - Sq``. Packed sequences may end before
    the tensors do; results past the end are not written, nor statistics read in backward.

    Args:
        q: ``(B, Sq, H, D)``, or ``(Tq, H, D)`` with ``cu_seqlens``; float16 or bfloat16.
        k: ``(B, Sk, H_kv, D)`` or ``(Tk, H_kv, D)``.
        v: ``(B, Sk, H_kv, Dv)`` or ``(Tk, H_kv, Dv)``.
        scale: see above.
        causal: no key after the query.
        window_size: keys visible to the (left, right) of a query beside its own; None is no bound.
        block_ends: (stride, first) instead of both: a query sees the keys ``j`` with
            ``j * stride + first`` at most its own index. No tile is skipped.
        cu_seqlens_q: int32 ``(S + 1,)``, and ``cu_seqlens_k`` likewise.
        out, lse: where to write the results, ``out`` with stride 1 in the last dimension; by
            default new.

    Returns:
        out: ``(B, Sq, H, Dv)`` or ``(Tq, H, Dv)`` in the dtype of ``q``.
        lse: float32 ``(B, H, Sq)`` or ``(H, Tq)``.
    """
    mask, window = dense_mask(causal, window_size, block_ends)
    bounds = (cu_seqlens_q, cu_seqlens_k)
    return _forward(Call(q, k, v, scale, mask, window, bounds), out, lse)


def forward_of_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    block_ends: tuple[int, int],
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dense_forward` of a batch with ``block_ends``, which skips tiles of keys.

    ``first`` of these is an argument of the kernel, which is compiled for the stride. A query that
    sees no key has an output of 0.
    """
    stride, first = block_ends
    mask = Mask(right=True, block_stride=stride)
    return _forward(Call(q, k, v, scale, mask, (None, first)), out, lse)


def closing_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: Pair,
    gates: Tensor | None,
    weight: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window_size: Window,
    keep: bool,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`dense_forward` of a batch, and :func:`nsa.fused.kernel_calls.gating_forward` with it.

    Both are one kernel where shared memory has room for it. Then the output is not rounded before
    it is added.

    Args:
        q, k, v, scale, causal, window_size, lse: of :func:`dense_forward`.
        others: outputs of the compressed and of the selected branch, ``(B, Sq, H, Dv)``.
        gates, weight, out: of ``gating_forward``.
        keep: whether the output of the attention is wanted too.

    Returns:
        The sum, ``out`` where it is given; the output of the attention, or None; its ``lse``.
    """
    mask, window = dense_mask(causal, window_size, None)
    call = _readable(Call(q, k, v, scale, mask, window))
    if not (q.numel() and v.numel() and closing_fits(call.variant())):
        attended, lse = _forward(call, None, lse)
        out = kernel_calls.gating_forward(*others, attended, q, gates, weight, out)
        return out, attended if keep else None, lse
    o_win = q.new_empty(q.shape) if keep else None
    out = q.new_empty(q.shape) if out is None else out
    lse = _new_lse(q) if lse is None else lse
    _closing().launch_closing(call, others, gates, weight, _no_leaf(out), o_win, lse)
    return out, o_win, lse


def dense_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    *,
    scale: float,
    causal: bool,
    window_size: Window,
    block_ends: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dq: Tensor | None = None,
    deterministic: bool = False,
    near_block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`dense_forward`; ``Dv == D`` where several heads share a KV head.

    Args:
        dout: gradient of ``out``, in its shape and dtype.
        q, k, v: arguments of :func:`dense_forward`; the rest as there.
        statistics: float32, in the shape of ``lse``, with any strides.
        dq: where to write the gradient of ``q``, with stride 1 in the last dimension.
        deterministic: give the same bits each time, in somewhat more time.
        near_block: keys of a block, a multiple of 64. Then ``statistics`` are ``(B, H, 3, rows)``:
            those for the keys of a query's own block, of the block before, and for all others.
            They are contiguous, ``rows`` is ``Sq`` rounded up to a multiple of 128, and P is 0
            in rows past ``Sq``. It needs a batch with a window, blocks that begin with the keys,
            queries whose positions begin at a multiple of 64, and head dimensions up to 128.

    Returns:
        dq, dk, dv: in the shapes and dtype of ``q``, ``k`` and ``v``.
    """
    mask, window = dense_mask(causal, window_size, block_ends)
    bounds = (cu_seqlens_q, cu_seqlens_k)
    call = Call(q, k, v, scale, mask, window, bounds, deterministic=deterministic)
    call = call._replace(near_block=near_block)
    return _backward(dout, call, statistics, dq)


def add_dense_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    query_sums: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window_size: Window = (None, None),
    block_ends: tuple[int, int] | None = None,
    deterministic: bool = False,
    near_block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dense_backward` of a batch, with the gradient of ``q`` added to float32 sums.

    Args:
        dout, q, k, v, statistics, scale, causal, window_size, deterministic, near_block: as there.
            The mask must skip tiles, so that all such calls have the sums in the same order.
        query_sums: :func:`nsa.fused.fa4_call.new_query_sums`, to which the gradient without the
            scale is added.
        block_ends: (stride, first) instead of the mask: a query sees the keys ``j`` with
            ``j * stride + first`` at most its own index, and tiles without such keys are skipped.
            A query that sees none needs an infinite log-sum-exp and a finite delta. There is one
            entry, and several heads share a KV head.

    Returns:
        dk, dv: in the shapes and dtype of ``k`` and ``v``.
    """
    if block_ends is None:
        mask, window = dense_mask(causal, window_size, None)
    else:
        stride, first = block_ends
        if q.shape[0] != 1 or q.shape[2] == k.shape[2]:
            shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
            raise ValueError(
                f"block_ends needs one entry and several heads a KV head, got {shapes}"
            )
        mask = Mask(left=True, right=True, block_stride=stride)
        window = (segment_tiles(q, k, deterministic), first)
    if not mask.skips_tiles:
        raise ValueError(
            "sums of queries need a mask that skips tiles, got one that shows all keys"
        )
    call = Call(q, k, v, scale, mask, window, deterministic=deterministic)
    call = _readable(call._replace(near_block=near_block))
    return _key_gradients(dout, call, statistics, None, query_sums)


def sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    causal: bool,
    key_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one row of tokens to the listed key blocks.

    Args:
        q: ``(1, Tq, H, D)``, float16 or bfloat16.
        k: ``(1, Tk, H_kv, D)``.
        v: ``(1, Tk, H_kv, Dv)``.
        lists: key blocks of each query block and head.
        scale: see above.
        causal: ``key <= query + Tk - Tq``; needs ``Tq <= Tk``, and excludes ``key_limit``.
        key_limit: int32 ``(Tq,)``: a query sees keys before it.

    Returns:
        out: ``(1, Tq, H, Dv)`` in the dtype of ``q``.
        lse: float32 ``(1, H, Tq)``.
    """
    return _forward(sparse_call(q, k, v, lists, scale, causal, key_limit), None, None)


def sparse_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    lists: BlockLists,
    *,
    scale: float,
    causal: bool,
    key_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`sparse_forward`; ``Dv == D`` where several heads share a KV head.

    Args:
        dout: gradient of ``out``, in its shape and dtype.
        q, k, v: arguments of :func:`sparse_forward`.
        statistics: float32, in the shape of ``lse``, with any strides.
        lists: the transpose of the forward's, with the same pairs: query blocks of each key block
            and head.
        scale, causal, key_limit: as in forward.

    Returns:
        dq, dk, dv: in the shapes and dtype of ``q``, ``k`` and ``v``.
    """
    call = sparse_call(q, k, v, lists, scale, causal, key_limit)
    return _backward(dout, call, statistics, None)


def _forward(call: Call, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    q, v = call.q, call.v
    if out is None:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if lse is None:
        lse = _new_lse(q)
    if q.numel() and v.numel():
        _kernels().launch_forward(_readable(call), _no_leaf(out), lse)
    else:
        out.zero_()
        lse.fill_(-math.inf)
    return out, lse


def _new_lse(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)


def _backward(
    dout: Tensor, call: Call, statistics: RowStatistics, dq: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    call = _readable(call)
    dq = torch.empty_like(call.q) if dq is None else dq
    return dq, *_key_gradients(dout, call, statistics, dq, None)


def _key_gradients(
    dout: Tensor,
    call: Call,
    statistics: RowStatistics,
    dq: Tensor | None,
    query_sums: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Those of a readable call. That of ``q`` is written to ``dq``, or added to ``query_sums``."""
    q, k, v = call[:3]
    if q.shape[-2] != k.shape[-2] and q.shape[-1] != v.shape[-1]:
        raise ValueError(
            "backward with several query heads a KV head needs q and v of one head dimension, got "
            f"{q.shape[-1]} and {v.shape[-1]}: pad the smaller with zeros"
        )
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    if q.numel() and k.numel():
        grads = (dq, dk, dv)
        _kernels().launch_backward(_aligned(dout), call, statistics, grads, query_sums)
        return dk, dv
    for grad in (dq, dk, dv):
        if grad is not None:
            grad.zero_()
    return dk, dv


@lru_cache(maxsize=None)
def _kernels() -> ModuleType:
    # Imported on the first call, because this takes seconds and needs CUDA libraries.
    return import_module("nsa.fused.kernels.fa4_sm90")


@lru_cache(maxsize=None)
def _closing() -> ModuleType:
    return import_module("nsa.fused.kernels.fa4_closing")


def _readable(call: Call) -> Call:
    """The call with inputs that the kernels can read, detached from autograd as DLPack requires."""
    q, k, v = _aligned(_no_leaf(call.q)), _aligned(_no_leaf(call.k)), _aligned(_no_leaf(call.v))
    if q is call.q and k is call.k and v is call.v:
        return call
    return call._replace(q=q, k=k, v=v)


def _no_leaf(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _aligned(x: Tensor) -> Tensor:
    """``x`` if its rows are contiguous and start at multiples of 16 bytes, else a copy."""
    if x.data_ptr() % 16 == 0 and (x.is_contiguous() or _has_aligned_rows(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _has_aligned_rows(x: Tensor) -> bool:
    *strides, last = x.stride()
    return last == 1 and not any(stride * x.element_size() % 16 for stride in strides)
