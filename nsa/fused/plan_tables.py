"""Index tensors of packed sequences that kernels make: which there are, and how long.

Where each item lies follows from the boundaries by a few rules. As PyTorch operations these would
be some hundred launches for each new boundaries. Lengths are not read, so tables that depend on
them have upper bounds for lengths.
"""

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.config import NSAConfig
from nsa.fused.compressed_forms import CompressedForm, extra_rows, num_folded_rows

BOUNDS = ("compressed", "selection", "tiles", "folded", "key_tiles", "cmp_key_blocks", "runs")
"""Items of which :func:`nsa.fused.kernel_calls.sequence_bounds` gives the boundaries, in order:
compressed blocks; selection blocks; tiles of queries; folded rows, see
:class:`nsa.fused.row_layouts.FoldedQueries`; tiles of keys; key blocks of compressed tokens; runs,
see :class:`nsa.fused.token_inputs.TokenBlocks`."""


class TableRule(NamedTuple):
    """What the tables depend on beside the boundaries. Sizes are in tokens unless said otherwise.

    Attributes:
        queries, keys: rows of q and of k.
        sequences: how many.
        stride: from one compressed block to the next.
        overlap: blocks that a token can be in.
        complete: tokens of a compressed block that must be seen for it to be scored.
        covered: tokens of it that must be at or before a query that attends it.
        select_size: of a selection block.
        tile: of a tile of queries that selects, or in token mode that the scores are computed for.
        key_block: keys of a key block in the selected branch of tile mode.
        cmp_key_block: compressed tokens of a key block in the sparse compressed branch.
        extra_rows: folded rows of a sequence beyond its blocks.
        folded_rows: upper bound on the folded rows of all sequences.
        few: queries of a sequence that see 2 to a few compressed keys, at most; 0 if they are not
            wanted.
        token, causal, by_first, folded, listed: bool: token mode; the mask; whether a tile's first
            query stands for it; which form the compressed branch has.
        whole: bool: whether each sequence has as many queries as keys.
    """

    queries: int
    keys: int
    sequences: int
    stride: int
    overlap: int
    complete: int
    covered: int
    select_size: int
    tile: int
    key_block: int
    cmp_key_block: int
    extra_rows: int
    folded_rows: int
    few: int
    token: bool
    causal: bool
    by_first: bool
    folded: bool
    listed: bool
    whole: bool

    @property
    def limited(self) -> bool:
        """Whether rows of queries have limits of their own in the selected branch of tile mode."""
        return not (self.causal and self.whole)


def make_rule(
    config: NSAConfig,
    *,
    num_queries: int,
    num_keys: int,
    sequences: int,
    whole: bool,
    form: CompressedForm = CompressedForm.NONE,
    folded: bool = False,
    token_tile: int = 1,
    key_blocks: tuple[int, int] = (1, 1),
    most_few_keys: int = 1,
) -> TableRule:
    """The rule for packed sequences.

    Args:
        config: the configuration.
        num_queries, num_keys: rows of q and of k.
        sequences: how many.
        whole: whether each has as many queries as keys.
        form: of the compressed branch.
        folded: whether that folds queries.
        token_tile: tokens of a tile whose scores are computed together, in token mode.
        key_blocks: keys of a key block in the selected and in the sparse compressed branch.
        most_few_keys: compressed keys that are few; 1 if queries of few keys are not wanted.
    """
    token = config.selection == "token"
    return TableRule(
        queries=num_queries,
        keys=num_keys,
        sequences=sequences,
        stride=config.compress_stride,
        overlap=config.compress_block_size // config.compress_stride,
        complete=config.compress_block_size,
        covered=covered_tokens(config, config.compressed_visibility),
        select_size=config.select_block_size,
        tile=token_tile if token else config.q_tile_size,
        key_block=key_blocks[0],
        cmp_key_block=key_blocks[1],
        extra_rows=extra_rows(config),
        folded_rows=num_folded_rows(num_queries, sequences, config, whole=whole),
        few=(most_few_keys - 1) * config.compress_stride,
        token=token,
        causal=config.causal,
        by_first=config.tile_summary == "first",
        folded=folded,
        listed=form is CompressedForm.LISTED,
        whole=whole,
    )


