"""A decoding step: up to 8 new tokens of each sequence of a cache, from its pages.

Nothing here reads the device or allocates by lengths, so a step can be captured in a CUDA graph and
replayed as lengths grow.
"""

import functools

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.boundaries import Boundaries
from nsa.cache import Cache
from nsa.cache.append import NewTokens, advance, compress_candidates, flat_branches, write_new
from nsa.cache.context import locate_in_cache
from nsa.config import NSAConfig
from nsa.fused import decode_calls
from nsa.fused.decode_inputs import (
    CLUSTERS,
    LEAST_SHARE,
    MAX_LISTED,
    MAX_TOKENS,
    SLOT_GROUP,
    TILE_KEYS,
    DecodeRule,
    DecodeShape,
    Parts,
    Pool,
    Records,
    Schedule,
    TileLists,
    TileRule,
    can_unite,
    fits_shared_memory,
    resident_ctas,
)
from nsa.fused.token_inputs import MAX_GROUP
from nsa.segments import prefix_sum

Branches = tuple[Tensor, Tensor, Tensor]
_SELECT_SIZES = (32, 64, 128)
_USE_REFERENCE = "use backend='reference'"


def unsupported_reason(
    q: Tensor, cache: Cache, boundaries: Boundaries | None, given: bool
) -> str | None:
    """Why the kernels cannot decode this, with the remedy; None if they can.

    ``given`` is whether the caller gives ``block_indices``.
    """
    config = cache.config
    group = q.shape[-2] // cache.num_kv_heads
    tokens = most_tokens(q, boundaries)
    if tokens is None:
        return (
            "it needs max_seqlen or an nsa.Packing with a cache and cu_seqlens, so that the host "
            f"knows how many new tokens a sequence has; give one, or {_USE_REFERENCE}"
        )
    if tokens > MAX_TOKENS:
        return (
            f"it needs at most {MAX_TOKENS} new tokens of a sequence with a cache, got {tokens}; "
            f"{_USE_REFERENCE}"
        )
    if group > MAX_GROUP:
        return (
            f"it needs at most {MAX_GROUP} query heads to a KV head, got {group}; {_USE_REFERENCE}"
        )
    if config.num_selected_blocks > MAX_LISTED:
        return (
            f"it needs num_selected_blocks of at most {MAX_LISTED} with a cache, got "
            f"{config.num_selected_blocks}; {_USE_REFERENCE}"
        )
    return (
        _token_limit(config) if config.selection == "token" else _tile_limit(config, given)
    ) or _size_limit(cache)


def _token_limit(config: NSAConfig) -> str | None:
    rule = DecodeRule.of(config)
    if SLOT_GROUP % rule.per_select or rule.carried > rule.per_select:
        return (
            f"it needs select_block_size to be 1, 2, 4, 8 or {SLOT_GROUP} strides and "
            "compress_block_size to be at most a stride longer with a cache, got "
            f"{rule.per_select} and {rule.carried + 1} strides; {_USE_REFERENCE}"
        )
    return None


def _tile_limit(config: NSAConfig, given: bool) -> str | None:
    if given:
        return f"it needs to select blocks itself with selection='tile'; {_USE_REFERENCE}"
    if config.num_cmp_selected_blocks is not None:
        return f"it needs num_cmp_selected_blocks=None with a cache; {_USE_REFERENCE}"
    if config.q_tile_size < MAX_TOKENS:
        return (
            f"it needs q_tile_size of at least {MAX_TOKENS} with a cache, got "
            f"{config.q_tile_size}; {_USE_REFERENCE}"
        )
    return None


def _layout_limit(cache: Cache) -> str | None:
    """What the kernels cannot address."""
    if not cache.page_table.is_contiguous():
        return (
            "it needs a contiguous page_table with a cache, got strides "
            f"{cache.page_table.stride()}; {_USE_REFERENCE}"
        )
    names = ("k_pages", "v_pages", "k_cmp_pages", "v_cmp_pages")
    return layout_limit({name: getattr(cache, name) for name in names})


def layout_limit(pools: dict[str, Tensor]) -> str | None:
    """Which pool the kernels cannot address, with the remedy; None if they can."""
    for name, x in pools.items():
        if x.stride(3) != 1 or any(stride % 8 for stride in x.stride()[:3]) or x.data_ptr() % 16:
            return (
                f"it needs {name} with adjacent channels, other strides that are multiples of 8 "
                f"and an address that is a multiple of 16 with a cache, got strides {x.stride()}; "
                f"{_USE_REFERENCE}"
            )
    return None


def _size_limit(cache: Cache) -> str | None:
    """What the kernels' tiles are too large or too small for, or cannot address."""
    dims = cache.head_dim, cache.value_head_dim
    return size_limit(dims, cache.config.select_block_size) or _layout_limit(cache)


