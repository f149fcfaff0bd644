"""Emulations of the kernels of token mode in ``nsa.fused.kernels``, with the rules of
``emulated_kernels``."""

import itertools

import torch
from torch import Tensor

from nsa.fused.kernel_inputs import LEFT_OUT, RowStatistics
from nsa.fused.token_inputs import choose_shape
from nsa.precision import accumulation_dtype
from tests.helpers import emulated_fa4, emulated_kernels

NAMES = (
    "importance_scores", "selected_forward", "closing_forward", "selected_backward",
    "row_statistics", "join_near_blocks",
)  # fmt: skip
"""The functions of ``nsa.fused.kernel_calls`` that are answered here."""


def importance_scores(q, k_cmp, lse, tiles, chunk, scores, scale, rule) -> None:
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads, dtype = k_cmp.shape[2], accumulation_dtype(q.dtype)
    start = chunk * tiles.chunk
    stop = min(start + tiles.chunk, length)
    assert scores.shape[:3] == (batch, num_kv_heads, stop - start)
    assert lse.shape == (batch, num_heads, length)
    assert lse.dtype == scores.dtype == dtype
    assert scores.is_contiguous()
    assert tiles.fields.dtype == tiles.first.dtype == torch.int32
    shape = choose_shape(head_dim, num_heads // num_kv_heads)
    assert (tiles.fields[:, 2] <= shape.tile_tokens).all()
    scores.fill_(torch.nan)
    first = int(tiles.first[chunk])
    for tile in tiles.fields[first : first + tiles.grid].tolist():
        _score_tile(q, k_cmp, lse, tile, start, stop, scores, scale, rule)


def _score_tile(q, k_cmp, lse, tile, start, stop, scores, scale, rule) -> None:
    tile_start, position, count, k_start, k_count, num_blocks = tile
    low, high = max(tile_start, start), min(tile_start + count, stop)
    if low >= high:
        return
    at = position + torch.arange(low - tile_start, high - tile_start, device=q.device)
    visible, limit = torch.full_like(at, k_count), torch.full_like(at, num_blocks)
    if rule.causal:
        seen = (at + 1 - rule.covered).div(rule.stride, rounding_mode="floor") + 1
        visible = seen.clamp(min=0).minimum(visible)
        limit = at // rule.select_size + 1
    assert limit.max() <= scores.shape[-1]
    block = torch.arange(int(limit.max()), device=q.device)
    wanted = block < limit[:, None]
    for entry, kv_head in itertools.product(*map(range, scores.shape[:2])):
        keys = k_cmp[entry, k_start : k_start + k_count, kv_head].to(scores.dtype)
        # Equal keys must get equal products, which a matrix product does not guarantee.
        distinct, which = keys.unique(dim=0, return_inverse=True) if k_count else (keys, slice(0))
        seen = torch.arange(k_count, device=q.device) < visible[:, None]
        group = q.shape[2] // scores.shape[1]
        total = scores.new_zeros(high - low, k_count)
        for head in range(kv_head * group, (kv_head + 1) * group):
            products = (q[entry, low:high, head].to(scores.dtype) @ distinct.T)[:, which]
            exponent = products.reshape(total.shape) * scale - lse[entry, head, low:high, None]
            total += torch.where(seen, exponent, -torch.inf).exp()
        result = scores.new_zeros(high - low, len(block))
        for o, weight in enumerate(rule.weights()):
            j = block * rule.per_select - rule.carried + o
            inside = (j >= 0) & (j < k_count)
            share = torch.nn.functional.pad(total, (0, 1))[:, torch.where(inside, j, k_count)]
            result += weight * share
        target = scores[entry, kv_head, low - start : high - start, : len(block)]
        target.copy_(torch.where(wanted, result, target))


def selected_forward(q, k, v, block_indices, blocks, block_size, scale, causal, band):
    mask = _selected_mask(q, k, block_indices, blocks, block_size, causal)
    out, lse = emulated_fa4.attend(q, k, v, mask, scale)
    return out.contiguous(), lse.T.contiguous()


def closing_forward(
    q,
    k,
    v,
    block_indices,
    blocks,
    block_size,
    scale,
    causal,
    o_cmp,
    o_win,
    gates,
    weight,
    out,
    keep,
):
    o_slc, lse = selected_forward(q, k, v, block_indices, blocks, block_size, scale, causal, True)
    out = emulated_kernels.gating_forward(o_cmp, o_slc, o_win, q, gates, weight, out)
    return out, o_slc if keep else None, lse


def selected_backward(
    dout, q, k, v, statistics, block_indices, blocks, block_size, scale, causal,
    deterministic=False, sums=None, others=None,
):  # fmt: skip
    mask = _selected_mask(q, k, block_indices, blocks, block_size, causal)
    assert all(x.shape == q.shape[:2] for x in statistics)
    by_head = RowStatistics(*(x.T for x in statistics))
    complete = not (block_indices == LEFT_OUT).any()
    grads = emulated_fa4.attend_backward(dout, q, k, v, by_head, mask, scale, complete)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    if others is not None:
        by_entry = dq.unflatten(0, (others.sums.shape[0], -1))
        arguments = (others.sums, by_entry, others.dlogits, others.weight, scale, others.out)
        dq = emulated_kernels.gradient_of_sums(*arguments).view(q.shape)
    return emulated_kernels.added(dq, dk, dv, sums, scale)


def row_statistics(dout, out, lse, dlse):
    assert lse.shape == out.shape[:2]
    assert dlse is None or (dlse.shape, dlse.dtype) == (lse.shape, lse.dtype)
    by_head = emulated_fa4.row_statistics(dout, out, lse.T, None if dlse is None else dlse.T)
    return RowStatistics(*(x.T.contiguous() for x in by_head))


def join_near_blocks(window, selected, block_indices, batch, first, block_size):
    """By the sum of both probabilities."""
    tokens, kv_heads, _ = block_indices.shape
    heads, length = len(window.delta), tokens // batch
    assert all(x.shape == (heads, tokens) and x.is_contiguous() for x in window)
    assert all(x.shape == (tokens, heads) and x.is_contiguous() for x in selected)
    selected = RowStatistics(*(x.T for x in selected))
    weights = [torch.exp2(-x.lse_log2) for x in (window, selected)]
    total = weights[0] + weights[1]
    delta = weights[0] * window.delta + weights[1] * selected.delta
    both = RowStatistics(-total.log2(), torch.where(total > 0, delta / total, 0))
    own = ((torch.arange(tokens, device=total.device) % length + first) // block_size).int()
    own = own[:, None, None]
    others = torch.where(
        (block_indices >= 0) & ((block_indices == own) | (block_indices == own - 1)),
        LEFT_OUT,
        block_indices,
    )
    listed = [(block_indices == x).any(-1) & (x >= 0)[..., 0] for x in (own, own - 1)]
    # The others have the window alone.
    listed.append(torch.zeros_like(listed[0]))
    kinds = torch.stack(listed).repeat_interleave(heads // kv_heads, -1).mT
    rows = -(-length // 128) * 128
    joint = []
    for x, y, padding in zip(both, window, (torch.inf, 0), strict=True):
        by_entry = torch.where(kinds, x, y).unflatten(2, (batch, length)).permute(2, 1, 0, 3)
        joint.append(torch.nn.functional.pad(by_entry, (0, rows - length), value=padding))
    return RowStatistics(*(x.contiguous() for x in joint)), others.contiguous()


def _selected_mask(q, k, block_indices, blocks, block_size, causal) -> Tensor:
    """The pairs ``(H, T, Tk)`` that the lists and the mask allow."""
    total, (num_keys, num_kv_heads) = q.shape[0], k.shape[:2]
    assert block_indices.shape[:2] == (total, num_kv_heads)
    assert block_indices.dtype == torch.int32
    _check_blocks(blocks, total, num_keys, block_size)
    num_blocks = len(blocks.first)
    valid = (block_indices >= 0) & (block_indices < blocks.limit[:, None, None])
    listed = torch.where(valid, blocks.base[:, None, None] + block_indices, num_blocks).long()
    assert (listed <= num_blocks).all()
    chosen = block_indices.new_zeros(total, num_kv_heads, num_blocks + 1)
    chosen.scatter_add_(-1, listed, torch.ones_like(listed, dtype=torch.int))
    assert (chosen[..., :num_blocks] <= 1).all(), "a block is listed twice"
    row = torch.arange(total, device=q.device)
    visible = torch.zeros(total, num_kv_heads, num_keys, dtype=torch.bool, device=q.device)
    tables = (blocks.first, blocks.keys, blocks.row)
    for block, (first, keys, first_row) in enumerate(zip(*map(Tensor.tolist, tables), strict=True)):
        key = torch.arange(keys, device=q.device)
        seen = chosen[:, :, block, None].bool().expand(-1, -1, keys)
        if causal:
            seen = seen & (key <= row[:, None] - first_row)[:, None]
        visible[:, :, first : first + keys] |= seen
    return visible.transpose(0, 1).repeat_interleave(q.shape[1] // num_kv_heads, dim=0)


def _check_blocks(blocks, total: int, num_keys: int, block_size: int) -> None:
    """Check what the contract says of ``TokenBlocks``."""
    assert all(x.dtype == torch.int32 for x in blocks[:7])
    assert blocks.base.shape == blocks.limit.shape == blocks.run_base.shape == (total,)
    assert blocks.first.shape == blocks.keys.shape == blocks.row.shape
    first, keys, row = (x.long() for x in (blocks.first, blocks.keys, blocks.row))
    assert ((keys >= 0) & (keys <= block_size)).all()
    assert ((first >= 0) & (first + keys <= num_keys))[keys > 0].all()
    # Where the token's own block is a run, it has the token; runs ascend.
    real = blocks.limit > 0
    token = torch.arange(total, device=real.device)[real]
    base = blocks.base.long()[real]
    own = (token - row[base]) // block_size
    place = token - row[base] - own * block_size
    assert (own >= 0).all(), "a token stands before its sequence"
    assert (place < keys[base + own]).all(), "a token stands past its sequence"
    assert torch.equal(row[base + own], row[base] + own * block_size)
    run, run_first = blocks.run_base.long()[real] + own, blocks.run_first.long()
    end = torch.cat((run_first[1:], run_first.new_tensor([total])))
    assert (run_first[run] <= token).all(), "a token precedes its run"
    assert (token < end[run]).all(), "a token is past its run"
    assert (run.diff() >= 0).all()
    for length in (1, block_size, 3 * block_size + 1):
        runs = run[: 1 - length or None], run[length - 1 :]
        if len(runs[1]):
            assert (runs[1] - runs[0] < blocks.most_runs(length, block_size)).all()
