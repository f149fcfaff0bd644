"""The calls of ``nsa.fused.fa4`` in PyTorch: any float dtype, any device.

They have the arguments and results of ``nsa.fused.fa4``, and use dense masks, for small inputs.
Float16 and bfloat16 are computed in float32. Other dtypes are computed as they are, and ``lse`` has
their dtype. A call for which the kernels would return garbage or fail is an AssertionError here.
"""

from itertools import pairwise

import torch
from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.hardware import LOG2_E
from nsa.fused.kernel_inputs import KINDS_OF_KEYS, BlockLists, RowStatistics

NAMES = (
    *("dense_forward", "forward_of_blocks", "closing_forward"),
    *("dense_backward", "add_dense_backward", "sparse_forward", "sparse_backward"),
)


def dense_forward(
    q,
    k,
    v,
    *,
    scale,
    causal,
    window_size,
    block_ends=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    out=None,
    lse=None,
):
    _check_tensors(q, k, v)
    # Rows past the last sequence are not written.
    if out is None:
        out = q.new_full((*q.shape[:-1], v.shape[-1]), torch.nan)
    heads_first = out.transpose(-2, -3).shape[:-1]
    if lse is None:
        lse = torch.full(heads_first, torch.nan, dtype=_compute_dtype(q), device=q.device)
    assert lse.shape == heads_first, "lse is (B, H, Sq) or (H, Tq)"
    assert out.stride(-1) == 1 or out.shape[-1] == 1, "outputs need stride 1 at the end"
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    for queries, keys in sequences:
        mask = _dense_mask(queries, keys, q, k, causal, window_size, block_ends)
        out[queries], lse[_rows(queries)] = attend(q[queries], k[keys], v[keys], mask, scale)
    return out, lse


def forward_of_blocks(q, k, v, *, scale, block_ends, out=None, lse=None):
    call = dict(scale=scale, causal=False, window_size=(None, None), block_ends=block_ends)
    return dense_forward(q, k, v, out=out, lse=lse, **call)


def closing_forward(
    q, k, v, others, gates, weight, *, scale, causal, window_size, keep, out=None, lse=None
):
    mask = dict(scale=scale, causal=causal, window_size=window_size)
    o_win, lse = dense_forward(q, k, v, lse=lse, **mask)
    out = kernel_calls.gating_forward(*others, o_win, q, gates, weight, out)
    return out, o_win if keep else None, lse


def dense_backward(
    dout,
    q,
    k,
    v,
    statistics,
    *,
    scale,
    causal,
    window_size,
    block_ends=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    dq=None,
    deterministic=False,
    near_block=None,
):
    _check_tensors(q, k, v)
    _check_backward(dout, q, k, v, statistics, near_block)
    dq = torch.full_like(q, torch.nan) if dq is None else dq
    dk, dv = (torch.full_like(x, torch.nan) for x in (k, v))
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    for queries, keys in sequences:
        mask = _dense_mask(queries, keys, q, k, causal, window_size, block_ends)
        of_rows = RowStatistics(*(x[_rows(queries)] for x in statistics))
        if near_block is not None:
            of_rows = _by_key(of_rows, *mask.shape[1:], near_block)
        dq[queries], dk[keys], dv[keys] = attend_backward(
            *(x[queries] for x in (dout, q)),
            *(x[keys] for x in (k, v)),
            of_rows,
            mask,
            scale,
            complete=near_block is None,
        )
    return dq, dk, dv


def add_dense_backward(
    dout,
    q,
    k,
    v,
    statistics,
    query_sums,
    *,
    scale,
    causal=False,
    window_size=(None, None),
    block_ends=None,
    deterministic=False,
    near_block=None,
):
    assert causal or block_ends is not None or window_size != (None, None), "skips no tiles"
    assert block_ends is None or (len(q) == 1 and q.shape[2] > k.shape[2]), "one entry, and groups"
    # The kernels add what is hidden too, times 0.
    assert not statistics.lse_log2.isnan().any(), "P would not be 0"
    assert statistics.delta.isfinite().all()
    mask = dict(causal=causal, window_size=window_size, block_ends=block_ends)
    mask["near_block"] = near_block
    dq, dk, dv = dense_backward(dout, q, k, v, statistics, scale=scale, **mask)
    rows_of_sums(query_sums, q)[:, :, : q.shape[1]] += dq.transpose(1, 2) / scale
    return dk, dv


