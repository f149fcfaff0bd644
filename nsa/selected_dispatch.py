"""The public function for the selected branch by itself: attention over blocks of the caller."""

from functools import partial

from torch import Tensor

from nsa import validation
from nsa.backends import choose_module
from nsa.block_index_checks import check_listed_blocks
from nsa.boundaries import check_boundaries, has_key_boundaries
from nsa.cache.paged_keys import PagedKeys, blocks_of_rows, check_paged_qkv, check_used_pages
from nsa.config import NSAConfig, check_scale
from nsa.host import has_readable_values
from nsa.packing import Packing
from nsa.precision import autocast_tensors

# What a block size says about the sequences. Made once, because tracing cannot make them.
_CONFIGS = {
    size: NSAConfig(selection="token", compress_block_size=size, num_selected_blocks=1)
    for size in (32, 64, 128)
}


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int = 64,
    causal: bool = True,
    scale: float | None = None,
    *,
    cu_seqlens: Tensor | Packing | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = True,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the keys of the blocks that the caller lists for it.

    This is the selected branch alone (https://arxiv.org/abs/2502.11089, section 3.3.2, Eq. 11 and
    12), for models that choose blocks in their own way. Block ``J`` of a sequence is its keys
    ``[J * block_size, (J + 1) * block_size)``; the last one may be short. The ``G = H / H_kv``
    query heads of a KV head attend the same blocks. Differentiable in ``q``, ``k`` and ``v``,
    through the output and through the log-sum-exp; no gradient passes through the choice of blocks.

    A sequence may have fewer queries than keys. The queries are then its last tokens: query ``i``
    of ``Nq`` stands at position ``t = Nk - Nq + i`` and, if ``causal``, attends listed keys at or
    before ``t``. So what a list names after ``t``, whole blocks included, is left out.

    *From pages.* A server keeps keys and values in pages that sequences may share. With
    ``page_table`` and ``seqused_k``, ``k`` and ``v`` are its pools, as in FlashAttention and
    FlashInfer, and hold the keys of the new tokens too. This is for inference: there are no
    gradients. For up to 8 queries of a sequence the fused backend reads the listed blocks where
    they lie and nothing on the host, so that a CUDA graph can be replayed as sequences grow; it
    needs ``page_size`` to be a multiple of ``block_size``, ``G`` up to 32, ``D`` and ``Dv`` in
    multiples of 32, and strides in multiples of 8. Else, and on the reference, keys and values of
    all sequences are copied out of their pages first: each is read and written once, and the host
    reads the lengths.

    The fused backend has first derivatives only, and multiplies masked values by 0 instead of
    skipping them; see :func:`nsa.forward`.

    Args:
        q: ``(B, Nq, H, D)``, or packed ``(T, H, D)`` with ``cu_seqlens``; float16, bfloat16,
            float32 or float64. ``k`` and ``v`` have the same dtype. Under autocast, arguments that
            mix the first three are cast to the autocast dtype.
        k: ``(B, Nk, H_kv, D)`` or ``(Tk, H_kv, D)``, with ``Nq <= Nk`` in each sequence.
        v: ``(B, Nk, H_kv, Dv)`` or ``(Tk, H_kv, Dv)``.
        block_indices: int32 ``(B, Nq, H_kv, n)`` or ``(T, H_kv, n)``, of any strides: a transposed
            ``(H_kv, T, n)`` is not copied. Each row has indices of blocks in the query's sequence,
            ascending and so distinct, then -1 in empty slots. Each call checks the values, for
            which the host waits once; not while torch.compile traces or a CUDA graph is captured.
            There, a block that the query cannot see is left out, and one that is listed twice
            counts twice. Do not write to it between forward and backward.
        block_size: keys of a block: 32, 64 or 128.
        causal: whether a query attends only keys at or before its position.
        scale: factor on the logits, default ``1 / sqrt(D)``.
        cu_seqlens, cu_seqlens_k: boundaries of packed queries and keys, int32 ``(S + 1,)`` each; by
            default those of the keys are those of the queries. Or a :class:`nsa.Packing` as
            ``cu_seqlens``, which has both. As in :func:`nsa.forward`.
        max_seqlen, max_seqlen_k: upper bounds on the numbers of queries and keys of a sequence, as
            in :func:`nsa.forward`. They only spare the host the read of the boundaries.
        page_table: int32 ``(B, max_pages)``, any strides: token ``p`` of sequence ``b`` lies in
            page ``page_table[b, p // page_size]`` at slot ``p % page_size`` of ``k (pages,
            page_size, H_kv, D)`` and ``v (pages, page_size, H_kv, Dv)``. Pools of another order,
            such as ``(pages, H_kv, page_size, D)``, come as transposed views. Entries past a
            sequence's keys may hold any number. ``cu_seqlens_k`` and ``max_seqlen_k`` are None.
        seqused_k: int32 ``(B,)`` with ``page_table``, the keys of each sequence, those of its
            queries included. The host waits for both once, except while torch.compile traces or a
            CUDA graph is captured; then they must be right.
        return_lse: whether to return the log-sum-exp too.
        deterministic: give the same bits each time, in gradients too; as in :func:`nsa.forward`.
        backend: ``"reference"``, ``"fused"``, or ``"auto"``: fused if it can do this, else
            reference, with the reason logged once.

    Returns:
        The output ``(B, Nq, H, Dv)`` or ``(T, H, Dv)`` in the dtype of ``q``. With ``return_lse`` a
        pair of it and the log-sum-exp ``(B, H, Nq)`` or ``(H, T)``: the natural logarithm of the
        sum of ``exp(scale * q . k)`` over the attended keys, in float32 (float64 for float64
        inputs). A query that attends no key gets 0 and -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it
            must be.
        UnsupportedError: ``backend="fused"`` cannot do this; the message names the limit.
    """
    config = _check_options(block_size, causal, scale, return_lse)
    deterministic = validation.check_deterministic(deterministic)
    q, k, v = autocast_tensors(q, k, v)
    if page_table is not None or seqused_k is not None:
        if page_table is None or seqused_k is None:
            missing = "page_table" if page_table is None else "seqused_k"
            raise ValueError(f"page_table and seqused_k must be given together, got no {missing}")
        if max_seqlen_k is not None or has_key_boundaries(cu_seqlens, cu_seqlens_k):
            raise ValueError(
                "cu_seqlens_k and max_seqlen_k must be None with page_table, and a Packing be one "
                "of queries alone: seqused_k says how many keys there are"
            )
        pages = PagedKeys(k, v, page_table, seqused_k)
        return _attend_pages(
            q, pages, block_indices, block_size, causal, scale,
            config, (cu_seqlens, max_seqlen), return_lse, backend,
        )  # fmt: skip
    problem = validation.check_qkv(q, (k, k, k), (v, v, v), config, cu_seqlens, cu_seqlens_k)
    boundaries = check_boundaries(cu_seqlens, max_seqlen, q, k, cu_seqlens_k, max_seqlen_k)
    validation.check_positions(boundaries, problem)
    check_listed_blocks(block_indices, boundaries, q, problem)
    fused_limit = partial(_fused_limit, q, v, block_indices)
    return choose_module(backend, q, fused_limit).selected_attention(
        q,
        k,
        v,
        block_indices,
        block_size=block_size,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        boundaries=boundaries,
        return_lse=return_lse,
        deterministic=deterministic,
    )


def _attend_pages(
    q: Tensor,
    pages: PagedKeys,
    block_indices: Tensor,
    block_size: int,
    causal: bool,
    scale: float | None,
    config: NSAConfig,
    packing: tuple[Tensor | Packing | None, int | None],
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selected_attention` of keys in pages; ``packing`` is ``cu_seqlens, max_seqlen``."""
    problem = check_paged_qkv(q, pages, config, packing[0])
    boundaries = check_boundaries(*packing, q, q)
    check_used_pages(q, pages, boundaries)
    counts = None
    if has_readable_values(pages.lengths):
        counts = blocks_of_rows(q, pages, boundaries, config)
    check_listed_blocks(block_indices, boundaries, q, problem, counts)

    def fused_limit() -> str | None:
        from nsa.fused.constraints import unsupported_pages

        return unsupported_pages(q, pages, block_indices, block_size, boundaries)

    out, lse = choose_module(backend, q, fused_limit).selected_from_pages(
        q,
        pages,
        block_indices,
        block_size=block_size,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        boundaries=boundaries,
    )
    return (out, lse) if return_lse else out


def _fused_limit(q: Tensor, v: Tensor, block_indices: Tensor) -> str | None:
    """Why the fused backend cannot do this, with the remedy; None if it can."""
    from nsa.fused.constraints import unsupported_lists

    return unsupported_lists(q, v, block_indices)


def _check_options(block_size, causal, scale, return_lse) -> NSAConfig:
    """Check what is no tensor; the configuration whose blocks have ``block_size`` keys."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int, got {block_size!r}")
    if block_size not in _CONFIGS:
        raise ValueError(f"block_size must be one of {tuple(_CONFIGS)}, got {block_size}")
    for name, value in (("causal", causal), ("return_lse", return_lse)):
        validation.check_flag(name, value)
    check_scale(scale)
    return _CONFIGS[block_size]
