"""Emulations of the kernels of ``nsa.fused.kernels`` in plain PyTorch, for any float dtype.

They have the kernels' names and arguments, and return contiguous results like the kernels. Sums are
in float32 for 16-bit inputs, else in the dtype of the inputs, so float64 stays float64.
"""

import math

import torch
from torch import Tensor

from nsa.fused.hardware import LOG2_E
from nsa.fused.kernel_inputs import MOST_FEW_KEYS, multiplies_gates, new_statistics
from nsa.precision import accumulation_dtype
from nsa.segments import locate_items
from tests.helpers import emulated_fa4
from tests.helpers.poison import poisoned_memory

NAMES = (
    "gating_forward",
    "gating_backward",
    "few_key_deltas",
    "query_gradient",
    "gradient_of_sums",
    "mean_forward",
    "mean_backward",
    "rotate",
    "gather_blocks",
    "scatter_blocks",
    "activation_gradient",
    "column_sums",
    "split_product",
    "product_gradient",
    "list_key_blocks",
    "count_query_tiles",
    "list_query_tiles",
    "listed_backward",
    "round_sums",
    "round_listed_sums",
    "top_blocks",
    "top_blocks_and_groups",
    "float32_products",
    "tile_scores",
)
"""The functions of ``nsa.fused.kernel_calls`` that are answered here."""

_UNWRITTEN = -7


def gating_forward(
    o_cmp, o_slc, o_win, q, gates, weight, out=None, placements=(None, None)
) -> Tensor:
    dtype = accumulation_dtype(o_cmp.dtype)
    o_cmp, o_slc = (_read(x, p, o_win) for x, p in zip((o_cmp, o_slc), placements, strict=True))
    branches = torch.stack((o_cmp, o_slc, o_win), dim=-2).to(dtype)
    g = _gates(o_cmp, q, gates, weight)
    return _written((g[..., None] * branches).sum(dim=-2).to(o_cmp.dtype), out)


def gating_backward(
    dout, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, q, gates, weight,
    statistics_placements, placements=(None, None),
):  # fmt: skip
    dtype = accumulation_dtype(o_cmp.dtype)
    placed, lses = (o_cmp, o_slc, o_win), (lse_cmp, lse_slc, lse_win)
    o_cmp, o_slc = (_read(x, p, o_win) for x, p in zip(placed[:2], placements, strict=True))
    branches = torch.stack((o_cmp, o_slc, o_win), dim=-2).to(dtype)
    g, wide = _gates(o_cmp, q, gates, weight), dout[..., None, :].to(dtype)
    dbranches = wide.expand_as(branches)
    multiplies = multiplies_gates(q.dtype, gates, weight)
    if multiplies:
        dbranches = (g[..., None] * wide).to(dout.dtype).to(dtype)
    delta = (dbranches * branches).sum(-1)
    douts, statistics = [], []
    for i, (x, placement) in enumerate(zip(placed, (*placements, None), strict=True)):
        written = multiplies or placement is not None
        dbranch = dbranches[..., i, :].to(dout.dtype).contiguous()
        douts.append(_write(dbranch, placement, x) if written else dout)
    for i, (lse, placement) in enumerate(zip(lses, statistics_placements, strict=True)):
        assert (lse is None) == (placement is None)
        if lse is None:
            statistics.append(None)
            continue
        assert lse.dtype == dtype
        value = _read(lse[..., None], placement, o_win[..., :1])[..., 0]
        value = (value * LOG2_E).masked_fill(value == -torch.inf, torch.inf)
        if not multiplies:
            value = value - g[..., i].log2()
        # What the kernel does not write is not emulated: it stays as its launcher makes it.
        with poisoned_memory():
            statistics.append(new_statistics(lse, placement, value.numel()))
        for x, numbers in zip(statistics[-1], (value, delta[..., i]), strict=True):
            _write_vectors(numbers[..., None].detach(), placement, x)
    results = (tuple(douts), tuple(statistics))
    dgates = torch.einsum("...hd,...hid->...hi", dout.to(dtype), branches)
    if gates is not None:
        return *results, None, dgates.to(gates.dtype).contiguous(), None
    if weight is None:
        return *results, None, None, None
    dlogits = (dgates * g * (1 - g)).contiguous()
    rows = (x.flatten(0, -3) for x in (dlogits, q.to(dtype)))
    dweight = torch.einsum("rhi,rhd->hid", *rows).to(weight.dtype).contiguous()
    return *results, dlogits, None, dweight


