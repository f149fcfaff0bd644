"""On the GPU: the pairs of each block, and the work items that they are cut into, by hand."""

from collections import defaultdict

import pytest
import torch

from tests.helpers.gpu_cases import gpu_test
from tests.helpers.requirements import import_fused
from tests.helpers.token_cases import KV_HEADS, SEGMENTS, TokenForm, make_selected_case

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]


def expected_pairs(case, chunk_tokens: int, band: bool) -> dict[tuple, list[int]]:
    """The tokens of each KV head, chunk and block."""
    own = case.own
    base, limit = case.blocks.base.tolist(), case.blocks.limit.tolist()
    pairs = defaultdict(list)
    for token, heads in enumerate(case.block_indices.tolist()):
        for head, row in enumerate(heads):
            for block in row:
                left_out = band and block in (0, own[token] - 1, own[token])
                if 0 <= block < limit[token] and not left_out:
                    pairs[head, token // chunk_tokens, base[token] + block].append(token)
    return pairs


def listed_pairs(index, case, item_tokens: int) -> dict[tuple, list[int]]:
    """The same, as the work items have it; checks what holds of each item."""
    first, keys, row = (x.tolist() for x in (case.blocks.first, case.blocks.keys, case.blocks.row))
    # Segments of one sequence have blocks of their own, with the same keys.
    block_of = {(first[i], row[i]): i for i, number in enumerate(keys) if number}
    tokens, unit_pairs = index.tokens.tolist(), index.chunk_tokens * index.slots
    pairs, taken, preceding = defaultdict(list), set(), defaultdict(int)
    for wave, (items, count) in enumerate(zip(index.items.tolist(), index.num_items, strict=True)):
        assert count <= len(items)
        for position, number, key, num_keys, first_row, before in items[: int(count)]:
            unit, block = position // unit_pairs, block_of[key, first_row]
            assert unit // index.wave_units == wave
            assert 1 <= number <= item_tokens
            assert num_keys == keys[block]
            places = range(position, position + number)
            assert taken.isdisjoint(places), "a pair is in two items"
            taken.update(places)
            chunk, head = divmod(unit, KV_HEADS)
            assert before == preceding[unit, block]
            preceding[unit, block] += 1
            pairs[head, chunk, block] += [tokens[i] for i in places]
    return pairs


def check_positions(index, case, pairs: dict[tuple, list[int]]):
    """Each pair's position is one of its token's, in the part of the list of its KV head and chunk;
    what is no pair has none."""
    tokens, unit_pairs = index.tokens.tolist(), index.chunk_tokens * index.slots
    base, rows = case.blocks.base.tolist(), case.block_indices.tolist()
    seen = set()
    for token, heads in enumerate(index.position.tolist()):
        for head, positions in enumerate(heads):
            for block, position in zip(rows[token][head], positions, strict=True):
                chunk = token // index.chunk_tokens
                if block < 0 or token not in pairs.get((head, chunk, base[token] + block), ()):
                    assert position == -1
                    continue
                assert tokens[position] == token
                assert position // unit_pairs == chunk * KV_HEADS + head
                assert position not in seen
                seen.add(position)
    assert len(seen) == sum(map(len, pairs.values()))


@pytest.mark.parametrize("band", [False, True], ids=["any blocks", "band"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("slots", "block_size", "chunk_tokens", "wave_units", "item_tokens"),
    [(1, 64, 64, 100, 16), (3, 32, 100, 1, 16), (16, 32, 64, 3, 100), (7, 64, 512, 2, 512)],
)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_inverted_index(
    segments, slots, block_size, chunk_tokens, wave_units, item_tokens, causal, band
):
    form = TokenForm(64, 1, block_size, slots, causal, torch.bfloat16)
    case = make_selected_case(form, forced=band, segments=segments)
    invert_index = import_fused("nsa.fused.kernels.inverted_index").invert_index
    sizes = (chunk_tokens, wave_units, item_tokens)
    index = invert_index(case.block_indices, case.blocks, block_size, causal, *sizes, band)
    check_index(index, case, chunk_tokens, item_tokens, band)


def check_index(index, case, chunk_tokens: int, item_tokens: int, band: bool):
    assert index.position.shape == case.block_indices.shape
    assert index.chunks == -(-len(case.own) // chunk_tokens)
    assert index.units == KV_HEADS * index.chunks
    expected = expected_pairs(case, chunk_tokens, band)
    actual = listed_pairs(index, case, item_tokens)
    assert {key: sorted(tokens) for key, tokens in actual.items()} == expected
    check_positions(index, case, expected)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("slots", [3, 16])
def test_lists_of_any_strides(slots, order):
    case = make_selected_case(TokenForm(64, 1, 32, slots, True, torch.bfloat16), forced=False)
    inverse = [order.index(i) for i in range(3)]
    indices = case.block_indices.permute(order).contiguous().permute(inverse)
    invert_index = import_fused("nsa.fused.kernels.inverted_index").invert_index
    index = invert_index(indices, case.blocks, 32, True, 64, 3, 16)
    check_index(index, case, 64, 16, band=False)