class Tables(NamedTuple):
    """Tables by name, int32; None where a rule needs none. -1 stands for none where not said.

    Places of items of no sequence, past the last, mean nothing where not said otherwise.

    Attributes:
        first_block, candidates, own_block: ``(T,)``, for each token: the first selection block of
            its sequence among all; how many it may take, 0 for a token of no sequence; its own, in
            its sequence.
        first_column: ``(T,)``, 0.
        run_base: ``(T,)``, see :class:`nsa.fused.token_inputs.TokenBlocks`, as for the next four.
        block_first, block_keys, block_row: for each selection block.
        run_first: for each run.
        tile_fields: ``(tiles, 6)``, see :class:`nsa.fused.token_inputs.TokenTiles`.
        place: ``(T,)``, ``row * d + slot`` of each token in folded rows.
        lse_place: ``(T,)``, the same, but 0 for a token that has no place.
        query_of_slot: ``(rows * d,)``, the token of each.
        few_query, few_first, few_count: see :class:`nsa.fused.kernel_inputs.FewKeys`.
        row_of_query, query_of_row: ``(T,)`` and ``(rows,)``, aligned rows of queries.
        row_of_key, key_of_row: ``(Tk,)`` and ``(rows,)``, aligned rows of keys.
        row_of_compressed, compressed_of_row: the same of compressed tokens.
        key_limit, cmp_key_limit: ``(rows,)``, for each aligned row of queries the aligned row of
            the first key, or compressed token, that it does not see.
        cmp_first, visible, tile_candidates, own, num_blocks: ``(tiles,)``, see
            :class:`nsa.fused.scoring.Scoring`.
        tile_count: ``(tiles,)``, queries of a tile; at most 0 for a tile of no sequence.
        key_block_first, key_blocks, full_key_blocks: ``(tiles,)``, see
            :attr:`nsa.fused.plan.Plan.tile_key_blocks`.
        cmp_block_first, cmp_blocks, full_cmp_blocks: the same of compressed tokens.
        block_start: ``(blocks,)``, the first token of each compressed block.
        blocks_of_token: ``(Tk, overlap)``, the compressed blocks that each token is in.
    """

    first_block: Tensor | None = None
    candidates: Tensor | None = None
    own_block: Tensor | None = None
    first_column: Tensor | None = None
    run_base: Tensor | None = None
    block_first: Tensor | None = None
    block_keys: Tensor | None = None
    block_row: Tensor | None = None
    run_first: Tensor | None = None
    tile_fields: Tensor | None = None
    place: Tensor | None = None
    lse_place: Tensor | None = None
    query_of_slot: Tensor | None = None
    few_query: Tensor | None = None
    few_first: Tensor | None = None
    few_count: Tensor | None = None
    row_of_query: Tensor | None = None
    query_of_row: Tensor | None = None
    row_of_key: Tensor | None = None
    key_of_row: Tensor | None = None
    row_of_compressed: Tensor | None = None
    compressed_of_row: Tensor | None = None
    key_limit: Tensor | None = None
    cmp_key_limit: Tensor | None = None
    cmp_first: Tensor | None = None
    visible: Tensor | None = None
    tile_candidates: Tensor | None = None
    own: Tensor | None = None
    num_blocks: Tensor | None = None
    tile_count: Tensor | None = None
    key_block_first: Tensor | None = None
    key_blocks: Tensor | None = None
    full_key_blocks: Tensor | None = None
    cmp_block_first: Tensor | None = None
    cmp_blocks: Tensor | None = None
    full_cmp_blocks: Tensor | None = None
    block_start: Tensor | None = None
    blocks_of_token: Tensor | None = None


NO_TABLES = Tables()


def expect(table: Tensor | None) -> Tensor:
    """A table that the rule has."""
    if table is None:
        raise ValueError("a table is missing; the rule must ask for it")
    return table


class Items(NamedTuple):
    """Upper bounds on items of each kind, for which tables have rows."""

    queries: int
    keys: int
    compressed: int
    selection: int
    runs: int
    tiles: int
    rows: int
    key_rows: int
    cmp_rows: int
    slots: int
    few: int


def count_items(rule: TableRule) -> Items:
    """The items that the tables of a rule have rows for."""
    compressed, sequences = rule.keys // rule.stride, rule.sequences
    tiles = rule.queries // rule.tile + sequences
    return Items(
        queries=rule.queries,
        keys=rule.keys,
        compressed=compressed,
        selection=rule.keys // rule.select_size + sequences,
        # One row more than there can be runs, so that the last run has an end.
        runs=min(rule.queries, rule.queries // rule.select_size + 2 * sequences) + 1,
        tiles=tiles,
        rows=tiles * rule.tile,
        key_rows=(rule.keys // rule.tile + sequences) * rule.tile,
        cmp_rows=(compressed // rule.cmp_key_block + sequences) * rule.cmp_key_block,
        slots=rule.folded_rows * rule.stride,
        few=rule.few * sequences,
    )


@lru_cache(maxsize=256)
def table_shapes(rule: TableRule, means: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of the tables of a rule, by name.

    With ``means`` they are the tables for means of blocks, else all others. Callers which give
    compressed keys need no means.
    """
    items = count_items(rule)
    if means:
        blocks_of_token = (items.keys, rule.overlap)
        return dict(block_start=(items.compressed,), blocks_of_token=blocks_of_token)
    counts: dict[str, int] = {}
    if rule.token:
        of_token = ["first_block", "candidates", "own_block", "first_column"]
        of_block = ["block_first", "block_keys"]
        if not rule.whole:
            of_token.append("run_base")
            of_block.append("block_row")
            counts["run_first"] = items.runs
        counts |= dict.fromkeys(of_token, items.queries)
        counts |= dict.fromkeys(of_block, items.selection)
    else:
        counts |= dict(row_of_query=items.queries, query_of_row=items.rows)
        of_tile = ["cmp_first", "visible", "tile_candidates", "own", "num_blocks", "tile_count"]
        of_tile += ["key_block_first", "key_blocks"]
        if rule.limited:
            counts["key_limit"] = items.rows
        if rule.causal and not rule.whole:
            of_tile.append("full_key_blocks")
        if not rule.whole:
            counts |= dict(row_of_key=items.keys, key_of_row=items.key_rows)
        if rule.listed:
            counts |= dict(row_of_compressed=items.compressed, compressed_of_row=items.cmp_rows)
            counts["cmp_key_limit"] = items.rows
            of_tile += ["cmp_block_first", "cmp_blocks", "full_cmp_blocks"]
        counts |= dict.fromkeys(of_tile, items.tiles)
    if rule.folded:
        counts |= dict(place=items.queries, query_of_slot=items.slots)
        if rule.token:
            counts["lse_place"] = items.queries
    if rule.few:
        counts |= dict.fromkeys(("few_query", "few_first", "few_count"), items.few)
    shapes: dict[str, tuple[int, ...]] = {name: (count,) for name, count in counts.items()}
    if rule.token:
        shapes["tile_fields"] = (items.tiles, 6)
    return shapes
