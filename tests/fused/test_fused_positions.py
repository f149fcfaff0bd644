"""Queries that are the last ones of longer sequences: the fused backend with emulated kernels."""

import pytest
import torch
from hypothesis import given, settings

import nsa
from nsa.fused.attention import selected_attention, selected_attention_backward
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.plan import Plan
from nsa.fused.planning import with_scale
from nsa.fused.selection import select_blocks
from nsa.geometry import Geometry
from nsa.reference import attention, selection
from nsa.segments import QuerySegments, Segments, prefix_sum
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers import emulated_fa4
from tests.helpers.compressed_calls import COMPRESSED_CALLS
from tests.helpers.emulation import compressed, drawn_compressed_calls
from tests.helpers.pieces import CLOSE, assert_pieces_equal_whole, cut_problems
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.small_configs import tile_config, token_config
from tests.helpers.strategies import tile_problems, token_problems
from tests.helpers.token_cases import LENGTHS, SEGMENTS, make_geometry

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

F64 = torch.float64
CONFIGS = {
    "token": token_config(),
    "token, started": token_config(compressed_visibility="started"),
    "token, not causal": token_config(causal=False),
    "tile": tile_config(),
    "tile, started": tile_config(compressed_visibility="started"),
    "tile, not causal": tile_config(causal=False),
    "tile, sparse compressed": tile_config(
        num_cmp_selected_blocks=1, cmp_group_size=64, compress_block_size=1
    ),
}


@pytest.mark.unmeasured
@settings(max_examples=examples(60), **WITH_FIXTURES)
@given(case=cut_problems(token_problems()), calls=drawn_compressed_calls)
def test_pieces_equal_the_whole_in_token_mode(case, calls):
    with compressed(calls):
        assert_pieces_equal_whole(case, "fused", given_indices=False)


@pytest.mark.unmeasured
@settings(max_examples=examples(60), **WITH_FIXTURES)
@given(case=cut_problems(tile_problems()), calls=drawn_compressed_calls)
def test_pieces_equal_the_whole_in_tile_mode(case, calls):
    with compressed(calls):
        assert_pieces_equal_whole(case, "fused", given_indices=True)


def results(backend, config, inputs, **bounds):
    """Selection, output and gradients."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    blocks = nsa.select_blocks(q, k, config=config, backend=backend, **bounds)
    out = nsa.forward(q, k, v, config=config, backend=backend, **bounds)
    dout = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)
    return blocks, out, *torch.autograd.grad(out, (q, k, v), dout)


def assert_same(actual, expected):
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1:], expected[1:], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 65), (2, 2), (7, 2375), (64, 192), (65, 321), (100, 2404)],
)
def test_a_batch(queries, keys, name):
    """Rows of the folded compressed branch: a part of one, two parts, or some whole ones."""
    config = CONFIGS[name]
    if config.selection == "token" and queries > 2:
        keys -= 3
    q, *_ = make_inputs((2, queries), 2, 1, 2, dtype=F64)
    _, k, v = make_inputs((2, keys), 2, 1, 2, dtype=F64)
    expected = results("reference", config, (q, k, v))
    for calls in COMPRESSED_CALLS:
        with compressed(calls):
            assert_same(results("fused", config, (q, k, v)), expected)


MIXTURE = [(0, 0), (0, 70), (7, 71), (65, 65), (1, 129), (2, 2), (64, 256), (0, 3), (3, 67)]
"""Queries and keys of each sequence."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack(name):
    queries, keys = map(list, zip(*MIXTURE, strict=True))
    q, *_ = make_inputs((sum(queries),), 4, 2, 8, dtype=F64)
    _, k, v = make_inputs((sum(keys),), 4, 2, 8, dtype=F64)
    bare = dict(cu_seqlens=make_cu_seqlens(queries), cu_seqlens_k=make_cu_seqlens(keys))
    bounded = bare | dict(max_seqlen=max(queries) + 3, max_seqlen_k=max(keys) + 5)
    packing = dict(cu_seqlens=nsa.Packing(**bare))
    expected = results("reference", CONFIGS[name], (q, k, v), **bare)
    for bounds in (bare, bounded, packing):
        assert_same(results("fused", CONFIGS[name], (q, k, v), **bounds), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_gradcheck(packed, name):
    config = CONFIGS[name]
    queries, keys = ([6, 0, 5], [70, 40, 5]) if packed else ([6], [70])
    leading, leading_k = ((sum(x),) if packed else (1, x[0]) for x in (queries, keys))
    q, *_ = make_inputs(leading, 2, 1, 2, dtype=F64, requires_grad=True)
    _, k, v = make_inputs(leading_k, 2, 1, 2, dtype=F64, requires_grad=True)
    square = [torch.randn(1, 2, 2, dtype=F64, requires_grad=True) for _ in range(2)]
    gates = torch.randn(*leading, 2, 3, dtype=F64, requires_grad=True)
    extras = {}
    if packed:
        extras = dict(cu_seqlens=make_cu_seqlens(queries), cu_seqlens_k=make_cu_seqlens(keys))
    # Given, so that finite differences do not change the selection.
    blocks = nsa.select_blocks(q, k, config=config, compress_k_weight=square[0], **extras)

    def function(q, k, v, gates, k_weight, v_weight):
        return nsa.forward(
            q, k, v, config=config, gates=gates, compress_k_weight=k_weight,
            compress_v_weight=v_weight, block_indices=blocks, backend="fused", **extras,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, gates, *square), fast_mode=True)