def few_key_deltas(dout, q, k, v, statistics, few, scale, statistics_placement, placement) -> None:
    assert all(x.dtype == torch.int32 for x in few)
    lse_log2, delta = statistics
    dtype, group = accumulation_dtype(q.dtype), q.shape[-2] // k.shape[-2]
    dout, q = (x.flatten(0, -3).to(dtype) for x in (_read(dout, placement, q), q))
    k, v = (x.flatten(0, -3).to(dtype).repeat_interleave(group, 1) for x in (k, v))
    places = _vectors(statistics_placement, q)
    query, first, count = (x.long() for x in few)
    # The kernel reads the keys of a row that is none, too.
    assert ((first >= 0) & (count > 0) & (first + count <= len(k))).all()
    query, first, count = (x[query >= 0] for x in (query, first, count))
    assert ((count >= 2) & (count <= MOST_FEW_KEYS)).all()
    place = torch.arange(MOST_FEW_KEYS, device=q.device)
    seen, at = (place < count[:, None])[:, None], places[query]
    keys = (first[:, None] + place).clamp(max=len(k) - 1)
    scores = torch.einsum("rhd,rkhd->rhk", q[query], k[keys]) * scale
    weights = (scores * LOG2_E - lse_log2.view(-1)[at, None]).exp2().where(seen, 0)
    total = weights.sum(-1)
    products = torch.einsum("rhd,rkhd->rhk", dout[query], v[keys])
    product = (weights * products).where(seen, 0).sum(-1)
    delta.view(-1)[at] = torch.where(total > 0, product / total, delta.view(-1)[at])


def rotate(x, other, bounds, origin, start, step, theta, inverse):
    """Angles of the form in which the kernel has them: 64 bits of a turn, of which 32 are used."""
    if other is not None:
        assert other.shape == (*x.shape[:-2], other.shape[-2], x.shape[-1])
        angles = (bounds, origin, start, step, theta, inverse)
        return rotate(x, None, *angles)[0], rotate(other, None, *angles)[0]
    return _rotated(x, bounds, origin, start, step, theta, inverse).to(x.dtype), None


def _rotated(x, bounds, origin, start, step, theta, inverse) -> Tensor:
    """The same of one tensor, not rounded."""
    rows, half = x.shape[-3], x.shape[-1] // 2
    assert x.shape[-1] % 16 == 0
    assert theta >= 1
    index = torch.arange(rows, device=x.device)
    if bounds is not None:
        assert bounds.dtype == torch.int32
        owner, index = locate_items(bounds.long(), rows)
        if origin is not None:
            assert origin.dtype == torch.int32
            index += (bounds[:-1] - origin)[owner]
    twice = round(2 * start) + 2 * step * index
    channel = torch.arange(half, device=x.device, dtype=torch.float64)
    frequency = (2**63 / (2 * torch.pi) * theta ** (-channel / half)).long()
    bits = twice[:, None] * frequency  # modulo 2**64
    if x.dtype in (torch.float16, torch.bfloat16):
        bits = bits >> 32 << 32
    angle = (bits.double() * (2 * torch.pi / 2**64)).to(accumulation_dtype(x.dtype))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None] * (-1 if inverse else 1)
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def gather_blocks(x, position, places) -> Tensor:
    assert x.shape[-1] % 8 == 0
    assert position.dtype == x.dtype
    tokens, real = _tokens_of_blocks(places, x.device)
    dtype, flat = accumulation_dtype(x.dtype), x.flatten(0, -3)
    blocks = flat.new_zeros(*tokens.shape, *x.shape[-2:])
    blocks[real] = flat[tokens[real]]
    blocks = blocks.transpose(1, 2)
    if position.ndim == 3:
        blocks = blocks.unflatten(1, (len(position), -1)).transpose(0, 1)
        position = position[:, None, None]
    return (blocks.to(dtype) + position.to(dtype)).to(x.dtype).contiguous()


