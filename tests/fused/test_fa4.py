"""How FlashAttention-4 is called: no GPU, no FlashAttention-4."""

import types

import pytest
import torch

from nsa.fused import fa4
from nsa.fused.fa4_call import (
    Call,
    Semaphores,
    Sums,
    in_segments,
    more_segments_bytes,
    new_query_sums,
    segment_tiles,
    side_by_side,
)
from nsa.fused.fa4_variants import (
    Mask,
    Variant,
    backward_tile,
    dense_mask,
    forward_tile,
    sums_order,
)
from nsa.fused.kernel_inputs import BlockLists, RowStatistics
from tests.helpers.poison import poisoned_memory

NO_BOUNDS = (None, None)


@pytest.fixture
def launches(monkeypatch):
    """What would be launched, on kernels that write nothing."""
    calls = []
    kernels = types.SimpleNamespace(
        launch_forward=lambda *arguments: calls.append(arguments),
        launch_backward=lambda *arguments: calls.append(arguments),
    )
    monkeypatch.setattr(fa4, "_kernels", lambda: kernels)
    return calls


def make(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("causal", "window", "mask", "bounds"),
    [
        (False, NO_BOUNDS, Mask(), NO_BOUNDS),
        (True, NO_BOUNDS, Mask(causal=True), NO_BOUNDS),
        (True, (511, None), Mask(left=True, right=True), (511, 0)),
        (False, (511, 511), Mask(left=True, right=True), (511, 511)),
        (False, (None, 3), Mask(right=True), (None, 3)),
        (False, (None, 0), Mask(causal=True), NO_BOUNDS),
    ],
)
def test_masks(causal, window, mask, bounds):
    assert dense_mask(causal, window, None) == (mask, bounds)


@pytest.mark.parametrize("other", [dict(causal=True), dict(window_size=(3, None))])
def test_block_ends_exclude_other_masks(other):
    q, k = make(1, 2, 4, 128), make(1, 2, 1, 128)
    mask = dict(causal=False, window_size=NO_BOUNDS) | other
    with pytest.raises(ValueError, match="block_ends excludes"):
        fa4.dense_forward(q, k, k, scale=1.0, block_ends=(64, 63), **mask)


CAUSAL = Mask(causal=True)
WINDOW = Mask(left=True, right=True)
BLOCK_ENDS = Mask(block_ends=(64, 63))
BLOCKS = Mask(right=True, block_stride=16)


@pytest.mark.parametrize(
    ("group", "dim", "mask", "tile"),
    [
        (1, 64, CAUSAL, (192, 128)),
        (4, 64, WINDOW, (192, 128)),
        (1, 96, CAUSAL, (192, 128)),
        (4, 96, Mask(), (192, 144)),
        (1, 128, CAUSAL, (128, 128)),
        (4, 128, WINDOW, (192, 80)),
        (5, 128, WINDOW, (128, 128)),
        (4, 128, CAUSAL, (128, 160)),
        (64, 128, Mask(), (128, 160)),
        (64, 128, Mask(right=True), (128, 128)),
        (4, 128, BLOCK_ENDS, (192, 80)),
        (5, 128, BLOCK_ENDS, (128, 128)),
        (1, 128, BLOCKS, (128, 160)),
        (16, 128, BLOCKS, (128, 160)),
        (4, 64, BLOCKS, (192, 128)),
        (4, 256, BLOCKS, (128, 64)),
        (4, 256, WINDOW, (128, 64)),
        (4, 256, CAUSAL, (128, 80)),
    ],
)
def test_forward_tiles(group, dim, mask, tile):
    assert forward_tile(Variant(torch.bfloat16, dim, dim, group, mask)) == tile


@pytest.mark.parametrize(
    ("dim", "blocks", "tile"),
    [
        (64, (192, 128), (192, 128)),
        (64, (256, 64), (128, 64)),
        (96, (384, 128), (192, 128)),
        (128, (192, 64), (64, 64)),
        (128, (256, 128), (128, 128)),
        (256, (256, 64), (128, 64)),
        (256, (256, 128), None),
        (128, (96, 128), None),
        (128, (256, 32), None),
    ],
)
def test_forward_tiles_of_lists(dim, blocks, tile):
    variant = Variant(torch.bfloat16, dim, dim, 4, CAUSAL, blocks=blocks)
    if tile is None:
        with pytest.raises(ValueError, match=f"got {blocks[0]} and {blocks[1]}"):
            forward_tile(variant)
    else:
        assert forward_tile(variant) == tile


