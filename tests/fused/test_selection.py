"""The selection around the kernel: chunks of tiles and columns, and the rules of the kernel.

What the emulated kernel computes is held against a loop over rows; the kernel is held against the
emulation on a GPU.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa
from nsa.boundaries import boundaries_of
from nsa.fused import kernel_calls, selection
from nsa.fused.planning import make_plan
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers import emulated_kernels
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.small_configs import tile_config
from tests.helpers.strategies import tile_problems


def best_of_row(scores, visible, candidates, own, count, per_block, num_initial, num_local):
    """One row by hand; ``scores`` are those of its sequence, scaled."""
    ranks = []
    for block in range(candidates):
        seen = scores[block * per_block : min((block + 1) * per_block, visible)]
        best = max(seen, default=-math.inf)
        forced = block <= own and (block < num_initial or block > own - num_local)
        if forced or best > -math.inf:
            ranks.append((not forced, -best, block))
    taken = sorted(block for _, _, block in sorted(ranks)[:count])
    return taken + [-1] * (count - len(taken))


@pytest.mark.parametrize("count", [7, 62, 125])
def test_emulated_scores_of_equal_keys_are_equal(count):
    """Else the two backends break ties differently. A matrix product rounds columns differently."""
    summary, key = (torch.randn(2, n, 6, 8, dtype=torch.float64) for n in (3, 1))
    scores = emulated_kernels.tile_scores(summary, key.expand(-1, count, -1, -1))
    assert torch.equal(scores, scores[..., :1].expand_as(scores))


@settings(max_examples=examples(100), **WITH_FIXTURES)
@given(data=st.data())
def test_emulated_top_blocks(data):
    integers, dtype = st.integers, data.draw(st.sampled_from([torch.float32, torch.float64]))
    batch, heads, tiles, skipped = (data.draw(integers(1, 2)) for _ in range(4))
    columns, column_offset = data.draw(integers(0, 20)), data.draw(integers(0, 3))
    rules = dict(
        per_block=data.draw(integers(1, 4)),
        num_initial=data.draw(integers(0, 2)),
        num_local=data.draw(integers(0, 2)),
    )
    count = data.draw(integers(max(1, rules["num_initial"] + rules["num_local"]), 7))
    values = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 3.0])
    drawn = [data.draw(values) for _ in range(batch * heads * tiles * columns)]
    scores = torch.tensor(drawn, dtype=dtype).view(batch, heads, tiles, columns)

    total = skipped + tiles + 1
    start = [data.draw(integers(0, columns)) for _ in range(total)]
    visible = [data.draw(integers(0, columns - s)) for s in start]
    candidates = [data.draw(integers(0, 12)) for _ in range(total)]
    own = [data.draw(integers(0, 12)) for _ in range(total)]
    first = [column_offset + s for s in start]
    vectors = [torch.tensor(x, dtype=torch.int32) for x in (first, visible, candidates, own)]
    out = torch.full((batch, total, heads, count), -7, dtype=torch.int32)
    offsets = dict(tile_offset=skipped, column_offset=column_offset)
    emulated_kernels.top_blocks(scores, *vectors, out, scale=0.5, **offsets, **rules)

    assert (out[:, :skipped] == -7).all()
    assert (out[:, skipped + tiles :] == -7).all()
    for b in range(batch):
        for h in range(heads):
            for c in range(tiles):
                t = skipped + c
                row = (0.5 * scores[b, h, c, start[t] :]).tolist()
                expected = best_of_row(row, visible[t], candidates[t], own[t], count, **rules)
                assert out[b, t, h].tolist() == expected


@settings(max_examples=examples(60), **WITH_FIXTURES)
@given(problem=tile_problems(), held=st.sampled_from([1, 30, 200]))
def test_chunks_of_tiles_select_the_same(fused_on_cpu, problem, held):
    """The emulated kernel also checks that every visible column is in its chunk."""
    expected = problem.forward(backend="reference")
    indices = problem.select_blocks(backend="reference")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(selection, "TILE_SCORES", held)
        assert torch.equal(problem.select_blocks(backend="fused"), indices)
        actual = problem.forward(backend="fused")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def selected_columns(monkeypatch, q, k_cmp, plan):
    """The widths of the scores of a selection in chunks of one tile."""
    widths = []

    def top_blocks(scores, *args, **kwargs):
        widths.append(scores.shape[-1])
        emulated_kernels.top_blocks(scores, *args, **kwargs)

    monkeypatch.setattr(kernel_calls, "top_blocks", top_blocks)
    monkeypatch.setattr(selection, "TILE_SCORES", 1)
    selection.select_blocks(plan.align_queries(q), k_cmp, None, plan)
    return widths


def test_columns_past_the_tile_are_not_computed(fused_on_cpu, monkeypatch):
    q, k, _ = make_inputs((2, 400), 2, 1, 8, dtype=torch.float64)
    plan = make_plan(q, tile_config())
    widths = selected_columns(monkeypatch, q, k[:, :25], plan)
    assert widths == [4, 8, 12, 16, 20, 24, 25]  # blocks of 16 complete at 64, 128, ..., 400


def test_columns_far_before_the_tile_are_not_computed(fused_on_cpu, monkeypatch):
    q, k, _ = make_inputs((1, 4000), 2, 1, 8, dtype=torch.float64)
    cu_seqlens = make_cu_seqlens([400] * 10)
    plan = make_plan(q, tile_config(), boundaries_of(cu_seqlens, 400))
    widths = selected_columns(monkeypatch, q, k[:, :250], plan)
    # A sequence has 25; tiles and blocks that may be short leave some doubt about where it starts.
    assert max(widths) < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_selection_neither_uses_nor_sets_float32_precision(fused_on_cpu, monkeypatch, dtype):
    """A float32 product may be of TF32, which is set for the whole process."""
    # Else the emulated kernel scores.
    monkeypatch.setattr(selection, "TILE_SCORES", 1)
    products = []
    bmm = torch.bmm

    def noted(a, b, **kwargs):
        products.append(a.dtype)
        return bmm(a, b, **kwargs)

    monkeypatch.setattr(torch, "bmm", noted)
    before = torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(
        type(torch.backends.cuda.matmul), "__setattr__", lambda *_: pytest.fail("a setting changed")
    )
    q, k, _ = make_inputs((2, 700), 4, 2, 16, dtype=dtype)
    nsa.select_blocks(q, k, config=tile_config(), backend="fused")
    assert products
    assert torch.float32 not in products
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_selection_is_limited_to_what_the_kernel_holds():
    reason = nsa.explain_backend(
        *make_inputs((1, 10), 4, 2, 64, dtype=torch.bfloat16),
        config=nsa.NSAConfig(num_selected_blocks=257),
    )
    assert "num_selected_blocks of at most 256, got 257" in str(reason)


@pytest.mark.parametrize("tile_summary", ["mean", "first"])
def test_bfloat16_parts_score_as_float32(fused_on_cpu, monkeypatch, tile_summary):
    q, k, _ = make_inputs((2, 700), 4, 2, 16, dtype=torch.bfloat16)
    config = tile_config(tile_summary=tile_summary)
    expected = nsa.select_blocks(q, k, config=config, backend="fused")
    rows = torch.randn(3, 5, 16)
    assert torch.equal(selection._bfloat16_parts(rows).float().unflatten(-1, (3, -1)).sum(-2), rows)
    monkeypatch.setattr(selection, "FEW_SCORES", 1)
    assert torch.equal(nsa.select_blocks(q, k, config=config, backend="fused"), expected)
