"""The kernels that make the tables of plans, in PyTorch: what the plan of a geometry computes."""

import torch
from torch import Tensor

import nsa
from nsa.fused.plan import Plan
from nsa.fused.plan_tables import Tables, table_shapes
from nsa.fused.row_layouts import AlignedRows, FoldedQueries
from nsa.fused.token_inputs import make_token_blocks, make_token_tiles
from nsa.geometry import Geometry
from nsa.segments import prefix_sum

NAMES = ("sequence_bounds", "plan_tables")


def sequence_bounds(cu_seqlens, cu_seqlens_k, rule) -> Tensor:
    queries, keys = (x.long().diff() for x in (cu_seqlens, cu_seqlens_k))
    first = keys - queries
    compressed = (keys // rule.stride - (rule.overlap - 1)).clamp(min=0)
    left_out = (first - (rule.covered - 1)).clamp(min=0) // rule.stride
    selection = _ceil_div(keys, rule.select_size)
    folded = compressed + rule.extra_rows - left_out
    counts = dict(
        compressed=compressed,
        selection=selection,
        tiles=_ceil_div(queries, rule.tile),
        folded=folded if rule.whole else torch.where(queries > 0, folded, 0),
        key_tiles=_ceil_div(keys, rule.tile),
        cmp_key_blocks=_ceil_div(compressed, rule.cmp_key_block),
        runs=torch.where(queries > 0, selection - first // rule.select_size, 0),
    )
    return torch.stack([prefix_sum(count) for count in counts.values()]).int()


def plan_tables(cu_seqlens, cu_seqlens_k, bounds, rule, means) -> Tables:
    assert torch.equal(bounds, sequence_bounds(cu_seqlens, cu_seqlens_k, rule))
    config = _config(rule)
    geometry = Geometry.packed(
        cu_seqlens,
        cu_seqlens if rule.whole else cu_seqlens_k,
        rule.queries,
        rule.keys,
        config,
        exact=False,
    )
    plan = Plan(geometry, 1, 64, cu_seqlens, cu_seqlens_k)
    shapes = table_shapes(rule, means)
    found = _means(plan) if means else _tables(plan, rule)
    assert found.keys() >= shapes.keys()
    tables = {name: found[name].clone() for name in shapes}
    for name, table in tables.items():
        assert (table.dtype, tuple(table.shape)) == (torch.int32, shapes[name]), name
    return Tables(**tables)


def _ceil_div(size, step):
    return -(-size // step)


def _config(rule) -> nsa.NSAConfig:
    # Of blocks of one token both cover one.
    visibility = "started" if rule.extra_rows else "complete"
    return nsa.NSAConfig(
        selection="token" if rule.token else "tile",
        compress_block_size=rule.complete,
        compress_stride=rule.stride,
        select_block_size=rule.select_size,
        q_tile_size=256 if rule.token else rule.tile,
        tile_summary="first" if rule.by_first else "mean",
        compressed_visibility=visibility,
        causal=rule.causal,
    )


def _means(plan) -> dict[str, Tensor]:
    return dict(block_start=plan.block_start, blocks_of_token=plan.blocks_of_token)


def _tables(plan, rule) -> dict[str, Tensor]:
    geometry, found = plan.geometry, {}
    if rule.token:
        blocks = make_token_blocks(geometry, 1)
        own, candidates = plan.token_candidates
        assert torch.equal(blocks.limit, candidates)
        found |= dict(
            first_block=blocks.base,
            candidates=candidates,
            own_block=own,
            first_column=plan.token_first,
            run_base=blocks.run_base,
            block_first=blocks.first,
            block_keys=blocks.keys,
            block_row=blocks.row,
            run_first=blocks.run_first,
            tile_fields=make_token_tiles(geometry, rule.tile, rule.queries).fields,
        )
    else:
        found |= _tile_tables(plan, rule)
    if rule.few:
        few = plan.few_keys
        found |= dict(few_query=few.query, few_first=few.first, few_count=few.keys)
    if rule.folded:
        folded = FoldedQueries(geometry)
        names = ("place", "lse_place", "query_of_slot")
        found |= {name: getattr(folded, name) for name in names}
    return found


def _tile_tables(plan, rule) -> dict[str, Tensor]:
    geometry, scoring = plan.geometry, plan.scoring
    compressed = AlignedRows(geometry.compressed, rule.cmp_key_block)
    found = {name: getattr(scoring, name) for name in ("visible", "own", "num_blocks")}
    first, count = _key_blocks(plan, plan.keys, rule.key_block)
    cmp_first, cmp_count = _key_blocks(plan, compressed, rule.cmp_key_block)
    visibility = plan.config.compressed_visibility
    seen = geometry.num_visible(geometry.tile_first, geometry.tile_owner, visibility)
    owner = geometry.queries.sequence_of(plan.queries.segments.owner)
    seen_by_row = geometry.num_visible(plan.row_position, owner, visibility)
    found |= dict(
        row_of_query=plan.queries._row_of_item,
        query_of_row=plan.queries._item_of_row,
        row_of_key=plan.keys._row_of_item,
        key_of_row=plan.keys._item_of_row,
        row_of_compressed=compressed._row_of_item,
        compressed_of_row=compressed._item_of_row,
        key_limit=plan.key_limit,
        cmp_key_limit=(compressed.segments.offset[owner] + seen_by_row).int(),
        cmp_first=scoring.first,
        tile_candidates=scoring.candidates,
        tile_count=(geometry.tile_last - geometry.tile_first + 1).int(),
        key_block_first=first,
        key_blocks=count,
        full_key_blocks=((geometry.tile_first + 1) // rule.key_block).int(),
        cmp_block_first=cmp_first,
        cmp_blocks=cmp_count,
        full_cmp_blocks=(seen // rule.cmp_key_block).int(),
    )
    return found


def _key_blocks(plan, rows, size) -> tuple[Tensor, Tensor]:
    return plan._tile_blocks(rows, size)