def scatter_blocks(drows, shape, places) -> Tensor:
    return _sums_over_blocks(drows, shape, places).to(drows.dtype)


def _sums_over_blocks(drows, shape, places) -> Tensor:
    """The same, not rounded."""
    tokens, real = _tokens_of_blocks(places, drows.device)
    if drows.ndim == 5:
        drows = drows.transpose(0, 1).flatten(1, 2)
    assert drows.shape == (places.blocks, shape[-2], places.block_size, shape[-1])
    rows = drows.transpose(1, 2).to(accumulation_dtype(drows.dtype))
    dx = rows.new_zeros(math.prod(shape[:-2]), *shape[-2:])
    dx.index_add_(0, tokens[real].flatten(), rows[real].flatten(0, 1))
    return dx.view(shape)


def split_product(
    product, heads, kv_heads, branches, head_dim, width, bounds, theta
) -> tuple[Tensor, ...]:
    assert product.ndim == 3
    counts = [heads, *[kv_heads] * (2 * branches)]
    assert product.shape[-1] >= sum(counts) * head_dim
    parts = product[..., : sum(counts) * head_dim].unflatten(-1, (-1, head_dim)).split(counts, -2)
    angles = (bounds, None, 0.0, 1, theta, False)
    rotated = [
        x if i and i % 2 == 0 else _rotated(x, *angles).to(x.dtype) for i, x in enumerate(parts)
    ]
    results = [x.new_zeros(*x.shape[:-1], width) for x in parts]
    for result, x in zip(results, rotated, strict=True):
        result[..., :head_dim] = x
    return tuple(results)


def product_gradient(gradients, dhidden, drows, places, head_dim, bounds, theta) -> Tensor:
    q, *others = gradients
    assert q.ndim == 4
    assert all(x.shape == (*q.shape[:2], others[0].shape[-2], q.shape[-1]) for x in others)
    angles = (bounds, None, 0.0, 1, theta, True)
    dtype = accumulation_dtype(q.dtype)
    parts = [
        x.to(dtype) if i and i % 2 == 0 else _rotated(x, *angles)
        for i, x in enumerate(x[..., :head_dim] for x in gradients)
    ]
    assert (drows is None) == (places is None)
    if drows is not None and places is not None:
        assert drows.shape[0] == 2
        kv_heads = others[0].shape[-2]
        dboth = _sums_over_blocks(drows, (*q.shape[:2], 2 * kv_heads, head_dim), places)
        parts[1:3] = (a + b for a, b in zip(parts[1:3], dboth.split(kv_heads, -2), strict=True))
    columns = [x.flatten(-2).to(q.dtype) for x in parts]
    if dhidden is not None:
        assert dhidden.dtype == q.dtype
        columns.append(dhidden.view(*q.shape[:2], -1))
    return torch.cat(columns, -1)


def _tokens_of_blocks(places, device) -> tuple[Tensor, Tensor]:
    """The flat tokens of each block, ``(M, l)``, and which rows are blocks."""
    block = torch.arange(places.blocks, device=device)
    if places.token_bounds is None:
        entry, local = block // max(1, places.entry_blocks), block % max(1, places.entry_blocks)
        first, real = entry * places.entry_tokens, torch.ones_like(block, dtype=torch.bool)
    else:
        bounds, starts = places.block_bounds.long(), places.token_bounds.long()
        assert places.block_bounds.dtype == places.token_bounds.dtype == torch.int32
        owner, local = locate_items(bounds, places.blocks)
        first, real = starts[owner], block < bounds[-1]
    first = first + local * places.stride
    return first[:, None] + torch.arange(places.block_size, device=device), real


