"""Block lists and their transpose, held against loops over single entries."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa
from nsa.boundaries import boundaries_of
from nsa.fused import block_lists
from nsa.fused.kernel_inputs import BlockLists
from nsa.fused.planning import make_plan
from nsa.testing import make_cu_seqlens
from tests.helpers.profiles import WITH_FIXTURES, examples

LIST_SETTINGS = dict(max_examples=examples(80), **WITH_FIXTURES)
HEADS = 2


class Case(NamedTuple):
    batch: int
    lengths: list[int]
    packed: bool
    head_dim: int
    config: nsa.NSAConfig
    seed: int


@st.composite
def list_cases(draw) -> Case:
    """Key blocks of 64 and 128, several to a block or one, with more blocks listed than exist."""
    packed = draw(st.booleans())
    lengths = st.sampled_from([0, 1, 63, 64, 65, 129, 300, 520])
    block = draw(st.sampled_from([1, 16, 64]))
    config = nsa.NSAConfig(
        compress_block_size=block,
        select_block_size=draw(st.sampled_from([64, 128, 192, 256])),
        num_selected_blocks=draw(st.sampled_from([1, 3, 16])),
        q_tile_size=draw(st.sampled_from([64, 128])),
        num_cmp_selected_blocks=draw(st.sampled_from([1, 2, 9])),
        cmp_group_size=draw(st.sampled_from([64, 128])),
        compressed_visibility=draw(st.sampled_from(["complete", "started"])),
        causal=draw(st.booleans()),
    )
    return Case(
        batch=1 if packed else draw(st.sampled_from([1, 2])),
        lengths=draw(st.lists(lengths, min_size=1, max_size=4)) if packed else [draw(lengths) + 1],
        packed=packed,
        head_dim=draw(st.sampled_from([64, 256])),
        config=config,
        seed=draw(st.integers(0, 2**16)),
    )


def plan_of(case: Case):
    q = torch.empty(case.batch, sum(case.lengths), HEADS, case.head_dim)
    cu_seqlens = make_cu_seqlens(case.lengths) if case.packed else None
    return make_plan(q, case.config, boundaries_of(cu_seqlens))


def draw_indices(case: Case, num_tiles: int, width: int, blocks: list[int]) -> torch.Tensor:
    """Ascending blocks below ``blocks[s]`` of each sequence, then -1: ``(B, tiles, H, width)``."""
    generator = torch.Generator().manual_seed(case.seed)
    indices = torch.full((case.batch, num_tiles, HEADS, width), -1, dtype=torch.int32)
    for batch in range(case.batch):
        for tile, (sequence, _) in enumerate(tiles_of(case)):
            for head in range(HEADS):
                order = torch.randperm(blocks[sequence], generator=generator)[:width]
                kept = int(torch.randint(len(order) + 1, (), generator=generator))
                indices[batch, tile, head, :kept] = order[:kept].sort().values
    return indices


def tiles_of(case: Case) -> list[tuple[int, int]]:
    """The sequence of each tile, and the position of its first query there."""
    size = case.config.q_tile_size
    return [(s, first) for s, length in enumerate(case.lengths) for first in range(0, length, size)]


def starts_of(counts: list[int], alignment: int) -> list[int]:
    """Where each sequence starts in a row, aligned."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + -(-count // alignment) * alignment)
    return starts


def read_lists(count: torch.Tensor, index: torch.Tensor) -> list[list[list[int]]]:
    """``[head][row]`` to the entries."""
    assert count.dtype == index.dtype == torch.int32
    assert count.shape == index.shape[:-1]
    assert count.is_contiguous()
    assert index.is_contiguous()
    pairs = zip(count[0].tolist(), index[0].tolist(), strict=True)
    return [[row[:n] for n, row in zip(*pair, strict=True)] for pair in pairs]