@pytest.mark.parametrize(
    ("dim", "mask", "blocks", "tile"),
    [
        (64, CAUSAL, None, (128, 128)),
        (96, CAUSAL, None, (64, 128)),
        (128, CAUSAL, None, (64, 128)),
        (128, WINDOW, None, (64, 128)),
        (128, BLOCK_ENDS, None, (80, 128)),
        (128, Mask(limited=True), (320, 128), (80, 128)),
        (128, Mask(limited=True), (256, 128), (64, 128)),
        (256, CAUSAL, None, (64, 48)),
        (256, CAUSAL, (256, 64), (64, 64)),
        (128, CAUSAL, (256, 64), None),
        (64, CAUSAL, (64, 128), None),
    ],
)
def test_backward_tiles(dim, mask, blocks, tile):
    variant = Variant(torch.bfloat16, dim, dim, 4, mask, blocks=blocks)
    if tile is None:
        with pytest.raises(ValueError, match=f"got {blocks[0]} and {blocks[1]}"):
            backward_tile(variant)
    else:
        assert backward_tile(variant)[:2] == tile


def call_of(q, k, **options) -> Call:
    return Call(q, k, k, 1.0, CAUSAL, **options)


def test_variants_go_by_no_length():
    one = call_of(make(1, 5, 8, 128), make(1, 5, 2, 128)).variant()
    assert one == Variant(torch.bfloat16, 128, 128, 4, CAUSAL)
    assert one == call_of(make(3, 9, 16, 128), make(3, 700, 4, 128)).variant()
    bounds = [make(n + 1, dtype=torch.int32) for n in (1, 256, 257)]
    q, k = make(9, 8, 128), make(9, 2, 128)
    packed = [call_of(q, k, bounds=(x, x)).variant() for x in bounds]
    assert packed[:2] == [one._replace(packed=True)] * 2
    assert packed[2] == one._replace(packed=True, many=True)


def test_variants_go_by_what_is_repeated():
    q, k = make(3, 5, 2, 128), make(5, 2, 128).expand(3, 5, 2, 128)
    assert call_of(q, k).variant().repeated == ((), (0,), (0,))
    assert call_of(q, q).variant(k).repeated == ((), (), (), (0,))
    # Of a dimension of size 1 the stride says nothing.
    assert call_of(q[:1], k[:1].as_strided((1, 5, 2, 128), (0, 256, 128, 1))).variant() == (
        call_of(q[:1], q[:1]).variant()
    )


def test_heads_side_by_side():
    x = torch.arange(2 * 5 * 12 * 8).view(2, 5, 12, 8)[:, :, 2:10]
    beside = side_by_side(x, 4, 8)
    assert beside.shape == (2, 5, 2, 32)
    assert torch.equal(beside.reshape(2, 5, 8, 8), x)
    # As folding has it: tokens that see the same keys are heads, and lie further apart.
    folded = x.permute(2, 0, 1, 3)
    beside = side_by_side(folded, 5, 8)
    for token in range(5):
        assert torch.equal(beside[..., 0, 96 * token :][..., :8], folded[..., token, :])


def test_heads_share_a_cta_where_enough_are_left():
    q, k = (torch.empty(1, 4096, heads, 128, device="meta") for heads in (64, 4))
    call = call_of(q, k)
    assert call.variant().heads_per_cta == 1
    assert call.variant(q).heads_per_cta == 8
    assert not call.variant(q).plain().adds_keys
    assert call_of(q[:, :2048], k[:, :2048]).variant(q).heads_per_cta == 1
    assert call_of(q[:, :, :24], k).variant(q[:, :, :24]).heads_per_cta == 2
    assert call._replace(deterministic=True).variant(q).heads_per_cta == 1
    in_order = call._replace(mask=WINDOW, deterministic=True)
    assert in_order.variant(q).heads_per_cta == 8
    assert call._replace(blocks=(64, 128)).variant(q).heads_per_cta == 1
    wide = torch.empty(1, 4096, 64, 136, device="meta")[..., :128]
    assert call.variant(wide).heads_per_cta == 1


def make_statistics(*shape) -> RowStatistics:
    return RowStatistics(*(make(*shape, dtype=torch.float32) for _ in range(2)))


def new_sums(call: Call) -> Sums:
    variant = call.variant(call.q)
    return Sums.new(call, variant, backward_tile(variant))


@pytest.mark.parametrize("packed", [False, True])
def test_float32_sums_are_of_whole_tiles(packed):
    q, k = make(3, 100, 8, 128), make(3, 130, 2, 128)
    call, leading = call_of(q, k), (3,)
    rows, keys = 128, 256
    if packed:
        bounds = make(4, dtype=torch.int32)
        call, leading = call_of(q[0], k[0], bounds=(bounds, bounds)), ()
        # Of 3 sequences, each of which may start a tile.
        rows, keys = 320, 640
    with poisoned_memory():
        sums = new_sums(call)
    assert sums.dq.shape == (*leading, 8, rows * 128)
    assert sums.dk.shape == sums.dv.shape == (*leading, 2, keys * 128)
    assert not any(x.any() for x in sums)
    alone = call._replace(k=call.q, v=call.q)
    assert new_sums(alone)[1:] == (None, None)