def activation_gradient(kind, dy, x, sums) -> Tensor | None:
    assert kind in ("sigmoid", "silu")
    assert (dy.shape, dy.dtype) == (x.shape, x.dtype)
    assert dy.is_contiguous()
    wide, active = x.to(accumulation_dtype(x.dtype)), None
    if kind == "sigmoid":
        derivative = wide * (1 - wide)
    else:
        share = wide.sigmoid()
        active = wide * share
        derivative = share + active * (1 - share)
        active = active.to(x.dtype).contiguous()
    dx = dy.to(wide.dtype) * derivative
    _write_sums(dx, sums, x.dtype)
    dy.copy_(dx)
    return active


def column_sums(x, sums, other, other_sums) -> None:
    _write_sums(x, sums, x.dtype)
    if other is not None:
        _write_sums(other, other_sums, x.dtype)


def _write_sums(x, sums, dtype) -> None:
    assert x.ndim in (2, 3)
    assert sums.shape == (*x.shape[:-2], x.shape[-1])
    assert sums.dtype == dtype
    assert sums.is_contiguous()
    sums.copy_(x.to(accumulation_dtype(x.dtype)).sum(-2))


def listed_backward(
    dout, q, k, v, statistics, lists, scale, key_limit, deterministic=False, sums=None
):
    """The same as ``sparse_backward``, but by query tile and from the forward's lists."""
    assert lists.key_block == 64
    assert q.shape[1] % lists.query_block == 0, (q.shape, lists.query_block)
    assert k.shape[1] % lists.key_block == 0, k.shape
    assert k.shape == v.shape, (k.shape, v.shape)
    grads = emulated_fa4.listed_gradients(
        dout, q, k, v, statistics, lists, scale=scale, causal=key_limit is None, key_limit=key_limit
    )
    return added(*(x.contiguous() for x in grads), sums, scale)


def added(dq, dk, dv, sums, scale):
    """Gradients, of which those of keys and values are added to ``sums`` if given."""
    if sums is None:
        return dq, dk, dv
    for total, grad, factor in zip(sums, (dk, dv), (scale, 1.0), strict=True):
        assert total.is_contiguous()
        assert total.dtype == accumulation_dtype(grad.dtype)
        total.add_(grad.view(total.shape).to(total.dtype) / factor)
    return dq, *sums


def round_listed_sums(sums, outs, factors, last=None, dmeans=None, block_size=1) -> None:
    assert all(x.shape[-3] % 64 == 0 for x in sums)
    _round_sums(sums, outs, factors, last, dmeans, block_size)


def round_sums(sums, outs, factors, last=None) -> None:
    _round_sums(sums, outs, factors, last)


def _round_sums(sums, outs, factors, last, dmeans=None, block_size=1) -> None:
    """Each rounded once."""
    lasts, means = ([None] * len(sums) if x is None else x for x in (last, dmeans))
    assert len(sums) in (1, 2)
    for total, out, factor, added, dmean in zip(sums, outs, factors, lasts, means, strict=True):
        assert total.is_contiguous()
        assert out.is_contiguous()
        assert total.shape == out.shape
        total = total * factor
        if added is not None:
            assert added.dtype == out.dtype
            total[..., total.shape[-3] - added.shape[-3] :, :, :] += added
        if dmean is not None:
            assert dmean.dtype in (out.dtype, torch.float32)
            share = dmean.to(total.dtype).repeat_interleave(block_size, dim=-3) / block_size
            total[..., : share.shape[-3], :, :] += share
        out.copy_(total)


def query_gradient(
    dq_cmp, dq_slc, dq_win, dlogits, weight, out=None, placements=(None, None)
) -> Tensor:
    dtype = accumulation_dtype(dq_cmp.dtype)
    branches = zip((dq_cmp, dq_slc), placements, strict=True)
    dq_cmp, dq_slc = (_read(x, placement, dq_win) for x, placement in branches)
    dq = dq_cmp.to(dtype) + dq_slc.to(dtype) + dq_win.to(dtype)
    if weight is not None:
        assert dlogits.dtype == dtype
        dq += torch.einsum("...hi,hid->...hd", dlogits, weight.to(dtype))
    return _written(dq.to(dq_cmp.dtype), out)