def check_lists(case, lists, indices, block_size, key_block, counts, alignment, entry_rows, whole):
    """``counts`` are the keys of each sequence; ``whole(first, key)`` is a key's visibility."""
    assert (lists.query_block, lists.key_block) == (case.config.q_tile_size, key_block)
    partial = read_lists(lists.partial_count, lists.partial_index)
    full = lists.full_count is not None and read_lists(lists.full_count, lists.full_index)
    starts, num_tiles = starts_of(counts, alignment), indices.shape[1]
    width = min(indices.shape[-1] * block_size // key_block, case.batch * entry_rows // key_block)
    assert lists.partial_index.shape[-1] == width
    tiles = tiles_of(case)
    for batch in range(case.batch):
        for tile in range(num_tiles):
            for head in range(HEADS):
                expected = ([], [])
                for block in indices[batch, tile, head].tolist():
                    if block < 0:
                        continue
                    sequence, query = tiles[tile]
                    for key in range(block * block_size, (block + 1) * block_size, key_block):
                        if key >= counts[sequence]:
                            continue
                        keys = range(key, key + key_block)
                        seen = all(j < counts[sequence] and whole(query, j) for j in keys)
                        row = batch * entry_rows + starts[sequence] + key
                        expected[seen].append(row // key_block)
                row = batch * num_tiles + tile
                assert partial[head][row] == expected[False]
                assert (full[head][row] if full else []) == expected[True]


@settings(**LIST_SETTINGS)
@given(case=list_cases())
def test_selected_lists(case, fused_on_cpu):
    plan, config = plan_of(case), case.config
    blocks = [-(-n // config.select_block_size) for n in case.lengths]
    width = config.num_selected_blocks
    indices = draw_indices(case, plan.geometry.tiles.total, width, blocks)
    lists = block_lists.selected_lists(indices, plan)
    assert lists.full_count is lists.full_index is None
    check_lists(
        case, lists, indices, config.select_block_size, plan.key_block, case.lengths,
        config.q_tile_size, plan.queries.rows, lambda *_: False,
    )  # fmt: skip


@settings(**LIST_SETTINGS)
@given(case=list_cases())
def test_compressed_lists(case, fused_on_cpu):
    plan, config = plan_of(case), case.config
    counts = [n // config.compress_block_size for n in case.lengths]
    groups = [-(-n // config.cmp_group_size) for n in counts]
    width = config.num_cmp_selected_blocks
    indices = draw_indices(case, plan.geometry.tiles.total, width, groups)

    def sees(query: int, token: int) -> bool:
        reach = 0 if config.compressed_visibility == "started" else config.compress_block_size - 1
        return not config.causal or token * config.compress_stride + reach <= query

    lists = block_lists.compressed_lists(indices, plan)
    check_lists(
        case, lists, indices, config.cmp_group_size, plan.cmp_key_block, counts,
        plan.cmp_key_block, plan.compressed.rows, sees,
    )  # fmt: skip


@st.composite
def forward_lists(draw) -> tuple[BlockLists, int]:
    """Lists of distinct blocks in any order with junk behind, and the number of key blocks."""
    num_tiles, num_blocks = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    width = draw(st.integers(1, num_blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def one():
        count = torch.randint(width + 1, (1, HEADS, num_tiles), generator=generator)
        order = torch.rand(1, HEADS, num_tiles, num_blocks, generator=generator).argsort(-1)
        used = torch.arange(width) < count[..., None]
        return count.int(), torch.where(used, order[..., :width], 10**9).int()

    full = one() if draw(st.booleans()) else (None, None)
    return BlockLists(*one(), *full, 64, 64), num_blocks


def check_transpose(count, index, new_count, new_index, num_blocks):
    given_lists = read_lists(count, index)
    expected = [
        [[t for t, row in enumerate(rows) if block in row] for block in range(num_blocks)]
        for rows in given_lists
    ]
    assert read_lists(new_count, new_index) == expected
    return max(len(row) for rows in expected for row in rows)


@pytest.mark.parametrize("rule", ["bounded", "counted", "capturing"])
@settings(**LIST_SETTINGS)
@given(case=forward_lists())
def test_transpose_lists(case, rule, fused_on_cpu):
    lists, num_blocks = case
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rule != "bounded":
            monkeypatch.setattr(block_lists, "BOUNDED_BYTES", 0)
        if rule == "capturing":
            monkeypatch.setattr(block_lists, "is_capturing", lambda _: True)
        transposed = block_lists.transpose_lists(lists, num_blocks * 64)
    assert transposed[-2:] == lists[-2:]
    for count, index in (("partial_count", "partial_index"), ("full_count", "full_index")):
        if getattr(lists, count) is None:
            assert getattr(transposed, count) is getattr(transposed, index) is None
            continue
        old, new = ((getattr(x, count), getattr(x, index)) for x in (lists, transposed))
        longest = check_transpose(*old, *new, num_blocks)
        assert new[1].shape[-1] == (max(1, longest) if rule == "counted" else old[0].shape[-1])


def test_transpose_of_nothing(fused_on_cpu):
    empty = torch.zeros(1, HEADS, 0, dtype=torch.int32)
    lists = BlockLists(empty, empty[..., None].expand(1, HEADS, 0, 1), None, None, 64, 64)
    transposed = block_lists.transpose_lists(lists, 3 * 64)
    assert transposed.partial_count.tolist() == [[[0, 0, 0]] * HEADS]
    assert transposed.partial_index.shape == (1, HEADS, 3, 1)