@pytest.mark.unmeasured
@pytest.mark.parametrize(("mode", "packed"), [("token", False), ("tile", True)])
def test_compiles_once_for_all_offsets(packed, mode):
    torch._dynamo.reset()
    config = CONFIGS[mode]

    def function(q, k, v, extra):
        return nsa.forward(q, k, v, config=config, backend="fused", **extra).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    # More than one tile, because PyTorch compiles for a size of 1.
    forms = [([70, 7, 0], [262, 71, 64]), ([65, 3, 2], [129, 3, 130]), ([130, 2, 4], [194, 66, 4])]
    for index, (queries, keys) in enumerate(forms):
        leading, leading_k = ((sum(x),) if packed else (2, x[0]) for x in (queries, keys))
        q, *_ = make_inputs(leading, 4, 2, 8, dtype=F64, requires_grad=True)
        _, k, v = make_inputs(leading_k, 4, 2, 8, dtype=F64, requires_grad=True)
        extra = {}
        if packed:
            extra = dict(cu_seqlens=make_cu_seqlens(queries), max_seqlen=max(queries))
            extra |= dict(cu_seqlens_k=make_cu_seqlens(keys), max_seqlen_k=max(keys))
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            outs = [f(q, k, v, extra) for f in (function, compiled)]
        grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out in outs]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.unmeasured
@pytest.mark.parametrize("mode", ["token", "tile"])
def test_boundaries_may_be_overwritten_before_the_backward(mode):
    queries, keys = [6, 7, 0], [70, 71, 64]
    q, *_ = make_inputs((13,), 4, 2, 8, dtype=F64, requires_grad=True)
    _, k, v = make_inputs((205,), 4, 2, 8, dtype=F64, requires_grad=True)
    grads, bounds = [], [make_cu_seqlens(x) for x in (queries, keys)]

    def function(q, k, v, cu_seqlens, cu_seqlens_k):
        return nsa.forward(
            q, k, v, config=CONFIGS[mode], backend="fused", cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k, max_seqlen=7, max_seqlen_k=71,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for overwritten in (False, True):
        for call in (function, compiled):
            given = [x.clone() for x in bounds]
            out = call(q, k, v, *given)
            if overwritten:
                for x in given:
                    x.zero_()
            grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=1e-12)


