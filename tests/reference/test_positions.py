"""Queries that are the last ones of a longer sequence: pieces of a sequence, and any segments."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa
from nsa.geometry import Geometry
from nsa.reference import pipeline
from nsa.reference.selection import select_blocks
from nsa.segments import QuerySegments, Segments
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.pieces import (
    CLOSE,
    assert_pieces_equal_whole,
    cut,
    cut_problems,
    rows_of,
    units_of,
)
from tests.helpers.profiles import examples
from tests.helpers.small_configs import SMALL
from tests.helpers.strategies import configs, problems
from tests.oracle import nsa_oracle

F64 = torch.float64


@pytest.mark.unmeasured
@settings(max_examples=examples(150))
@given(cut_problems(problems()), st.booleans())
def test_pieces_equal_the_whole(case, given_indices):
    assert_pieces_equal_whole(case, "reference", given_indices=given_indices)


@given(cut_problems(problems()))
def test_pieces_select_what_the_whole_selects(case):
    indices = case.whole.select_blocks()
    for spans in case.pieces:
        piece = cut(case.whole, spans)
        assert torch.equal(piece.problem.select_blocks(), units_of(indices, piece))


@given(cut_problems(problems(max_tokens=40)))
def test_pieces_equal_the_oracle(case):
    q, k, v, config, extras = case.whole
    expected = nsa_oracle(q, k, v, config, **extras, block_indices=case.whole.select_blocks()).out
    for spans in case.pieces:
        piece = cut(case.whole, spans)
        torch.testing.assert_close(piece.problem.forward(), rows_of(expected, piece), **CLOSE)


PRESETS = {"token": nsa.NSAConfig.paper(), "tile": nsa.NSAConfig()}
LONGEST = 4096


@pytest.fixture(scope="module", params=PRESETS)
def long(request):
    """A preset, 4,096 tokens and their output."""
    config = PRESETS[request.param]
    inputs = make_inputs((1, LONGEST), 2, 1, 4, 3, dtype=F64)
    return config, inputs, nsa.forward(*inputs, config=config, backend="reference")


@pytest.mark.parametrize("queries", [0, 1, 2, 7, 64, 65, 256])
@pytest.mark.parametrize("tiles", [0, 1, 5, 15])
def test_few_queries_after_many_keys(long, queries, tiles):
    config, (q, k, v), whole = long
    start = tiles * config.q_tile_size
    if config.selection == "token":
        start = max(0, start - 3)
    end = start + queries
    out = nsa.forward(q[:, start:end], k[:, :end], v[:, :end], config=config)
    torch.testing.assert_close(out, whole[:, start:end], **CLOSE)


def test_gradients_of_few_queries_after_many_keys(long):
    config, inputs, _ = long
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    whole = nsa.forward(q, k, v, config=config)
    for queries in (1, 65):
        end = LONGEST - config.q_tile_size + queries
        start = end - queries
        piece = nsa.forward(q[:, start:end], k[:, :end], v[:, :end], config=config)
        actual = torch.autograd.grad(piece.square().sum(), (q, k, v))
        total = whole[:, start:end].square().sum()
        expected = torch.autograd.grad(total, (q, k, v), retain_graph=True)
        torch.testing.assert_close(actual, expected, **CLOSE)


LENGTHS = {
    "token": [(0, 0), (0, 70), (7, 71), (65, 65), (1, 130), (2, 2), (0, 3), (64, 200)],
    "tile": [(0, 0), (0, 70), (7, 71), (65, 65), (2, 130), (3, 3), (0, 3), (72, 200)],
    "sparse": [(0, 0), (0, 70), (7, 71), (65, 65), (2, 130), (3, 3), (0, 3), (72, 200)],
}
"""Queries and keys of each sequence."""


def _mixture(mode):
    queries, keys = zip(*LENGTHS[mode], strict=True)
    q = make_inputs((sum(queries),), 4, 2, 8, 5, dtype=F64)[0]
    _, k, v = make_inputs((sum(keys),), 4, 2, 8, 5, dtype=F64)
    bounds = dict(cu_seqlens=make_cu_seqlens(queries), cu_seqlens_k=make_cu_seqlens(keys))
    return (q, k, v), bounds


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", SMALL)
def test_a_mixture_equals_its_sequences(mode, causal):
    config = dataclasses.replace(SMALL[mode], causal=causal)
    inputs, bounds = _mixture(mode)
    q, k, v = (x.requires_grad_() for x in inputs)
    packed = nsa.forward(q, k, v, config=config, **bounds)
    indices = nsa.select_blocks(q, k, config=config, **bounds)
    parts, blocks = [], []
    queries, keys = map(list, zip(*LENGTHS[mode], strict=True))
    own = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    for own_q, own_k, own_v in own:
        one = own_q[None], own_k[None], own_v[None]
        parts.append(nsa.forward(*one, config=config)[0])
        blocks.append(nsa.select_blocks(*one[:2], config=config)[0])
    single = torch.cat(parts)
    torch.testing.assert_close(packed, single, **CLOSE)
    assert torch.equal(indices, torch.cat(blocks, dim=0 if mode == "token" else 1))
    dout = torch.randn_like(packed)
    actual, expected = (torch.autograd.grad(x, (q, k, v), dout) for x in (packed, single))
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("mode", SMALL)
def test_a_packing_equals_bare_boundaries(mode):
    inputs, bounds = _mixture(mode)
    config, (queries, keys) = SMALL[mode], zip(*LENGTHS[mode], strict=True)
    expected = nsa.forward(*inputs, config=config, **bounds)
    packing = nsa.Packing(**bounds)
    assert (packing.lengths, packing.lengths_k) == (list(queries), list(keys))
    assert (packing.max_seqlen, packing.max_seqlen_k) == (max(queries), max(keys))
    bounded = dict(bounds, max_seqlen=max(queries) + 1, max_seqlen_k=max(keys) + 5)
    for call in ({"cu_seqlens": packing}, bounded):
        assert torch.equal(nsa.forward(*inputs, config=config, **call), expected)
        assert torch.equal(
            nsa.select_blocks(*inputs[:2], config=config, **call),
            nsa.select_blocks(*inputs[:2], config=config, **bounds),
        )


@pytest.mark.parametrize("mode", SMALL)
def test_keys_that_no_query_sees_get_no_gradient(mode):
    """A window and no selected block: only the last keys and the compressed ones are seen."""
    config = dataclasses.replace(SMALL[mode], num_initial_blocks=0, num_local_blocks=0)
    q, k, v = make_inputs((1, 100), 4, 2, 8, dtype=F64, requires_grad=True)
    gates = torch.tensor([0.0, 1.0, 1.0], dtype=F64).expand(1, 4, 4, 3)
    indices = nsa.select_blocks(q[:, 96:], k, config=config)
    indices = torch.full_like(indices, -1).index_fill(-1, torch.tensor([0]), 2)
    nsa.forward(q[:, 96:], k, v, config=config, gates=gates, block_indices=indices).sum().backward()
    size, window = config.select_block_size, config.window_size
    seen = torch.zeros(100, dtype=torch.bool)
    seen[2 * size : 3 * size] = seen[97 - window :] = True
    for x in (k, v):
        assert (x.grad[:, ~seen] == 0).all()
        assert (x.grad[:, seen] != 0).any(dim=-1).all()


STRICT = {name: dataclasses.replace(SMALL[name], tile_summary="first") for name in SMALL}


@pytest.mark.parametrize("mode", STRICT)
@pytest.mark.parametrize("t", [64, 65, 70, 80, 95, 98])
def test_no_query_depends_on_later_tokens(mode, t):
    config = STRICT[mode]
    q, k, v = make_inputs((2, 99), 4, 2, 8, dtype=F64)
    changed = [torch.cat([x[:, : t + 1], torch.randn_like(x[:, t + 1 :])], 1) for x in (q, k, v)]
    before = nsa.forward(q[:, 64:], k, v, config=config)
    after = nsa.forward(changed[0][:, 64:], *changed[1:], config=config)
    torch.testing.assert_close(after[:, : t - 63], before[:, : t - 63], **CLOSE)
    if t < 98:
        assert not torch.allclose(after[:, t - 63 :], before[:, t - 63 :])


@st.composite
def _segments(draw):
    """A packed problem, some runs of its queries in any order, and their rows."""
    config = draw(configs())
    unit = 1 if config.selection == "token" else config.q_tile_size
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    runs = []
    for sequence, length in enumerate(lengths):
        tiles = st.integers(0, -(-length // unit))
        drawn = draw(st.lists(tiles, max_size=4))
        edges = sorted({0, length, *(min(length, n * unit) for n in drawn)})
        runs += [(sequence, a, b) for a, b in pairwise(edges)]
        runs += [(sequence, 0, 0)] * draw(st.integers(0, 1))
    runs = draw(st.permutations(runs))
    return config, lengths, runs[: draw(st.integers(0, len(runs)))]


@pytest.mark.unmeasured
@settings(max_examples=examples(150))
@given(_segments())
def test_segments_anywhere_share_keys(case):
    """As context parallelism has them: several segments a sequence, in any order, over one k."""
    config, lengths, runs = case
    q, k, v = make_inputs((sum(lengths),), 4, 2, 4, 3, dtype=F64, requires_grad=True)
    bounds = make_cu_seqlens(lengths)
    whole = nsa.forward(q, k, v, config=config, cu_seqlens=bounds)
    rows = [torch.arange(0)]
    rows += [torch.arange(a, b) + int(bounds[sequence]) for sequence, a, b in runs]
    rows = torch.cat(rows)
    keys = Segments(bounds.long(), sum(lengths))
    sequence, first = (torch.tensor([run[i] for run in runs], dtype=torch.int64) for i in (0, 1))
    offset = make_cu_seqlens([b - a for _, a, b in runs]).long()
    queries = QuerySegments(Segments(offset, len(rows)), first, sequence)
    out = pipeline.attend(q[rows], (k,) * 3, (v,) * 3, Geometry(queries, keys, config))
    torch.testing.assert_close(out, whole[rows], **CLOSE)
    dout = torch.randn_like(out)
    actual, expected = (
        torch.autograd.grad(x, (q, k, v), dout, allow_unused=True) for x in (out, whole[rows])
    )
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", SMALL)
def test_head_and_tail_of_a_batch_of_one(mode, causal, monkeypatch):
    """Two segments over keys without look-ups, in chunks of a few queries and across both."""
    config = dataclasses.replace(SMALL[mode], causal=causal)
    q, k, v = make_inputs((128,), 4, 2, 8, dtype=F64)
    whole = nsa.forward(q[None], k[None], v[None], config=config)[0]
    blocks = nsa.select_blocks(q[None], k[None], config=config)[0]
    rows = torch.cat([torch.arange(16, 48), torch.arange(80, 112)])
    geometry = Geometry.equal(1, 128, 128, k.device, config)
    segments = Segments(torch.tensor([0, 32, 64]), 64)
    queries = QuerySegments(segments, torch.tensor([16, 80]), torch.tensor([0, 0]))
    geometry = Geometry(queries, geometry.keys, config)
    tile = config.q_tile_size
    units = rows if mode == "token" else rows[::tile] // tile
    expected = blocks[units] if mode == "token" else blocks[:, units].transpose(0, 1)
    k_cmp = pipeline.compress(k, None, geometry)
    for elements in (1 << 21, 3000):
        monkeypatch.setattr("nsa.reference.chunks.CPU_CHUNK_ELEMENTS", elements)
        out = pipeline.attend(q[rows], (k,) * 3, (v,) * 3, geometry)
        torch.testing.assert_close(out, whole[rows], **CLOSE)
        found = select_blocks(q[rows], k_cmp, geometry)
        assert torch.equal(found, expected[..., : found.shape[-1]])


@pytest.mark.parametrize("mode", SMALL)
def test_equal_lengths_are_one_case(mode):
    """Keys with the boundaries of the queries cost nothing: positions are indices of keys."""
    q, k, _ = make_inputs((20,), 2, 1, 4)
    bounds = make_cu_seqlens([13, 7])
    for geometry in (
        Geometry.of(q, k, SMALL[mode], bounds),
        Geometry.of(q[None], k[None], SMALL[mode]),
    ):
        queries, keys = geometry.queries, geometry.keys
        assert queries.rows is keys
        assert queries.position is keys.local
        assert queries.owner is keys.owner