def gradient_of_sums(sums, dq_slc, dlogits, weight, scale, out=None) -> Tensor:
    dtype, length = accumulation_dtype(dq_slc.dtype), dq_slc.shape[1]
    others = emulated_fa4.rows_of_sums(sums, dq_slc)[:, :, :length].transpose(1, 2) * scale
    zeros = torch.zeros_like(dq_slc, dtype=dtype)
    dq = query_gradient(others, dq_slc.to(dtype), zeros, dlogits, weight)
    return _written(dq.to(dq_slc.dtype), out)


def _vectors(placement, like) -> Tensor:
    """The vector of each token and head of ``like (..., H, D)``, -1 for none: ``(R, H)``."""
    place = placement.place
    if place is None:
        place = torch.arange(math.prod(like.shape[:-2]), dtype=torch.int32, device=like.device)
    assert place.dtype == torch.int32
    place, head = place.long()[:, None], torch.arange(like.shape[-2], device=like.device)
    group, member = head // placement.group, head % placement.group
    in_place = group * placement.group_stride + member * placement.head_stride
    return torch.where(place >= 0, place * placement.unit + in_place, -1)


def _read(x, placement, like) -> Tensor:
    """Read ``x`` in the form of ``like (..., H, D)``."""
    if placement is None:
        return x
    assert x.is_contiguous()
    index = _vectors(placement, like)
    vectors = x.view(-1, x.shape[-1])[index.clamp(min=0)]
    return torch.where(index[..., None] >= 0, vectors, 0).view(like.shape)


def _write(rows, placement, like) -> Tensor:
    """Write ``rows (..., H, D)`` in the form of ``like``, with zeros between."""
    if placement is None:
        return rows
    result = torch.zeros(like.shape, dtype=rows.dtype, device=rows.device)
    _write_vectors(rows, placement, result)
    return result


def _write_vectors(rows, placement, result) -> None:
    """Write ``rows (..., H, D)`` to the vectors of ``result`` where they lie."""
    rows, index = rows.flatten(0, -3), _vectors(placement, rows)
    used = index >= 0
    assert index[used].unique().numel() == used.sum(), "tokens share a vector"
    result.view(-1, rows.shape[-1])[index[used]] = rows[used]


def _written(result, out) -> Tensor:
    return result.contiguous() if out is None else out.copy_(result)


def _gates(o_cmp, q, gates, weight) -> Tensor:
    """The gates, ``(..., H, 3)``."""
    dtype = accumulation_dtype(o_cmp.dtype)
    if gates is not None and weight is not None:
        raise ValueError("gates and weight are both given; at most one of them may be")
    if gates is not None:
        return gates.to(dtype)
    if weight is not None:
        return torch.einsum("...hd,hid->...hi", q.to(dtype), weight.to(dtype)).sigmoid()
    return torch.full((*o_cmp.shape[:-1], 3), 1 / 3, dtype=dtype, device=o_cmp.device)


def mean_forward(x, start, block_size, out_dtype, other=None, in_order=False) -> Tensor:
    if other is not None:
        assert (other.shape, other.dtype) == (x.shape, x.dtype)
        sizes = (start, block_size, out_dtype)
        return torch.stack([mean_forward(i, *sizes, in_order=in_order) for i in (x, other)])
    assert x.shape[-1] % 8 == 0, "the kernel loads 16 bytes of channels"
    rows, used = x.flatten(0, -3), start >= 0
    token = start[used].long()[:, None] + torch.arange(block_size, device=x.device)
    dtype = accumulation_dtype(x.dtype)
    mean = torch.zeros((len(start), *x.shape[-2:]), dtype=dtype, device=x.device)
    tokens = rows[token].to(dtype)
    total = sum(tokens.unbind(1)) if in_order else tokens.sum(dim=1)
    mean[used] = total / block_size
    return mean.to(out_dtype).view(*_leading(x, len(start)), *x.shape[-2:])