def test_chunks_of_heads_follow_from_shapes():
    """A limit of the workspace gives the same chunks each time, and changes nothing else."""
    config = CONFIGS["token"]
    q, *_ = make_inputs((1, 65), 4, 4, 8, dtype=F64)
    _, k, v = make_inputs((1, 400), 4, 4, 8, dtype=F64)
    expected = nsa.forward(q, k, v, config=config, backend="fused")
    actual = nsa.forward(q, k, v, config=config, backend="fused", max_workspace_bytes=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


TILE_SEGMENTS = [(4, 0, 65), (0, 64, 64), (0, 256, 44), (1, 0, 0), (3, 0, 63), (2, 0, 1), (0, 0, 0)]
"""The same as ``SEGMENTS`` for tile mode: from a tile to a tile, or to the end of the sequence."""


def pieces_of_sequences(mode: str, causal: bool) -> tuple[Geometry, Plan]:
    """Several segments over the keys of a sequence, for the reference and for the fused stages."""
    config = with_scale((token_config if mode == "token" else tile_config)(causal=causal), 0.5)
    geometry = make_geometry("pieces", config)
    if mode == "tile":
        sequence, first, count = map(torch.tensor, zip(*TILE_SEGMENTS, strict=True))
        rows = Segments(prefix_sum(count), int(count.sum()))
        geometry = Geometry(QuerySegments(rows, first, sequence), geometry.keys, config)
    unread = Geometry(geometry.queries, geometry.keys, config, exact=False)
    bounds = (x.offset.int() for x in (geometry.queries.rows, geometry.keys))
    return geometry, Plan(unread, 1, 8, *bounds, max(LENGTHS))


def visible_lse(q, k_cmp, geometry) -> torch.Tensor:
    """The log-sum-exp of the compressed branch, ``(1, H, T)``."""
    first, end = geometry.compressed_interval()
    index = torch.arange(len(k_cmp))
    seen = (index >= first[:, None]) & (index < end[:, None])
    keys = k_cmp.repeat_interleave(q.shape[1] // k_cmp.shape[1], dim=1)
    scores = torch.einsum("thd,mhd->htm", q, keys) * geometry.config.scale
    return scores.masked_fill(~seen, -torch.inf).logsumexp(-1)[None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["token", "tile"])
def test_segments_anywhere_share_keys(mode, causal):
    """Context parallelism has several segments a sequence, in any order, over one copy of keys."""
    geometry, plan = pieces_of_sequences(mode, causal)
    rows, keys = geometry.queries.rows.total, geometry.keys.total
    generator = torch.Generator().manual_seed(0)
    q, k, v, k_cmp, dout = (
        torch.randn(*shape, 8, dtype=F64, generator=generator)
        for shape in (
            (rows, 4),
            (keys, 2),
            (keys, 2),
            (plan.geometry.compressed.total, 2),
            (rows, 4),
        )
    )
    k_cmp = k_cmp[: geometry.compressed.total]
    padded = torch.nn.functional.pad(
        k_cmp, (0, 0, 0, 0, 0, plan.geometry.compressed.total - len(k_cmp))
    )
    expected = selection.select_blocks(q, k_cmp, geometry)
    lse = visible_lse(q, k_cmp, geometry) if mode == "token" else None
    blocks = select_blocks(plan.align_queries(q[None]), padded[None], lse, plan)
    found = blocks[0, : len(expected)]
    assert torch.equal(found[..., : expected.shape[-1]], expected)
    assert (found[..., expected.shape[-1] :] == -1).all()

    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _ = attention.selected_attention(*inputs, expected, geometry)
    grads = torch.autograd.grad(out, inputs, dout)
    with torch.no_grad():
        batch = [x[None] for x in inputs]
        results = selected_attention(plan.align_queries(batch[0]), *batch[1:], blocks, plan)
        place = (lambda x: x) if mode == "token" else plan.queries.unpack
        torch.testing.assert_close(place(results[0])[0], out, **CLOSE)
        own_dout = dout[None] if mode == "token" else plan.queries.pack(dout[None])
        by_row = mode == "token"
        lse = results[1].T[None] if by_row else results[1]
        statistics = emulated_fa4.row_statistics(own_dout, results[0], lse)
        if by_row:
            statistics = RowStatistics(*(x[0].T.contiguous() for x in statistics))
        dq, dk, dv = selected_attention_backward(own_dout, *batch, statistics, blocks, plan)
    for actual, wanted in zip((place(dq), dk, dv), grads, strict=True):
        torch.testing.assert_close(actual[0], wanted, **CLOSE)


def test_tokens_of_segments_are_tiles_at_their_positions():
    """What the importance kernel reads, tile by tile."""
    _, plan = pieces_of_sequences("token", True)
    tiles = plan.token_tiles(8, 64)
    starts = [sum(max(0, (n - 32) // 16 + 1) for n in LENGTHS[:i]) for i in range(len(LENGTHS))]
    token, expected = 0, []
    for sequence, first, count in SEGMENTS["pieces"]:
        length = LENGTHS[sequence]
        numbers = [starts[sequence], max(0, (length - 32) // 16 + 1), -(-length // 64)]
        for done in range(0, count, 8):
            expected.append([token + done, first + done, min(8, count - done), *numbers])
        token += count
    assert tiles.fields.tolist()[: len(expected)] == expected
    assert not tiles.fields[len(expected) :, 2].any()
