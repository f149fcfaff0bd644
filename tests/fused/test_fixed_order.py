"""In what order kernels add where the same bits are wanted each time, by hand."""

from collections import defaultdict

import pytest
import torch

from nsa.fused.fixed_order import heads_together, num_popular, order_pairs, take_turns
from nsa.fused.kernel_inputs import BlockLists
from tests.helpers.token_cases import KV_HEADS, SEGMENTS, TokenForm, make_selected_case


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("chunk_tokens", [64, 512])
def test_pairs_of_a_block_are_in_the_order_of_their_tokens(segments, chunk_tokens):
    form = TokenForm(64, 1, 32, 5, True, torch.float32)
    case = make_selected_case(form, forced=False, device="cpu", segments=segments)
    tokens, position = order_pairs(case.block_indices, case.blocks, chunk_tokens)
    assert tokens.dtype == position.dtype == torch.int32
    base, limit = case.blocks.base.tolist(), case.blocks.limit.tolist()
    unit_pairs = chunk_tokens * 5
    expected = defaultdict(list)
    for token, heads in enumerate(case.block_indices.tolist()):
        for head, row in enumerate(heads):
            for slot, block in enumerate(row):
                if 0 <= block < limit[token]:
                    unit = token // chunk_tokens * KV_HEADS + head
                    expected[unit].append((base[token] + block, token, head, slot))
    real = torch.zeros_like(position, dtype=torch.bool)
    for unit, pairs in expected.items():
        for i, (_, token, head, slot) in enumerate(sorted(pairs)):
            assert position[token, head, slot] == unit * unit_pairs + i
            assert tokens[unit * unit_pairs + i] == token
            real[token, head, slot] = True
    assert (position[~real] == -1).all()


def random_lists(heads: int, tiles: int, blocks: int, width: int, full: bool) -> BlockLists:
    """Every list has block 0 and others; the rest of an index is garbage."""
    generator = torch.Generator().manual_seed(heads + tiles)
    draw = torch.rand(1, heads, tiles, blocks, generator=generator)
    draw[..., 0] = 2
    index = draw.argsort(-1, descending=True)[..., : 2 * width].int()
    counts = torch.randint(1, width + 1, (2, 1, heads, tiles), generator=generator).int()
    counts[1] -= 1
    garbage = torch.iinfo(torch.int32).max
    parts = [index[..., :width].clone(), index[..., width:].clone()]
    for count, part in zip(counts, parts, strict=True):
        part[torch.arange(width) >= count[..., None]] = garbage
    return BlockLists(
        *(counts[0], parts[0], counts[1] if full else None, parts[1] if full else None, 64, 64)
    )


@pytest.mark.parametrize("own_sums", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (6, 3), (32, 16), (40, 4), (20, 1)])
def test_entries_take_turns_as_their_tiles_are_launched(heads, group, full, own_sums):
    tiles, blocks, width, kv_heads = 7, 90, 4, heads // group
    lists = random_lists(heads, tiles, blocks, width, full)
    turns = take_turns(lists, blocks, kv_heads, own_sums=own_sums)
    together = heads_together(heads, group)
    shared = 0 if own_sums else num_popular(blocks, group)
    assert together % group == heads % together == 0
    assert turns.popular.shape == (kv_heads, shared)
    if shared:
        assert (turns.popular[:, 0] == 0).all(), "all lists name block 0"
    added = defaultdict(int)
    for first in range(0, heads, together):
        for tile in range(tiles):
            for head in range(first, first + together):
                for entry in entries(lists, turns, head, tile):
                    check_entry(
                        *entry, added, head, 1 if own_sums else group, blocks, turns.popular
                    )
    assert max(added) < (heads if own_sums else kv_heads) * blocks + kv_heads * shared * group


def entries(lists: BlockLists, turns, head: int, tile: int):
    """Block, slot and turn of each."""
    both = [(lists[0], lists[1], turns[0], turns[1]), (lists[2], lists[3], turns[2], turns[3])]
    for count, index, slot, turn in both:
        if count is not None:
            assert slot.shape == turn.shape == index.shape
            assert slot.dtype == turn.dtype == torch.int32
            for i in range(int(count[0, head, tile])):
                yield tuple(int(x[0, head, tile, i]) for x in (index, slot, turn))


def check_entry(block, slot, turn, added, head, group, blocks, popular):
    assert turn == added[slot]
    added[slot] += 1
    kv_heads, shared = popular.shape
    kv_head, own = divmod(head, group)
    # None are popular, and there may be fewer KV heads, if each head has its own sums.
    named = popular[kv_head].tolist() if shared else []
    place = named.index(block) if block in named else None
    if place is None:
        assert slot == kv_head * blocks + block
    else:
        assert slot == kv_heads * blocks + (kv_head * shared + place) * group + own