def test_at_256_channels_sums_have_rounded_ones():
    q = make(1, 10, 4, 200)
    call = Call(q, q[..., :1, :], q[..., :1, :], 1.0, CAUSAL)
    sums = new_sums(call)
    assert sums.dq.shape[-1] == 64 * 256
    assert sums.dk.shape[-1] == 48 * 256


def test_inputs_are_copied_where_the_kernels_cannot_read_them(launches):
    q = make(1, 64, 8, 128)
    odd = make(64 * 2 * 128 + 1)[1:].view(1, 64, 2, 128)
    turned = make(1, 64, 128, 2).transpose(2, 3)
    leaf = q.clone().requires_grad_()
    mask = dict(scale=1.0, causal=True, window_size=NO_BOUNDS)
    fa4.dense_forward(leaf, odd, turned, **mask)
    call, *_ = launches.pop()
    assert call.q.data_ptr() == leaf.data_ptr()
    assert not call.q.requires_grad
    for x in (call.k, call.v):
        assert x.data_ptr() % 16 == 0
        assert x.is_contiguous()
    dout, statistics = make(1, 64, 128, 8).transpose(2, 3), make_statistics(1, 8, 64)
    grads = fa4.dense_backward(dout, q, odd, turned, statistics, **mask)
    sent, _, given, written, no_sums = launches.pop()
    assert no_sums is None
    assert sent.is_contiguous()
    assert given is statistics
    for x, grad in zip((q, odd, turned), grads, strict=True):
        assert grad.shape == x.shape
        assert grad.stride(-1) == 1
    assert [x.data_ptr() for x in written] == [x.data_ptr() for x in grads]


def test_strided_results_are_written_in_place(launches):
    q, out, dq = (make(256, 8, 128).unflatten(0, (-1, 64)).permute(2, 0, 1, 3) for _ in range(3))
    k, lse = make(8, 4, 1, 128), make(8, 64, 4, dtype=torch.float32)
    mask = dict(scale=1.0, causal=True, window_size=NO_BOUNDS)
    assert fa4.dense_forward(q, k, k, out=out, lse=lse, **mask) == (out, lse)
    assert launches[0][1].data_ptr() == out.data_ptr()
    assert launches[0][2] is lse
    assert launches[0][1].stride() == out.stride()
    grads = fa4.dense_backward(q, q, k, k, make_statistics(8, 64, 4), dq=dq, **mask)
    assert grads[0] is dq
    assert launches[1][3][0] is dq


