"""The one file that calls FlashAttention-4 (CuTe DSL), as ``nsa.fused.kernel_inputs`` has it.

Written for flash-attn-4 4.0.0b36 (``WRITTEN_FOR``) and its private entry points
``_flash_attn_fwd`` and ``_flash_attn_bwd``: the public functions take neither tiles nor buffers for
results. FA4 is imported on the first call. All calls but the sparse backward's go through
:mod:`nsa.fused.fa4_replay`, which spares the host most of FA4's Python.

Where the kernels are compiled for (FA4 reads the machine's GPU, or FLASH_ATTENTION_ARCH):

- SM90: head dimensions 32, 64, 96, 128 and 256 (backward is wrong or fails to compile at others).
  Key blocks in backward are of 128 keys up to head dimension 128, and there query blocks are
  multiples of 128; of 64 keys above.
- SM100: head dimensions up to 128; 128-key blocks and query blocks that are multiples of 256.
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata

import torch
from torch import Tensor

from nsa.fused import fa4_replay
from nsa.fused.disk_cache import import_kernels
from nsa.fused.kernel_inputs import BlockLists
from nsa.host import may_keep

WRITTEN_FOR = "4.0.0b36"

SEVERAL_TILES = 512
"""Tokens that no tile of FA4's kernels holds, of queries or of keys."""


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
            f"flash-attn-4 is {version} and its private functions are used as {WRITTEN_FOR} has "
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
    window_size: tuple[int | None, int | None],
    key_times: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of batched or packed sequences, aligned at their ends.

    Args:
        q: ``(B, Sq, H, D)``, or ``(Tq, H, D)`` with ``cu_seqlens``; float16 or bfloat16.
        k: ``(B, Sk, H_kv, D)`` or ``(Tk, H_kv, D)``.
        v: ``(B, Sk, H_kv, Dv)`` or ``(Tk, H_kv, Dv)``.
        scale: multiplies ``q @ k^T``.
        causal: no key after the query.
        window_size: keys visible to the (left, right) of a query beside its own; None is no bound.
        key_times: (stride, first) instead of both: a query sees the keys ``j`` with
            ``j * stride + first`` at most its own index. No tile is skipped.
        cu_seqlens_q: int32 ``(S + 1,)``, and ``cu_seqlens_k`` likewise.
        max_seqlen_q: an upper bound of the lengths, and ``max_seqlen_k`` likewise.
        out, lse: where to write the results, with stride 1 in the last dimension; by default new.

    Returns:
        out: ``(B, Sq, H, Dv)`` or ``(Tq, H, Dv)`` in the dtype of ``q``.
        lse: float32 ``(B, H, Sq)`` or ``(H, Tq)``.
    """
    options = _dense_mask_arguments(causal, window_size, key_times)
    options["tile_mn"] = _dense_forward_tile(q, k, window_size, key_times)
    options |= _bounds(cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    bounds = (cu_seqlens_q, cu_seqlens_k)
    tensors = fa4_replay.Tensors(q, k, v, out, lse, scale, bounds)
    return fa4_replay.forward(_interface(), tensors, **options)


def dense_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    window_size: tuple[int | None, int | None],
    key_times: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`dense_forward`; ``Dv == D`` where several heads share a KV head.

    Args:
        dout: gradient of ``out``, in its shape and dtype.
        q, k, v, out, lse: arguments and results of :func:`dense_forward`; the rest as there.
        dq: where to write the gradient of ``q``, with stride 1 in the last dimension.

    Returns:
        dq, dk, dv: in the shapes and dtype of ``q``, ``k`` and ``v``.
    """
    _check_backward_dims(q, k, v)
    options = _dense_mask_arguments(causal, window_size, key_times)
    options |= _bounds(cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    bounds = (cu_seqlens_q, cu_seqlens_k)
    tensors = fa4_replay.BackwardTensors(dout, q, k, v, out, lse, dq, scale, bounds)
    return fa4_replay.backward(_interface(), tensors, **options)


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
        scale: multiplies ``q @ k^T``.
        causal: hide keys after the query; needs ``Tq == Tk``, and excludes ``key_limit``.
        key_limit: int32 ``(Tq,)``: a query sees keys before it.

    Returns:
        out: ``(1, Tq, H, Dv)`` in the dtype of ``q``.
        lse: float32 ``(1, H, Tq)``.
    """
    _check_mask(q, k, causal, key_limit)
    options = _mask_arguments(q, causal, key_limit, lists.query_block)
    tensors = fa4_replay.Tensors(
        *(q, k, v, None, None, scale),
        lists=_list_tensors(lists),
        aux=options.pop("aux_tensors", None),
    )
    # The lists are by query head; packing would read one head's list for its whole group.
    options |= dict(pack_gqa=False, block_size=(lists.query_block, lists.key_block))
    return fa4_replay.forward(_interface(), tensors, **options)


def sparse_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    causal: bool,
    key_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`sparse_forward`; ``Dv == D`` where several heads share a KV head.

    Args:
        dout: gradient of ``out``, in its shape and dtype.
        q, k, v, out, lse: arguments and results of :func:`sparse_forward`.
        lists: the transpose of the forward's: query blocks of each key block and head.
        scale, causal, key_limit: as in forward.

    Returns:
        dq, dk, dv: in the shapes and dtype of ``q``, ``k`` and ``v``.
    """
    _check_mask(q, k, causal, key_limit)
    _check_backward_dims(q, k, v)
    return _interface()._flash_attn_bwd(
        q=q,
        k=k,
        v=v,
        out=out,
        dout=dout,
        lse=lse,
        softmax_scale=scale,
        block_sparse_tensors=_block_sparse_tensors(lists),
        **_mask_arguments(q, causal, key_limit, lists.query_block),
    )


@lru_cache(maxsize=None)
def _interface():
    # Takes seconds, and needs CUDA libraries: not before the first call.
    return import_kernels("flash_attn.cute.interface")


def _is_sm90() -> bool:
    return _interface()._get_device_arch() // 10 == 9


def _bounds(
    cu_seqlens: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> dict[str, int]:
    """Upper bounds of packed lengths, of few values, that calls be alike. None is of a single tile,
    for which FA4 compiles kernels of their own: a pack of short sequences would wait for these in
    the middle of training."""
    if cu_seqlens is None:
        return {}
    return dict(max_seqlen_q=_power_of_two(max_seqlen_q), max_seqlen_k=_power_of_two(max_seqlen_k))


def _power_of_two(max_seqlen: int) -> int:
    return 1 << (max(max_seqlen, SEVERAL_TILES) - 1).bit_length()


def _dense_forward_tile(
    q: Tensor,
    k: Tensor,
    window_size: tuple[int | None, int | None],
    key_times: tuple[int, int] | None,
) -> tuple[int, int] | None:
    """(queries, keys) of a tile where FA4's own choice, of 128 by 128, is not the best.

    A window of some hundred keys takes 0.69 ms instead of 0.82 (32K tokens, H=32, H_kv=8, w=512) if
    192 rows of several heads share it; of one head, 128 by 128 is better. So do few keys with times
    (8K tokens over 127, 0.088 ms instead of 0.094). Without either, folded queries take 14.2 ms
    instead of 15.4 (256K tokens, l=64), where heads do not share their keys.
    """
    group = q.shape[-2] // k.shape[-2]
    if group == 1 or not 96 < q.shape[-1] <= 128 or not _is_sm90():
        return None
    if window_size == (None, None) and key_times is None:
        return None if k.stride(0) == 0 else (128, 160)
    few = window_size[0] is not None or key_times is not None
    return (192, 80) if few and 192 % group == 0 else None


def _block_sparse_tensors(lists: BlockLists):
    return _interface().BlockSparseTensorsTorch(
        *_list_tensors(lists), block_size=(lists.query_block, lists.key_block)
    )


def _list_tensors(lists: BlockLists) -> tuple[Tensor, ...]:
    """Count and index of the partial blocks, then of the full ones, as FA4 takes them."""
    full_count, full_index = lists.full_count, lists.full_index
    if full_count is None:
        # SM90's forward reads the second list even where it is None.
        full_count, full_index = _zero_count(lists.partial_count), lists.partial_index
    tensors = (lists.partial_count, lists.partial_index, full_count, full_index)
    return tuple(map(_unit_stride, tensors))


def _zero_count(count: Tensor) -> Tensor:
    if _interface().is_fake_mode() or not may_keep(count):
        # Tensors without data are not for later either.
        return torch.zeros_like(count)
    return _zeros(count.shape, count.device)


@lru_cache(maxsize=8)
def _zeros(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _unit_stride(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dimension, which torch leaves open where its size is 1."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _check_mask(q: Tensor, k: Tensor, causal: bool, key_limit: Tensor | None):
    if causal and key_limit is not None:
        # FA4 would obey only the limit in forward, and only the causal flag in backward.
        raise ValueError("causal and key_limit exclude each other")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal needs as many queries as keys, got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )


def _check_backward_dims(q: Tensor, k: Tensor, v: Tensor):
    if q.shape[-2] != k.shape[-2] and q.shape[-1] != v.shape[-1]:
        raise ValueError(
            "backward with several query heads a KV head needs q and v of one head dimension, got "
            f"{q.shape[-1]} and {v.shape[-1]}: pad the smaller with zeros"
        )


def _dense_mask_arguments(
    causal: bool,
    window_size: tuple[int | None, int | None],
    key_times: tuple[int, int] | None,
) -> dict[str, object]:
    if key_times is None:
        left, right = window_size
        return dict(causal=causal, window_size_left=left, window_size_right=right)
    if causal or window_size != (None, None):
        # FA4 would obey only the times in forward, and only the others in backward.
        raise ValueError(
            f"key_times excludes causal and window_size, got causal={causal} and {window_size}"
        )
    return dict(causal=False, mask_mod=_key_times_mask(*key_times))


def _mask_arguments(
    q: Tensor, causal: bool, key_limit: Tensor | None, query_block: int
) -> dict[str, object]:
    if key_limit is None:
        return {"causal": causal}
    # The kernels read the limit of each row of a tile, also of rows past the last query.
    padding = -q.shape[1] % query_block
    if padding:
        key_limit = torch.nn.functional.pad(key_limit, (0, padding))
    return {"mask_mod": _key_limit_mask(), "aux_tensors": [key_limit]}


@lru_cache(maxsize=None)
def _key_limit_mask():
    """The mask ``key < key_limit[query]`` in the form that FA4 compiles into its kernels."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def key_limit_mask(batch, head, query, key, seqlen_info, aux_tensors):
        return key < scalar_to_ssa(aux_tensors[0][query[0]], cutlass.Int32)

    return _named_by_source(key_limit_mask)


@lru_cache(maxsize=None)
def _key_times_mask(stride: int, first: int):
    """The mask ``key * stride + first <= query``, likewise."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def key_times_mask(batch, head, query, key, seqlen_info, aux_tensors):
        times = key * scalar_to_ssa(stride, cutlass.Int32) + scalar_to_ssa(first, cutlass.Int32)
        return times <= query

    return _named_by_source(key_times_mask, stride, first)


def _named_by_source(mask: Callable, *values: int) -> Callable:
    """The mask, which FA4's cache on disk knows by its source and the ``values`` in it.

    FA4 itself would go by addresses of what the mask refers to, which each process has others of.
    """
    source = inspect.getsource(getattr(mask, "__wrapped__", mask))
    mask.__cute_hash__ = hashlib.sha256(f"{source}{values}".encode()).hexdigest()
    return mask