def _by_key(statistics, num_queries, num_keys, block_size):
    """Statistics ``(H, Sq, Sk)`` from those of one sequence by kind of key, ``(H, 3, rows)``."""
    first = num_keys - num_queries
    assert block_size % 64 == first % 64 == 0, "a warp group would have keys of two kinds"
    query = torch.arange(num_queries, device=statistics.delta.device) + first
    key = torch.arange(num_keys, device=query.device)
    before = (query // block_size)[:, None] - key // block_size
    kind = torch.where(before < 0, KINDS_OF_KEYS - 1, before.clamp(max=KINDS_OF_KEYS - 1))
    padding = statistics.lse_log2[..., num_queries:]
    assert (padding == torch.inf).all(), "P would not be 0"
    row = torch.arange(num_queries, device=query.device)[:, None]
    return RowStatistics(*(x[:, kind, row] for x in statistics))


def rows_of_sums(query_sums, q):
    """The sums as ``(B, H, rows, D)``. Here rows and channels have their own order."""
    assert query_sums.dtype == _compute_dtype(q), query_sums.dtype
    return query_sums.view(q.shape[0], q.shape[2], -1, q.shape[3])


def sparse_forward(q, k, v, lists, *, scale, causal, key_limit=None):
    _check_tensors(q, k, v)
    mask = _sparse_mask(q, k, lists, causal, key_limit, transposed=False)
    out, lse = attend(q[0], k[0], v[0], mask, scale)
    return out[None].contiguous(), lse[None].contiguous()


def sparse_backward(dout, q, k, v, statistics, lists, *, scale, causal, key_limit=None):
    arguments = dict(scale=scale, causal=causal, key_limit=key_limit, transposed=True)
    return listed_gradients(dout, q, k, v, statistics, lists, **arguments)


def listed_gradients(
    dout, q, k, v, statistics, lists, *, scale, causal, key_limit=None, transposed=False
):
    """Gradients of ``sparse_forward``, from its own lists or from transposed ones."""
    _check_tensors(q, k, v)
    _check_backward(dout, q, k, v, statistics)
    mask = _sparse_mask(q, k, lists, causal, key_limit, transposed)
    of_row = RowStatistics(*(x[0] for x in statistics))
    gradients = attend_backward(dout[0], q[0], k[0], v[0], of_row, mask, scale)
    # In the kernels, a gradient has the layout of its input.
    return tuple(
        torch.empty_like(x).copy_(gradient[None])
        for x, gradient in zip((q, k, v), gradients, strict=True)
    )


def attend(q, k, v, mask, scale):
    """Attention of one sequence: q (Sq, H, D), k and v (Sk, H_kv, .), mask (H or 1, Sq, Sk)."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = out.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=_compute_dtype(q))
    for rows, keys, part in _parts(mask):
        out[rows], lse[:, rows] = _attend(q[rows], k[keys], v[keys], part, scale)
    return out, lse


_PART = 128


def _parts(mask):
    """Some queries, the keys that any of them sees, and their mask: most pairs may be hidden."""
    queries, keys = mask.shape[-2:]
    if queries * keys <= _PART * _PART:
        yield slice(None), slice(None), mask
        return
    seen = mask.any(0)
    for start in range(0, queries, _PART):
        rows = slice(start, start + _PART)
        index = seen[rows].any(0).nonzero()[:, 0]
        yield rows, index, mask[:, rows, index]


def _attend(q, k, v, mask, scale):
    q, k, v = _wide(q), _per_query_head(k, q), _per_query_head(v, q)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    probability = torch.where(mask, scores - lse[..., None], -torch.inf).exp()
    return torch.einsum("hqk,khd->qhd", probability, v), lse


def row_statistics(dout, out, lse, dlse=None):
    """Statistics of attention alone, in the shape of ``lse``: ``(..., H, Sq)``.

    ``dlse`` is the gradient of the log-sum-exp, None for 0.
    """
    delta = (_wide(dout) * _wide(out)).sum(-1).transpose(-1, -2)
    delta = delta if dlse is None else delta - dlse
    hidden = lse == -torch.inf
    return RowStatistics(
        (lse * LOG2_E).masked_fill(hidden, torch.inf), delta.masked_fill(hidden, 0)
    )


def attend_backward(dout, q, k, v, statistics, mask, scale, complete=True):
    """Gradients of one sequence, computed as in the kernels.

    Statistics are ``(H, Sq)``, or ``(H, Sq, Sk)`` of each key. The mask is that of the forward if
    it is ``complete``.
    """
    dq = torch.zeros_like(q)
    dk, dv = (torch.zeros_like(x, dtype=_compute_dtype(x)) for x in (k, v))
    for rows, keys, part in _parts(mask):
        by_key = (x if x.ndim == 3 else x[..., None].expand(-1, -1, len(k)) for x in statistics)
        of_part = RowStatistics(*(x[:, rows][..., keys] for x in by_key))
        tensors = (dout[rows], q[rows], k[keys], v[keys])
        dq[rows], dk_part, dv_part = _attend_backward(*tensors, of_part, part, scale, complete)
        dk[keys] += dk_part
        dv[keys] += dv_part
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _attend_backward(dout, q, k, v, statistics, mask, scale, complete):
    dtype, num_kv_heads = q.dtype, k.shape[1]
    lse_log2, delta = statistics
    dout, q = _wide(dout), _wide(q)
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    probability = torch.where(mask, scores - lse_log2 / LOG2_E, -torch.inf).exp()
    dprobability = torch.einsum("qhd,khd->hqk", dout, v)
    centred = probability * (dprobability - delta)
    if complete and mask.shape[-1]:
        _check_pairs(mask, lse_log2[..., 0], probability, dprobability, centred, dtype)
    dscores = centred * scale
    dq = torch.einsum("hqk,khd->qhd", dscores, k)
    dk = torch.einsum("hqk,qhd->khd", dscores, q)
    dv = torch.einsum("hqk,qhd->khd", probability, dout)
    dk, dv = (x.unflatten(1, (num_kv_heads, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _check_pairs(mask, lse_log2, probability, dprobability, centred, dtype):
    """Check that a row has the keys that forward saw.

    Over these P sums to 1; or, with a gate in it or a gradient of the log-sum-exp, dS sums to 0.
    """
    seen = mask.expand(probability.shape).any(-1)
    assert (seen | (lse_log2 == torch.inf)).all(), "a query saw keys in forward only"
    total = probability.sum(-1)
    assert (total <= 1 + 1e-3).all(), "forward and backward name different pairs"
    largest = dprobability.masked_fill(~mask, 0).abs().amax(-1) if mask.shape[-1] else total
    # The output and the scores of 16-bit inputs are rounded.
    error = {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 5e-2)
    sums_to_0 = centred.sum(-1).abs() <= error * total * (largest + 1)
    sums_to_1 = (total - 1).abs() <= 1e-3
    assert (sums_to_0 | sums_to_1).all(), "forward and backward name different pairs"


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(_compute_dtype(x))


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return _wide(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _rows(queries):
    """The index of a sequence's rows in lse, from its index in q."""
    return (slice(None), queries) if isinstance(queries, slice) else queries


def _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
    """(index into q, index into k) of each sequence."""
    if cu_seqlens_q is None:
        assert cu_seqlens_k is None, "cu_seqlens of both or of neither"
        assert q.ndim == k.ndim == 4, (q.shape, k.shape)
        assert q.shape[0] == k.shape[0], (q.shape, k.shape)
        return [(b, b) for b in range(q.shape[0])]
    assert q.ndim == k.ndim == 3, (q.shape, k.shape)
    queries = _slices(cu_seqlens_q, q.shape[0])
    return list(zip(queries, _slices(cu_seqlens_k, k.shape[0]), strict=True))


def _slices(cu_seqlens, total):
    assert cu_seqlens.dtype == torch.int32, cu_seqlens.dtype
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0, bounds
    assert bounds[-1] <= total, (bounds, total)
    assert bounds == sorted(bounds), bounds
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _dense_mask(queries, keys, q, k, causal, window_size, block_ends):
    num_queries, num_keys = q[queries].shape[0], k[keys].shape[0]
    left, right = window_size
    if block_ends is not None:
        assert not causal, "FA4 passes would each obey another of the two"
        assert window_size == (None, None), window_size
        stride, first = block_ends
        query = torch.arange(num_queries, device=q.device)[:, None]
        return (torch.arange(num_keys, device=q.device) * stride + first <= query)[None]
    # FA4 reads a single -1 as a bound of -1, not as no bound.
    assert all(bound is None or bound >= 0 for bound in window_size), window_size
    position = torch.arange(num_queries, device=q.device)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys, device=q.device)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if causal:
        right = 0
    if left is not None:
        mask &= key >= position - left
    if right is not None:
        mask &= key <= position + right
    return mask[None]