def test_gradients_of_queries_are_added_to_sums_of_whole_tiles(launches):
    q, k, statistics = make(1, 100, 8, 128), make(1, 6, 2, 128), make_statistics(1, 8, 100)
    with poisoned_memory():
        sums = new_query_sums(q)
    assert sums.shape == (1, 8, 128 * 128)
    assert not sums.any()
    masks = dict(causal=True, window_size=(63, None)), dict(block_ends=(16, 31))
    for mask in masks:
        grads = fa4.add_dense_backward(q, q, k, k, statistics, sums, scale=1.0, **mask)
        _, call, given, (dq, *written), added = launches.pop()
        assert given is statistics
        assert dq is None
        assert all(x is grad for x, grad in zip(written, grads, strict=True))
        assert added is sums
        variant = call.variant(q)
        tile = backward_tile(variant)
        new = Sums.new(call, variant, tile, sums)
        assert new.dq is sums
        assert new.dk.shape == new.dv.shape == (1, 2, 128 * 128)
        # All such calls have the sums in one order.
        assert tile.queries == sums_order(128).rows
    assert call.window == (2048 // 64, 31)
    with pytest.raises(ValueError, match="a mask that skips tiles"):
        fa4.add_dense_backward(q, q, k, k, statistics, sums, scale=1.0)


@pytest.mark.parametrize(
    ("length", "heads", "keys", "queries", "segments"),
    [(65536, 64, 4095, 8192, 8), (8192, 64, 511, 2048, 4), (5000, 16, 312, 2048, 3)],
)
def test_blocks_have_keys_for_each_segment_in_one_memory(length, heads, keys, queries, segments):
    kind = dict(dtype=torch.bfloat16, device="meta")
    q = torch.empty(1, length, heads, 128, **kind)
    k = torch.empty(1, keys, heads // 16, 128, **kind)
    tiles = segment_tiles(q, k, deterministic=False)
    assert tiles * 64 == queries
    mask = Mask(left=True, right=True, block_stride=16)
    plain = Call(q, k, k, 1.0, mask, (tiles, 31))
    call = in_segments(plain)
    assert call.k.shape == call.v.shape == (segments, keys, heads // 16, 128)
    assert call.k.stride(0) == 0
    ordered = call._replace(deterministic=True)
    for one, entries in ((call, 1), (ordered, segments)):
        variant = one.variant(q)
        new = Sums.new(one, variant, backward_tile(variant), q)
        # Segments add to the same sums, or where CTAs have an order to their own.
        assert new.dk.shape[0] == new.dv.shape[0] == entries
    semaphores = Semaphores.new(ordered, variant, backward_tile(variant))
    assert semaphores.dq.shape[0] == 1
    assert semaphores.dk.shape[0] == segments


@pytest.mark.parametrize("length", [300, 8192, 65536, 100000, 1 << 20])
def test_sums_of_segments_in_a_fixed_order_are_those_of_the_estimate(length):
    """They would grow by the square of the length, were there ever more segments."""
    keys, kind = length // 16 - 1, dict(dtype=torch.bfloat16, device="meta")
    q, k = torch.empty(1, length, 8, 128, **kind), torch.empty(1, keys, 2, 128, **kind)
    mask, found = Mask(left=True, right=True, block_stride=16), []
    for deterministic in (False, True):
        window = (segment_tiles(q, k, deterministic), 31)
        call = in_segments(Call(q, k, k, 1.0, mask, window, deterministic=deterministic))
        variant = call.variant(q)
        sums = Sums.new(call, variant, backward_tile(variant), q)
        found.append(sums.dk.nbytes + sums.dv.nbytes)
    assert found[1] <= 8 * found[0]
    assert found[1] - found[0] <= more_segments_bytes(2, 128, length, keys)


@pytest.mark.parametrize(("queries", "keys"), [(5, 0), (0, 5)])
def test_without_queries_or_keys_nothing_is_launched(queries, keys, launches, poisoned_memory):
    q, k = make(1, queries, 4, 64), make(1, keys, 4, 64)
    mask = dict(scale=1.0, causal=False, window_size=NO_BOUNDS)
    out, lse = fa4.dense_forward(q, k, k, **mask)
    assert not out.any()
    assert (lse == -torch.inf).all()
    statistics = make_statistics(1, 4, queries)
    assert not any(x.any() for x in fa4.dense_backward(out, q, k, k, statistics, **mask))
    assert not launches


def lists_of(**changes) -> BlockLists:
    count, index = make(1, 4, 2, dtype=torch.int32), make(1, 4, 2, 1, dtype=torch.int32)
    return BlockLists(count, index, None, None, 128, 64)._replace(**changes)


def test_limits_reach_to_the_end_of_the_last_tile(launches):
    q, k = make(1, 200, 4, 64), make(1, 100, 4, 64)
    limit = torch.arange(200, dtype=torch.int32)
    fa4.sparse_forward(q, k, k, lists_of(), scale=1.0, causal=False, key_limit=limit)
    call, *_ = launches.pop()
    assert call.mask == Mask(limited=True)
    assert call.blocks == (128, 64)
    assert torch.equal(call.limit, torch.nn.functional.pad(limit, (0, 56)))


def test_lists_without_full_blocks_have_none(launches):
    q = make(1, 200, 4, 64)
    lists = lists_of(partial_index=make(1, 4, 2, 4, dtype=torch.int32)[..., ::4])
    fa4.sparse_forward(q, q, q, lists, scale=1.0, causal=True)
    call, *_ = launches.pop()
    assert not call.lists[2].any()
    assert call.lists[2].shape == lists.partial_count.shape
    assert all(x.stride(-1) == 1 for x in call.lists)


@pytest.mark.parametrize(
    ("queries", "limited", "message"),
    [(64, True, "exclude each other"), (128, False, "no more queries than keys")],
)
def test_masks_of_lists_exclude_each_other(queries, limited, message):
    q, k = make(1, queries, 4, 64), make(1, 64, 4, 64)
    limit = make(queries, dtype=torch.int32) if limited else None
    with pytest.raises(ValueError, match=message):
        fa4.sparse_forward(q, k, k, lists_of(), scale=1.0, causal=True, key_limit=limit)


def test_heads_that_share_keys_have_one_head_dimension():
    q, k, v = make(1, 64, 4, 64), make(1, 64, 2, 64), make(1, 64, 2, 96)
    dout, mask = make(1, 64, 4, 96), dict(scale=1.0, causal=True, window_size=NO_BOUNDS)
    with pytest.raises(ValueError, match="got 64 and 96"):
        fa4.dense_backward(dout, q, k, v, make_statistics(1, 4, 64), **mask)