def mean_backward(dmeans, blocks, block_size, dtype, addends=None) -> tuple[Tensor, Tensor]:
    used = (blocks >= 0)[..., None, None]
    assert dmeans[0].dtype == dmeans[1].dtype
    assert dmeans[0].dtype in (dtype, torch.float32)
    results = []
    for i, dmean in enumerate(dmeans):
        rows = dmean.flatten(0, -3).to(accumulation_dtype(dtype))
        # An extra row, so that there is at least one.
        share = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 1))[blocks.long().clamp(min=0)]
        dx = share.masked_fill(~used, 0).sum(dim=1) / block_size
        dx = dx.view(*_leading(dmean, len(blocks)), *dmean.shape[-2:])
        if addends is not None:
            first, last = (pair[i] for pair in addends)
            assert (first.shape, first.dtype, last.dtype) == (dx.shape, dtype, dtype)
            dx = dx + first.to(dx.dtype)
            dx[..., dx.shape[-3] - last.shape[-3] :, :, :] += last.to(dx.dtype)
        dx = dx.to(dtype)
        apart = addends is not None and not addends[0][i].is_contiguous()
        # A slice of heads has its tokens apart too.
        apart = apart and addends[0][i].transpose(-2, -3).is_contiguous()
        results.append(dx if addends is None or apart else addends[0][i].copy_(dx))
    return tuple(results)