def size_limit(dims: tuple[int, int], size: int) -> str | None:
    """What the kernels' tiles are too large or too small for, with the remedy.

    ``dims`` are ``D`` and ``Dv``, and ``size`` is the tokens of a selection block.
    """
    if any(dim % 32 or dim > 256 for dim in dims) or not fits_shared_memory(*dims):
        return (
            "it needs head dimensions that are multiples of 32 up to 256 with a cache, got "
            f"{dims}; {_USE_REFERENCE}"
        )
    if size not in _SELECT_SIZES:
        return (
            f"it needs select_block_size of {_SELECT_SIZES} with a cache, got {size}; "
            f"{_USE_REFERENCE}"
        )
    return None


def has_few_tokens(q: Tensor, boundaries: Boundaries | None) -> bool:
    """Whether a step may have as many new tokens, or the host does not know how many there are."""
    tokens = most_tokens(q, boundaries)
    return tokens is None or tokens <= MAX_TOKENS


def most_tokens(q: Tensor, boundaries: Boundaries | None) -> int | None:
    """The most new tokens of a sequence, if the host knows."""
    return q.shape[1] if boundaries is None else boundaries.max_seqlen


@torch.compiler.disable(reason="kernels of decoding are not custom ops")
@torch.no_grad()
def forward(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    cache: Cache,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> Tensor:
    """See :func:`nsa.forward`; :func:`unsupported_reason` has no objection."""
    config, rule = cache.config, DecodeRule.of(cache.config)
    if q.numel() == 0:
        return q.new_zeros(*q.shape[:-1], cache.value_head_dim)
    cu_seqlens = None if boundaries is None else boundaries.cu_seqlens.int()
    shape = _make_shape(q, cache, boundaries)
    rows = q.flatten(0, -3)
    k_rows, v_rows = flat_branches(k), flat_branches(v)
    compressed = Pool(cache.k_cmp_pages, cache.v_cmp_pages)
    weights = compress_k_weight, compress_v_weight
    means = compressed_kv is None and all(weight is None for weight in weights)
    tokens = None
    if means and not cache.separate_kv:
        schedule = decode_calls.decode_append(
            k_rows[1], v_rows[1], Pool(cache.k_pages, cache.v_pages), compressed, cache.page_table,
            cache.lengths, cache.overflowed, cache.max_length, cu_seqlens, shape, rule,
        )  # fmt: skip
    else:
        tokens = locate_in_cache(cache, q, boundaries, compressed_kv)
        schedule = _write_new(tokens, (k_rows, v_rows), cache, weights, compressed_kv, shape, rule)
    scale, tile_mode = config.softmax_scale(q.shape[-1]), config.selection == "tile"
    parts, records = decode_calls.decode_compressed(
        rows, compressed, cache.page_table, schedule, cu_seqlens, shape, rule, scale,
        records=block_indices is None and not tile_mode,
        lengths=cache.lengths if tokens is None else None, limit=cache.max_length,
    )  # fmt: skip
    lists: Tensor | TileLists
    if tile_mode:
        cache.use_num_heads(rows.shape[1])
        assert cache.block_lists is not None
        decode_calls.decode_tile_select(
            rows, compressed, cache.page_table, schedule, cu_seqlens, shape,
            TileRule(config.compress_block_size, config.select_block_size), scale,
            tile_size=config.q_tile_size, lists=cache.block_lists,
            count=config.num_selected_blocks,
            limit=num_selection_blocks(cache.max_length, config),
            num_initial=config.num_initial_blocks, num_local=config.num_local_blocks,
        )  # fmt: skip
        lists = TileLists(cache.block_lists, config.q_tile_size)
    elif block_indices is None:
        width = rows.shape[0], shape.kv_heads, config.num_selected_blocks
        lists = torch.empty(width, dtype=torch.int32, device=q.device)
    else:
        lists = block_indices.flatten(0, -3)
    out = _finish(
        cache, rows, parts, records, schedule, cu_seqlens, shape, rule, lists, scale=scale,
        gates=None if gates is None else gates.flatten(0, -3),
        weight=gate_proj_weight if gates is None else None,
    )  # fmt: skip
    # The last kernel has written the lengths, so that an error leaves the cache as it was.
    if tokens is None:
        cache.note_advance(_counts(q, boundaries))
    else:
        advance(cache, tokens)
    return out.unflatten(0, q.shape[:-2])


def _finish(
    cache: Cache,
    q: Tensor,
    parts: Parts,
    records: Records | None,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    lists: Tensor | TileLists,
    scale: float,
    gates: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """The end of a step, with the kernels that suit its sizes."""
    config, pool = cache.config, Pool(cache.k_pages, cache.v_pages)
    window = min(config.window_size, cache.max_length)
    if not isinstance(lists, TileLists) and _unites_tokens(cache, shape, rule, lists.shape[-1]):
        if records is not None:
            decode_calls.decode_select(
                parts, records, schedule, cu_seqlens, shape, rule, lists,
                num_initial=config.num_initial_blocks, num_local=config.num_local_blocks,
            )  # fmt: skip
        return decode_calls.decode_units(
            q, pool, cache.page_table, parts, schedule, cu_seqlens, shape, rule, lists,
            window=window, scale=scale, gates=gates, weight=weight, lengths=cache.lengths,
        )  # fmt: skip
    cluster, of_tokens = _choose_cluster(cache, shape, q.shape[0])
    return decode_calls.decode_finish(
        q, pool, None if cache.window_rings is None else Pool(*cache.window_rings),
        cache.page_table, parts, records, schedule, cu_seqlens, shape, rule, lists,
        num_initial=config.num_initial_blocks, num_local=config.num_local_blocks,
        window=window, scale=scale, gates=gates, weight=weight, lengths=cache.lengths,
        floors=cache.floors if isinstance(lists, TileLists) else None,
        cluster=cluster, of_tokens=of_tokens,
    )  # fmt: skip


def _unites_tokens(cache: Cache, shape: DecodeShape, rule: DecodeRule, slots: int) -> bool:
    """Whether a CTA attends what the tokens of a unit selected: there are units for most SMs."""
    dims = cache.head_dim, cache.value_head_dim
    return (
        cache.window_rings is None
        and can_unite(dims, shape, rule.select_size, slots)
        and 4 * shape.units >= 3 * _num_sms(cache.device)
    )


def _make_shape(q: Tensor, cache: Cache, boundaries: Boundaries | None) -> DecodeShape:
    tokens = most_tokens(q, boundaries)
    assert tokens is not None
    group = q.shape[-2] // cache.num_kv_heads
    shape = DecodeShape(cache.batch_size, tokens, cache.num_kv_heads, group, 1)
    resident = resident_ctas(cache.head_dim, cache.value_head_dim, shape.row_groups)
    return shape._replace(ctas=resident * _num_sms(q.device))


def choose_splits(
    tiles: int, lists: int, rows: int, dims: tuple[int, int], device: torch.device
) -> int:
    """CTAs of a list of ``tiles`` tiles of keys, each of which attends ``rows`` query heads."""
    ctas = resident_ctas(*dims, -(-rows // 16))
    return max(1, min(tiles, ctas * _num_sms(device) // lists))


def _choose_cluster(cache: Cache, shape: DecodeShape, tokens: int) -> tuple[int, bool]:
    """CTAs of a cluster in the last kernel, and whether they have a token each.

    A list has as many CTAs as run at a time. Larger clusters leave some SMs free: 64 of 4 CTAs do
    not run at a time on 132 SMs. Where a list has one, two tokens share their window.
    """
    lists, rows = tokens * shape.kv_heads, shape.group
    if cache.config.selection == "tile":
        lists, rows = lists * rows, 1
    ctas = resident_ctas(cache.head_dim, cache.value_head_dim, -(-rows // 16))
    ctas *= _num_sms(cache.device)
    room = ctas // lists
    room = room if room < 4 else ctas * 7 // 8 // lists
    cluster = max(c for c in CLUSTERS if c <= max(1, room))
    if cluster == 1 and cache.config.selection == "token" and shape.tokens > 1:
        return 2, True
    return cluster, False


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        # Emulated kernels.
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _write_new(
    tokens: NewTokens,
    new: tuple[Branches, Branches],
    cache: Cache,
    weights: tuple[Tensor | None, Tensor | None],
    compressed_kv: tuple[Tensor, Tensor] | None,
    shape: DecodeShape,
    rule: DecodeRule,
) -> Schedule:
    """What :func:`nsa.fused.decode_calls.decode_append` does, with any compression."""
    if compressed_kv is None:
        pair = [compress_candidates(cache, tokens, i, new[i][0], weights[i]) for i in range(2)]
    else:
        pair = [x.flatten(0, -3)[: tokens.num_candidates] for x in compressed_kv]
    starts, count = cache.lengths.clone(), tokens.offset.diff()
    write_new(cache, tokens, *new, (pair[0], pair[1]))
    slots = (starts + count).clamp(max=cache.max_length) // rule.stride
    tiles = torch.where((count > 0) & (slots > rule.carried), -(-slots // TILE_KEYS), 0)
    starts_of_tiles = prefix_sum(tiles)
    total = starts_of_tiles[-1:] * shape.sequence_units
    share = tile_share(total, shape.ctas, shape.whole_units)
    return Schedule(starts, tokens.end.int(), torch.cat([share, starts_of_tiles]).int())


def tile_share(tiles: Tensor, ctas: int, whole_units: int) -> Tensor:
    """Tiles of a CTA, of those of all units.

    They are those of a whole unit, or of an equal part of it, where all of ``whole_units`` have as
    many and these are hardly more than the least. So no CTA has parts of two units.
    """
    least = (-(-2 * tiles // ctas)).clamp(min=1, max=LEAST_SHARE)
    share = (-(-tiles // ctas)).maximum(least)
    if whole_units == 0:
        return share
    parts = whole_units * max(1, ctas // whole_units)
    whole = tiles // parts
    suits = (whole * parts == tiles) & (whole >= share) & (whole * 32 <= share * 33)
    return torch.where(suits, whole, share)


def _counts(q: Tensor, boundaries: Boundaries | None) -> list[int] | None:
    """New tokens of each sequence, if the host knows."""
    return [q.shape[1]] * q.shape[0] if boundaries is None else boundaries.lengths
