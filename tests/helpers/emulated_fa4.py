"""The four kernel calls of ``nsa.fused.kernel_inputs`` in PyTorch: any float dtype, any device.

They have the arguments and results of ``nsa.fused.fa4``, and use dense masks, for small inputs.
Float16 and bfloat16 are computed in float32. Other dtypes are computed as they are, and ``lse`` has
their dtype. A call for which the kernels would return garbage or fail is an AssertionError here.
"""

from itertools import pairwise

import torch
from torch import Tensor

from nsa.fused.kernel_inputs import BlockLists

NAMES = ("dense_forward", "dense_backward", "sparse_forward", "sparse_backward")


def dense_forward(
    q,
    k,
    v,
    *,
    scale,
    causal,
    window_size,
    key_times=None,
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
    for result in (out, lse):
        assert result.stride(-1) == 1 or result.shape[-1] == 1, "results need stride 1 at the end"
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    for queries, keys in sequences:
        mask = _dense_mask(queries, keys, q, k, causal, window_size, key_times)
        out[queries], lse[_rows(queries)] = attend(q[queries], k[keys], v[keys], mask, scale)
    return out, lse


def dense_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    scale,
    causal,
    window_size,
    key_times=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    dq=None,
):
    _check_tensors(q, k, v)
    _check_backward(dout, q, k, v, out, lse)
    dq = torch.full_like(q, torch.nan) if dq is None else dq
    dk, dv = (torch.full_like(x, torch.nan) for x in (k, v))
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    for queries, keys in sequences:
        mask = _dense_mask(queries, keys, q, k, causal, window_size, key_times)
        assert out[queries].isfinite().all()
        dq[queries], dk[keys], dv[keys] = attend_backward(
            *(x[queries] for x in (dout, q)),
            *(x[keys] for x in (k, v)),
            out[queries],
            lse[_rows(queries)],
            mask,
            scale,
        )
    return dq, dk, dv


def sparse_forward(q, k, v, lists, *, scale, causal, key_limit=None):
    _check_tensors(q, k, v)
    mask = _sparse_mask(q, k, lists, causal, key_limit, transposed=False)
    out, lse = attend(q[0], k[0], v[0], mask, scale)
    return out[None].contiguous(), lse[None].contiguous()


def sparse_backward(dout, q, k, v, out, lse, lists, *, scale, causal, key_limit=None):
    arguments = dict(scale=scale, causal=causal, key_limit=key_limit, transposed=True)
    return listed_gradients(dout, q, k, v, out, lse, lists, **arguments)


def listed_gradients(
    dout, q, k, v, out, lse, lists, *, scale, causal, key_limit=None, transposed=False
):
    """Gradients of ``sparse_forward``, from its own lists or from transposed ones."""
    _check_tensors(q, k, v)
    _check_backward(dout, q, k, v, out, lse)
    assert out.isfinite().all()
    mask = _sparse_mask(q, k, lists, causal, key_limit, transposed)
    gradients = attend_backward(dout[0], q[0], k[0], v[0], out[0], lse[0], mask, scale)
    # In the kernels, a gradient has the layout of its input.
    return tuple(
        torch.empty_like(x).copy_(gradient[None])
        for x, gradient in zip((q, k, v), gradients, strict=True)
    )


def attend(q, k, v, mask, scale):
    """Attention of one sequence: q (Sq, H, D), k and v (Sk, H_kv, .), mask (H or 1, Sq, Sk)."""
    q, k, v, dtype = _wide(q), _per_query_head(k, q), _per_query_head(v, q), q.dtype
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    probability = _probability(scores, mask, lse)
    return torch.einsum("hqk,khd->qhd", probability, v).to(dtype), lse


def attend_backward(dout, q, k, v, out, lse, mask, scale, dlse=None):
    """Gradients of one sequence from the results of forward, computed as in the kernels.

    ``dlse (Sq, H)`` is the gradient of the log-sum-exp, None for 0.
    """
    dtype, num_kv_heads = q.dtype, k.shape[1]
    dout, q, out = _wide(dout), _wide(q), _wide(out)
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    probability = _probability(scores, mask, lse)
    # Each row sums to 1 only over the keys that forward saw, so this checks that the masks agree.
    total, seen = probability.sum(-1), lse > -torch.inf
    assert torch.equal(mask.expand(scores.shape).any(-1), seen), "a query saw keys in one pass only"
    # Forward and backward round the scores of 16-bit inputs differently.
    assert torch.allclose(total[seen], torch.ones_like(total[seen]), rtol=0, atol=1e-3), (
        "forward and backward name different pairs"
    )
    dprobability = torch.einsum("qhd,khd->hqk", dout, v)
    delta = (dout * out).sum(-1).T
    if dlse is not None:
        delta = delta - torch.where(seen, dlse.T, 0)
    dscores = probability * (dprobability - delta[..., None]) * scale
    dq = torch.einsum("hqk,khd->qhd", dscores, k)
    dk = torch.einsum("hqk,qhd->khd", dscores, q)
    dv = torch.einsum("hqk,qhd->khd", probability, dout)
    dk, dv = (x.unflatten(1, (num_kv_heads, -1)).sum(2) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _probability(scores, mask, lse):
    return torch.where(mask, scores - lse[..., None], -torch.inf).exp()


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


def _dense_mask(queries, keys, q, k, causal, window_size, key_times):
    num_queries, num_keys = q[queries].shape[0], k[keys].shape[0]
    left, right = window_size
    if key_times is not None:
        assert not causal, "FA4 passes would each obey another of the two"
        assert window_size == (None, None), window_size
        stride, first = key_times
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
    pairs = (query // lists.query_block, key // lists.key_block)
    partial, full = (x[:, pairs[0], pairs[1]] for x in (partial, full))
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


def _check_backward(dout, q, k, v, out, lse):
    assert q.shape[-2] == k.shape[-2] or q.shape[-1] == v.shape[-1], "D != Dv with grouped heads"
    assert out.shape == dout.shape == (*q.shape[:-1], v.shape[-1]), (out.shape, dout.shape)
    assert dout.dtype == out.dtype == q.dtype, (dout.dtype, out.dtype)
    assert lse.shape == out.transpose(-2, -3).shape[:-1], lse.shape
    assert lse.dtype == _compute_dtype(q), lse.dtype
    assert dout.isfinite().all(), "hidden values must be finite"