def _leading(x, rows) -> tuple[int, ...]:
    """The leading dimensions of ``x (..., R, H, D)``, with the same ``rows`` for each entry."""
    leading = x.shape[:-3]
    return (*leading, rows // max(1, leading.numel()))


def list_key_blocks(indices, first, num_blocks, num_full, parts, entry_blocks):
    batch = len(indices)
    part = torch.arange(parts, device=indices.device)
    block = (indices[..., None] * parts + part).flatten(-2)  # (B, tiles, H, n * parts)
    listed = (block >= 0) & (block < num_blocks[:, None, None])
    entry = torch.arange(batch, device=indices.device).view(-1, 1, 1, 1)
    in_row = block + first[:, None, None] + entry * entry_blocks
    width = min(block.shape[-1], batch * entry_blocks)
    if num_full is None:
        return (*_listed_first(in_row, listed, width), None, None)
    full = listed & (block < num_full[:, None, None])
    partial = _listed_first(in_row, listed & ~full, width)
    return (*partial, *_listed_first(in_row, full, width))


def _listed_first(block, listed, width):
    """Count and index, ``(1, H, B * tiles, ...)``, from blocks ``(B, tiles, H, ...)``."""
    index = block.gather(-1, (~listed).int().argsort(dim=-1, stable=True))
    count = listed.sum(-1, keepdim=True)
    used = torch.arange(block.shape[-1], device=block.device) < count
    index = torch.where(used, index, _UNWRITTEN)[..., :width]
    return tuple(
        x.flatten(0, 1).transpose(0, 1).int().contiguous()[None] for x in (count[..., 0], index)
    )


def count_query_tiles(count, index, num_blocks):
    head, _, block = _entries(count, index)
    counts = torch.bincount(head * num_blocks + block, minlength=index.shape[1] * num_blocks)
    return counts.view(1, -1, num_blocks).int()


def list_query_tiles(count, index, num_blocks, width):
    counts = count_query_tiles(count, index, num_blocks)
    head, tile, block = _entries(count, index)
    row, order = (head * num_blocks + block).sort(stable=True)
    start = counts.flatten().cumsum(0) - counts.flatten()
    rank = torch.arange(len(row), device=row.device) - start[row]
    tiles = index.new_full((counts.numel(), width), _UNWRITTEN)
    tiles[row, rank] = tile[order].int()
    return counts, tiles.view(*counts.shape, width)


def _entries(count, index):
    """Head, tile and key block of each entry, ordered by head and tile."""
    used = torch.arange(index.shape[-1], device=index.device) < count[0, ..., None]
    head, tile, _ = used.nonzero(as_tuple=True)
    return head, tile, index[0][used].long()


def top_blocks(
    scores, first, visible, candidates, own, out,
    *, tile_offset, column_offset, scale, per_block, num_initial, num_local,
) -> None:  # fmt: skip
    assert all(x.is_contiguous() for x in (scores, out))
    assert out.dtype == torch.int32
    tiles = slice(tile_offset, tile_offset + scores.shape[2])
    vectors = (first, visible, candidates, own)
    assert all(x.dtype == torch.int32 and x.shape == out.shape[1:2] for x in vectors)
    first, visible, candidates, own = (x[tiles, None].long() for x in vectors)
    start = first - column_offset
    used = visible > 0
    assert (start >= 0)[used].all()
    assert (start + visible <= scores.shape[-1])[used].all()

    num_blocks = max(int(candidates.max()), -(-int(visible.max()) // per_block))
    index = torch.arange(num_blocks * per_block, device=scores.device)
    # An extra column for the tokens that are not visible.
    column = torch.where(index < visible, start + index, scores.shape[-1])
    scores = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)
    scores = scores.gather(-1, column.expand(*scores.shape[:3], -1)) * scale
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    block = torch.arange(num_blocks, device=scores.device)
    best = scores.unflatten(-1, (num_blocks, per_block)).amax(-1)
    best = best.masked_fill(block >= candidates, -torch.inf)
    forced = (block <= own) & (block < candidates)
    forced &= (block < num_initial) | (block > own - num_local)
    # Sort by score, then put forced blocks first. Stable sorts let the lower index win a tie.
    order = best.sort(dim=-1, descending=True, stable=True).indices
    forced = forced.expand_as(order)
    rank = forced.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, rank)[..., : out.shape[-1]]
    taken = (best.gather(-1, order) > -torch.inf) | forced.gather(-1, order)
    order = torch.where(taken, order, num_blocks).sort(dim=-1).values
    order = torch.where(order < num_blocks, order, -1)
    order = torch.nn.functional.pad(order, (0, out.shape[-1] - order.shape[-1]), value=-1)
    out[:, tiles] = order.transpose(1, 2).int()


def top_blocks_and_groups(
    scores, first, visible, candidates, own, blocks, groups,
    *, tile_offset, column_offset, scale, per_block, per_group, num_initial, num_local,
) -> None:  # fmt: skip
    places = dict(tile_offset=tile_offset, column_offset=column_offset, scale=scale)
    forced = dict(num_initial=num_initial, num_local=num_local)
    top_blocks(
        *(scores, first, visible, candidates, own, blocks),
        **places, per_block=per_block, **forced,
    )  # fmt: skip
    top_blocks(
        *(scores, first, visible, visible, own, groups),
        **places, per_block=per_group, num_initial=0, num_local=0,
    )  # fmt: skip


def tile_scores(summary, k_cmp) -> Tensor:
    assert summary.shape[-1] % 8 == 0, "the kernel loads 16 bytes of channels"
    dtype = accumulation_dtype(k_cmp.dtype)
    assert summary.dtype in (k_cmp.dtype, dtype)
    batch, tiles, heads, head_dim = summary.shape
    num_keys, num_kv_heads = k_cmp.shape[1:3]
    rows = summary.double().transpose(1, 2).reshape(batch * num_kv_heads, -1, 1, head_dim)
    keys = k_cmp.double().transpose(1, 2).reshape(batch * num_kv_heads, 1, num_keys, head_dim)
    # Equal keys must get equal products, which a matrix product does not guarantee.
    return (rows * keys).sum(-1).to(dtype).view(batch, heads, tiles, num_keys)


def float32_products(a, b) -> Tensor:
    assert a.dtype == b.dtype == torch.bfloat16
    return a.float() @ b.float()