def _sparse_mask(q, k, lists: BlockLists, causal, key_limit, transposed):
    """The pairs ``(H, Tq, Tk)`` that the lists and the mask allow."""
    assert q.shape[0] == k.shape[0] == 1, (q.shape, k.shape)
    assert not (causal and key_limit is not None), "FA4 passes would each obey another of the two"
    assert lists.query_block % 64 == 0, lists.query_block
    assert lists.key_block in (64, 128), lists.key_block
    num_heads, num_queries, num_keys = q.shape[2], q.shape[1], k.shape[1]
    blocks = (-(-num_queries // lists.query_block), -(-num_keys // lists.key_block))
    rows, columns = blocks[::-1] if transposed else blocks
    shape = (num_heads, rows, columns)
    partial = _listed(lists.partial_count, lists.partial_index, shape)
    full = torch.zeros_like(partial)
    assert (lists.full_count is None) == (lists.full_index is None), "both or neither"
    if lists.full_count is not None:
        full = _listed(lists.full_count, lists.full_index, shape)
    assert not (partial & full).any(), "a block is in both lists"
    query = torch.arange(num_queries, device=q.device)[:, None]
    key = torch.arange(num_keys, device=q.device)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if causal:
        assert num_queries <= num_keys, "FA4 aligns the causal flag at the end"
        visible = key <= query + num_keys - num_queries
    if key_limit is not None:
        assert key_limit.dtype == torch.int32, key_limit.dtype
        assert key_limit.shape == (num_queries,), key_limit.shape
        visible = key < key_limit[:, None]
    if transposed:
        partial, full = partial.mT, full.mT
    partial, full = (
        x.repeat_interleave(lists.query_block, 1)[:, :num_queries].repeat_interleave(
            lists.key_block, 2
        )[..., :num_keys]
        for x in (partial, full)
    )
    # Kernels may or may not apply the mask to full blocks.
    assert (visible | ~full).all(), "a full block has a pair that the mask hides"
    return (partial & visible) | full


def _listed(count, index, shape):
    """Check the form of the lists, and return what they name: bool ``(H, rows, columns)``."""
    num_heads, rows, columns = shape
    for x in (count, index):
        assert x.dtype == torch.int32, x.dtype
    assert count.shape == (1, num_heads, rows), (count.shape, shape)
    assert index.shape == (1, num_heads, rows, index.shape[-1]), (index.shape, shape)
    width = index.shape[-1]
    assert 1 <= width <= columns, f"width {width} of lists of {columns} blocks"
    assert index.stride(-1) == 1 or width == 1, "the kernels read a row as contiguous"
    count, index = count[0].long(), index[0].long()
    assert ((count >= 0) & (count <= width)).all(), "a count is out of range"
    used = torch.arange(width, device=index.device) < count[..., None]
    in_range = (index >= 0) & (index < columns)
    assert (in_range | ~used).all(), "a listed block is out of range"
    assert (index.diff(dim=-1) > 0)[used[..., 1:]].all(), "a list does not ascend"
    # An extra column takes the entries that must not be read.
    listed = torch.zeros(num_heads, rows, columns + 1, dtype=torch.bool, device=index.device)
    listed.scatter_(-1, torch.where(used, index, columns), True)
    return listed[..., :columns]


def _check_tensors(q, k, v):
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert q.shape[-1] == k.shape[-1], (q.shape, k.shape)
    assert k.shape[:-1] == v.shape[:-1], (k.shape, v.shape)
    assert q.shape[-2] % k.shape[-2] == 0, (q.shape, k.shape)
    for name, x in zip("qkv", (q, k, v), strict=True):
        assert x.isfinite().all(), f"{name}: hidden values are multiplied by 0, so must be finite"


def _check_backward(dout, q, k, v, statistics, near_block=None):
    assert q.shape[-2] == k.shape[-2] or q.shape[-1] == v.shape[-1], "D != Dv with grouped heads"
    assert dout.shape == (*q.shape[:-1], v.shape[-1]), dout.shape
    assert dout.dtype == q.dtype, dout.dtype
    shape = dout.transpose(-2, -3).shape[:-1]
    if near_block is not None:
        shape = (*shape[:-1], KINDS_OF_KEYS, -(-shape[-1] // 128) * 128)
    for x in statistics:
        assert x.shape == shape, x.shape
        assert near_block is None or x.is_contiguous()
        assert x.dtype == _compute_dtype(q), x.dtype
    assert dout.isfinite().all(), "hidden values must be finite"
