"""Emulations of the kernels of decoding, in PyTorch and in any dtype.

They split work and choose references at random, which what follows must not notice. Each reads and
writes only what the contract in ``nsa.fused.decode_calls`` allows: outputs start as NaN, and pages
are looked up one token at a time.
"""

import math

import torch
from torch import Tensor

from nsa.fused.decode_inputs import (
    CLUSTERS,
    MAX_LISTED,
    MAX_TOKENS,
    NO_REFERENCE,
    SLOT_GROUP,
    TILE_KEYS,
    Parts,
    Records,
    Schedule,
    TileLists,
    can_unite,
    most_groups,
    most_sharing,
    record_groups,
    record_order,
)
from nsa.precision import accumulation_dtype

NAMES = (
    "decode_append",
    "decode_compressed",
    "decode_tile_select",
    "decode_select",
    "decode_units",
    "decode_finish",
    "decode_attend",
)
"""The functions of ``nsa.fused.decode_calls`` that are answered here."""


def decode_append(
    k, v, pool, compressed, table, lengths, overflowed, max_length, cu_seqlens, shape, rule
):
    assert table.dtype == lengths.dtype == torch.int32
    assert overflowed.dtype == torch.bool
    starts, ends = lengths.clone(), lengths.clone()
    for sequence, row0, new in _sequences(cu_seqlens, shape):
        assert new <= MAX_TOKENS
        start = int(starts[sequence])
        stored = 0
        while stored < new and _has_place(table, pool, sequence, start + stored, max_length):
            stored += 1
        overflowed |= stored < new
        ends[sequence] = start + stored
        for position in range(start, start + stored):
            row = row0 + position - start
            for store, x in zip(pool, (k, v), strict=True):
                store[_place(table, store, sequence, position)] = x[row]
        for end in range(start + 1, start + stored + 1):
            if end % rule.stride or end < rule.compress_size:
                continue
            positions = range(end - rule.compress_size, end)
            places = [_place(table, pool.k, sequence, position) for position in positions]
            for store, source in zip(compressed, pool, strict=True):
                x = torch.stack([source[place] for place in places])
                mean = sum(x.to(accumulation_dtype(x.dtype)).unbind()) / rule.compress_size
                store[_place(table, store, sequence, end // rule.stride - 1)] = mean.to(x.dtype)
    limit = min(max_length, table.shape[1] * pool.k.shape[1])
    counts = [
        tiles_of(min(int(start) + new, limit), rule) if new else 0
        for start, (_, _, new) in zip(starts, _sequences(cu_seqlens, shape), strict=True)
    ]
    total = sum(counts)
    least = max(1, -(-total * shape.sequence_units // shape.ctas))
    share = least + int(torch.randint(4, ()))
    tiles = [share, *[sum(counts[:b]) for b in range(shape.batch)], total]
    return Schedule(starts, ends, torch.tensor(tiles, dtype=torch.int32, device=k.device))


def tiles_of(end: int, rule) -> int:
    """Tiles of the slots of a sequence of ``end`` tokens."""
    slots = end // rule.stride
    return -(-slots // TILE_KEYS) if slots > rule.carried else 0


def decode_compressed(
    q, pool, table, schedule, cu_seqlens, shape, rule, scale, records, lengths, limit
):
    assert lengths is None or torch.equal(lengths, schedule.starts)
    assert int(schedule.ends.max()) <= limit
    dtype = accumulation_dtype(q.dtype)
    slots, rows, dim_v = shape.part_slots, shape.rows, pool.v.shape[-1]
    parts = _empty_parts(slots, rows, dim_v, dtype, q.device)
    groups = most_groups(table, pool.k.shape[1])
    made = None
    if records:
        together = record_groups(shape.row_groups)
        entries = shape.units, rows, groups // together
        made = Records(
            _nans((shape.units, rows, groups * rule.group_blocks), dtype, q.device),
            _nans(entries, dtype, q.device) if rule.carried else None,
            _poisoned_integers(entries, q.device),
        )
    share = int(schedule.tiles[0])
    for sequence, row0, new in _sequences(cu_seqlens, shape):
        start, end = int(schedule.starts[sequence]), int(schedule.ends[sequence])
        first = int(schedule.tiles[sequence + 1])
        tiles = int(schedule.tiles[sequence + 2]) - first
        assert tiles == (tiles_of(min(start + new, limit), rule) if new else 0)
        for local in range(shape.sequence_units if tiles else 0):
            kv_head, token_block = divmod(local, shape.token_blocks)
            token0 = token_block * shape.unit_tokens
            tokens = range(token0, min(token0 + shape.unit_tokens, new))
            unit = sequence * shape.sequence_units + local
            visible = range(rule.carried, end // rule.stride)
            keys, values = (
                torch.stack([x[_place(table, x, sequence, s)][kv_head] for s in visible]).to(dtype)
                for x in pool
            )
            for token in tokens:
                seen = min((start + token + 1) // rule.stride, len(visible) + rule.carried)
                for g in range(shape.group):
                    row = (token - token0) * shape.group + g
                    query = q[row0 + token, kv_head * shape.group + g].to(dtype)
                    # Equal keys must get equal products, which a matrix product does not guarantee.
                    y = torch.full((tiles * TILE_KEYS,), -torch.inf, dtype=dtype, device=q.device)
                    count = max(0, seen - rule.carried)
                    products = (keys[:count] * query).sum(-1) * (scale / math.log(2))
                    y[rule.carried : rule.carried + count] = products
                    _store_compressed_parts(
                        parts, y, values, rule, row, unit,
                        first * shape.sequence_units + local * tiles, share,
                    )  # fmt: skip
                    if made is not None:
                        _store_records(made, y, rule, unit, row, record_groups(shape.row_groups))
    return parts, None if made is None else _as_stored(made, rule, shape)


def _as_stored(records, rule, shape):
    """Records ``(units, rows, ...)`` in the order in which they lie."""
    together = record_groups(shape.row_groups)
    if together == 1:
        return records
    blocks = records.sums.unflatten(2, (-1, together * rule.group_blocks))
    sums = blocks[..., record_order(rule)].transpose(1, 2).contiguous()
    others = (
        None if x is None else x.transpose(1, 2).contiguous()
        for x in (records.carried, records.reference)
    )  # fmt: skip
    return Records(sums, *others)


def records_of_rows(records, rule, shape):
    """Records as ``(units, rows, ...)``, blocks in their order."""
    if record_groups(shape.row_groups) == 1:
        return records
    order = torch.tensor(record_order(rule)).argsort()
    sums = records.sums.transpose(1, 2)[..., order.to(records.sums.device)].flatten(2)
    others = (
        None if x is None else x.transpose(1, 2) for x in (records.carried, records.reference)
    )
    return Records(sums, *others)


def _store_compressed_parts(parts, y, values, rule, row, unit, tile0, share):
    """The parts of a row, whose first tile is tile ``tile0`` of all."""
    tile = tile0
    while tile < tile0 + len(y) // TILE_KEYS:
        cta = tile // share
        stop = min((cta + 1) * share, tile0 + len(y) // TILE_KEYS)
        span = slice((tile - tile0) * TILE_KEYS, (stop - tile0) * TILE_KEYS)
        padded = torch.cat([values.new_zeros(rule.carried, values.shape[1]), values])
        here = values.new_zeros(span.stop - span.start, values.shape[1])
        some = padded[span]
        here[: len(some)] = some
        _store_part(parts, cta + unit, row, y[span], here)
        tile = stop


def _store_part(parts, slot, row, y, values):
    """Attention with exponents ``y``, relative to some integer."""
    reference = _some_reference(y)
    assert int(parts.reference[slot, row]) != NO_REFERENCE, "a part is written twice"
    parts.reference[slot, row] = reference
    power = torch.exp2(y - reference) if int(reference) != NO_REFERENCE else torch.zeros_like(y)
    parts.total[slot, row] = power.sum()
    parts.out[slot, row] = power @ values


def _store_records(records, y, rule, unit, row, together):
    groups = y.unflatten(0, (-1, SLOT_GROUP * together))
    reference = torch.stack([_some_reference(group) for group in groups])
    # Products with powers of two are exact, so equal exponents give equal sums.
    whole = groups.round()
    scale = torch.exp2(whole - reference[:, None])
    power = torch.where(groups > -torch.inf, torch.exp2(groups - whole) * scale, 0)
    blocks = power.unflatten(1, (-1, rule.per_select))
    own = _weighted(blocks, lambda i: min(i, rule.carried) + 1)
    back = _weighted(blocks, lambda i: max(rule.carried - i, 0))
    own[:, :-1] += back[:, 1:]
    records.sums[unit, row, : own.numel()] = own.flatten()
    records.reference[unit, row, : len(reference)] = reference
    if rule.carried:
        records.carried[unit, row, : len(back)] = back[:, 0]


def _weighted(power, weight):
    """Sums in a fixed order, so that equal terms give equal sums."""
    return sum(weight(i) * x for i, x in enumerate(power.unbind(-1)))


def decode_finish(
    q, pool, rings, table, parts, records, schedule, cu_seqlens, shape, rule, lists, num_initial,
    num_local, window, scale, gates, weight, lengths, floors, cluster, of_tokens,
):  # fmt: skip
    assert cluster in CLUSTERS
    if of_tokens:
        assert 1 < cluster <= most_sharing(shape.group)
        assert not isinstance(lists, TileLists)
    if records is not None:
        decode_select(
            parts, records, schedule, cu_seqlens, shape, rule, lists, num_initial, num_local
        )
    others = _attend(
        q, pool, rings, table, schedule, cu_seqlens, lists, shape, rule.select_size, window, scale,
        cluster,
    )  # fmt: skip
    tiles = lists if isinstance(lists, TileLists) else None
    return _combine(
        parts, others, schedule, cu_seqlens, q, gates, weight, shape, cluster, lengths, floors,
        tiles,
    )  # fmt: skip


def decode_units(
    q, pool, table, parts, schedule, cu_seqlens, shape, rule, lists, window, scale, gates, weight,
    lengths,
):  # fmt: skip
    assert can_unite((q.shape[-1], pool.v.shape[-1]), shape, rule.select_size, lists.shape[-1])
    return decode_finish(
        q, pool, None, table, parts, None, schedule, cu_seqlens, shape, rule, lists, 0, 0, window,
        scale, gates, weight, lengths, None, 1, False,
    )  # fmt: skip


def decode_select(
    parts, records, schedule, cu_seqlens, shape, rule, lists, num_initial, num_local
) -> None:
    out, count = lists, lists.shape[-1]
    records = records_of_rows(records, rule, shape)
    assert num_initial + num_local <= count <= MAX_LISTED
    assert out.dtype == torch.int32
    assert out.is_contiguous()
    for sequence, row0, new in _sequences(cu_seqlens, shape):
        for token in range(new):
            position = min(int(schedule.starts[sequence]) + token, int(schedule.ends[sequence]) - 1)
            for kv_head in range(shape.kv_heads):
                scores = _block_scores(
                    parts, records, schedule, shape, rule, sequence, token, kv_head, position
                )
                block = torch.arange(len(scores))
                forced = (block < num_initial) | (block >= len(scores) - num_local)
                ranked = scores.masked_fill(forced, torch.inf).sort(descending=True, stable=True)
                taken = ranked.indices[:count].sort().values
                out[row0 + token, kv_head] = -1
                out[row0 + token, kv_head, : len(taken)] = taken


def _block_scores(parts, records, schedule, shape, rule, sequence, token, kv_head, position):
    seen, own = (position + 1) // rule.stride, position // rule.select_size
    local = kv_head * shape.token_blocks + token // shape.unit_tokens
    unit = sequence * shape.sequence_units + local
    slots = range(*_unit_parts(schedule, shape, sequence, local))
    block = torch.arange(own + 1)
    together = record_groups(shape.row_groups)
    entry_blocks = rule.group_blocks * together
    entry = block // entry_blocks
    scored = block * rule.per_select < seen
    last = block % entry_blocks == entry_blocks - 1
    carries = scored & last & ((entry + 1) * together * SLOT_GROUP < seen)
    scores = parts.total.new_zeros(own + 1)
    for g in range(shape.group if slots else 0):
        row = token % shape.unit_tokens * shape.group + g
        reference = parts.reference[slots[0] : slots[-1] + 1, row]
        total = parts.total[slots[0] : slots[-1] + 1, row]
        total = (total * _power(reference - reference.max(), total.dtype)).sum()
        value = torch.zeros_like(scores)
        for chosen, recorded, at, place in (
            (scored, records.sums, block, entry),
            (carries, records.carried, entry + 1, entry + 1),
        ):
            if recorded is not None and chosen.any():
                factor = records.reference[unit, row, place[chosen]] - reference.max()
                value[chosen] += recorded[unit, row, at[chosen]] * _power(factor, value.dtype)
        scores += value * (1 / total)
    return scores


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.exp2(exponent.to(dtype))


def decode_tile_select(
    q, pool, table, schedule, cu_seqlens, shape, rule, scale, tile_size, lists, count, limit,
    num_initial, num_local,
) -> None:  # fmt: skip
    assert num_initial + num_local <= count <= MAX_LISTED
    assert tile_size >= shape.tokens
    assert lists.dtype == torch.int32
    assert lists.is_contiguous()
    dtype = accumulation_dtype(q.dtype)
    for sequence, row0, _ in _sequences(cu_seqlens, shape):
        start, end = int(schedule.starts[sequence]), int(schedule.ends[sequence])
        tile = -(-start // tile_size)
        position = tile * tile_size
        if position >= end:
            continue
        seen = (position + 1) // rule.compress_size
        own = (position + tile_size - 1) // rule.select_size
        keys = [pool.k[_place(table, pool.k, sequence, j)] for j in range(seen)]
        for head in range(shape.kv_heads * shape.group):
            query = q[row0 + position - start, head].to(dtype)
            scores = query.new_full((own + 1 + seen,), -torch.inf)
            for j, key in enumerate(keys):
                score = scale * (key[head // shape.group].to(dtype) * query).sum()
                block = j // rule.per_select
                scores[block] = torch.maximum(scores[block], score)
            block = torch.arange(len(scores))
            scores[(block < num_initial) & (block <= own)] = torch.inf
            scores[(block > own - num_local) & (block <= own)] = torch.inf
            ranked = scores.sort(descending=True, stable=True)
            taken = ranked.indices[:count][ranked.values[:count] > -torch.inf]
            taken = taken[taken < limit].sort().values
            row = lists[sequence, tile % lists.shape[1], head]
            row.fill_(-1)
            row[: len(taken)] = taken


def decode_attend(
    q, pool, table, schedule, cu_seqlens, block_indices, shape, select_size, scale, splits
):
    parts = _attend(
        q, pool, None, table, schedule, cu_seqlens, block_indices, shape, select_size, 0, scale,
        splits,
    )  # fmt: skip
    # Without those of the window, which has no keys.
    return Parts(*(x[::2] for x in parts))


def _attend(
    q, pool, rings, table, schedule, cu_seqlens, block_indices, shape, select_size, window, scale,
    splits,
):  # fmt: skip
    dtype = accumulation_dtype(q.dtype)
    tiles, share, group = None, 1, shape.group
    if isinstance(block_indices, TileLists):
        block_indices, tiles = block_indices
        share, group = group, 1
    num_lists = shape.kv_heads * share
    assert block_indices.dtype == torch.int32
    assert block_indices.shape[-1] <= MAX_LISTED
    slots = q.shape[0] * num_lists * splits * 2
    parts = _empty_parts(slots, group, pool.v.shape[-1], dtype, q.device)
    for sequence, row0, new in _sequences(cu_seqlens, shape):
        for token in range(new):
            position = min(int(schedule.starts[sequence]) + token, int(schedule.ends[sequence]) - 1)
            lists = block_indices[row0 + token] if tiles is None else None
            if tiles is not None:
                lists = block_indices[sequence, position // tiles % block_indices.shape[1]]
            for index in range(num_lists):
                blocks = [b for b in lists[index].tolist() if b >= 0]
                starts = [block * select_size for block in blocks]
                selected = [p for s in starts for p in range(s, s + select_size) if p <= position]
                branches = (selected, range(max(0, position - window + 1), position + 1))
                for branch, positions in enumerate(branches):
                    unit = (row0 + token) * num_lists + index
                    first = unit * splits * 2 + branch
                    rows = q[row0 + token, index * group : (index + 1) * group].to(dtype)
                    places = [_place(table, pool.k, sequence, p) for p in positions]
                    store = pool
                    if branch == 1 and rings is not None:
                        store = rings
                        places = [(sequence, p % rings.k.shape[1]) for p in positions]
                    _attend_in_parts(
                        parts, first, splits, rows, store, places, index // share, scale
                    )
    return parts


def _attend_in_parts(parts, first, splits, rows, pool, places, kv_head, scale):
    """Attention of the rows of a list to keys, cut anywhere."""
    cuts = sorted(torch.randint(len(places) + 1, (splits - 1,)).tolist())
    for split, (low, high) in enumerate(zip([0, *cuts], [*cuts, len(places)], strict=True)):
        slot = first + 2 * split
        if low == high:
            parts.reference[slot] = NO_REFERENCE
            parts.total[slot] = 0
            continue
        keys, values = (
            torch.stack([x[place][kv_head] for place in places[low:high]]).to(rows.dtype)
            for x in pool
        )
        for g, row in enumerate(rows):
            _store_part(parts, slot, g, (keys @ row) * (scale / math.log(2)), values)


def _combine(
    compressed,
    others,
    schedule,
    cu_seqlens,
    q,
    gates,
    weight,
    shape,
    splits,
    lengths,
    floors,
    lists,
):
    dim_v = others.out.shape[-1]
    out = _nans((*q.shape[:2], dim_v), q.dtype, q.device)
    for sequence, row0, new in _sequences(cu_seqlens, shape):
        for token in range(new):
            for head in range(shape.kv_heads * shape.group):
                kv_head, g = divmod(head, shape.group)
                local = kv_head * shape.token_blocks + token // shape.unit_tokens
                slots = range(*_unit_parts(schedule, shape, sequence, local))
                row = token % shape.unit_tokens * shape.group + g
                branches = [_merge(compressed, slots, row)]
                first = ((row0 + token) * shape.kv_heads + kv_head) * splits * 2
                if lists is not None:
                    first, g = ((row0 + token) * q.shape[1] + head) * splits * 2, 0
                for branch in range(2):
                    slots = range(first + branch, first + splits * 2, 2)
                    branches.append(_merge(others, slots, g))
                gate = _gates(q, gates, weight, row0 + token, head, others.total.dtype)
                result = sum(x * y for x, y in zip(gate, branches, strict=True))
                out[row0 + token, head] = result.to(q.dtype)
    lengths.copy_(schedule.ends)
    if lists is not None:
        tile = (schedule.ends - 1).div(lists.tile_size, rounding_mode="floor")
        oldest = (tile - (lists.blocks.shape[1] - 1)) * lists.tile_size
        floors.copy_(torch.maximum(floors, oldest))
    return out


def _gates(q, gates, weight, row, head, dtype):
    if gates is not None:
        return gates[row, head].to(dtype)
    if weight is not None:
        return (weight[head].to(dtype) @ q[row, head].to(dtype)).sigmoid()
    return torch.full((3,), 1 / 3, dtype=dtype, device=q.device)


def _merge(parts: Parts, slots, row: int) -> Tensor:
    """The attention of a row over the keys of some parts."""
    some = [slot for slot in slots if int(parts.reference[slot, row]) != NO_REFERENCE]
    if not some:
        return parts.out.new_zeros(parts.out.shape[-1])
    largest = max(int(parts.reference[slot, row]) for slot in some)
    weights = [2.0 ** (int(parts.reference[slot, row]) - largest) for slot in some]
    total = sum(w * parts.total[slot, row] for w, slot in zip(weights, some, strict=True))
    return sum(w * parts.out[slot, row] for w, slot in zip(weights, some, strict=True)) / total


def _unit_parts(schedule: Schedule, shape, sequence: int, local: int) -> tuple[int, int]:
    """First slot of the parts of a unit, and the slot after the last."""
    share, first = int(schedule.tiles[0]), int(schedule.tiles[sequence + 1])
    tiles = int(schedule.tiles[sequence + 2]) - first
    unit = sequence * shape.sequence_units + local
    begin = first * shape.sequence_units + local * tiles
    if not tiles:
        return unit, unit
    return begin // share + unit, (begin + tiles - 1) // share + unit + 1


def _some_reference(y: Tensor) -> Tensor:
    """An integer near the largest exponent, NO_REFERENCE if there is none."""
    largest = y.max()
    near = largest.round() + torch.randint(-3, 4, (), device=y.device)
    return torch.where(largest == -torch.inf, NO_REFERENCE, near).int()


def _sequences(cu_seqlens, shape) -> list[tuple[int, int, int]]:
    """Each sequence, its first new token, and how many it has."""
    if cu_seqlens is None:
        return [(b, b * shape.tokens, shape.tokens) for b in range(shape.batch)]
    bounds = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    assert len(bounds) == shape.batch + 1
    return [(b, bounds[b], bounds[b + 1] - bounds[b]) for b in range(shape.batch)]


def _has_place(table, pool, sequence: int, position: int, max_length: int) -> bool:
    index = position // pool.k.shape[1]
    if position >= max_length or index >= table.shape[1]:
        return False
    return 0 <= int(table[sequence, index]) < pool.k.shape[0]


def _place(table, store, sequence: int, row: int) -> tuple[int, int]:
    """Page and row in it of a token or slot of a sequence."""
    page = int(table[sequence, row // store.shape[1]])
    assert 0 <= page < store.shape[0], "a page that the table does not name"
    return page, row % store.shape[1]


def _empty_parts(slots: int, rows: int, dim: int, dtype, device) -> Parts:
    return Parts(
        _nans((slots, rows, dim), dtype, device),
        _poisoned_integers((slots, rows), device),
        _nans((slots, rows), dtype, device),
    )


def _nans(shape, dtype, device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def _poisoned_integers(shape, device) -> Tensor:
    return torch.full(shape, 1 << 29, dtype=torch.int32, device=device)
