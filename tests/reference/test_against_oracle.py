"""The reference against the float64 oracle, ties, and cases worked out by hand."""

import math

import pytest
import torch
from hypothesis import event, given

import nsa
from nsa.testing import make_inputs
from tests.helpers.small_configs import SMALL
from tests.helpers.strategies import problems
from tests.oracle import assert_same_selection, nsa_oracle

F64 = torch.float64


def assert_equals_oracle(problem, tolerance: float = 1e-10):
    """Compare selection, then the output for that selection."""
    expected = nsa_oracle(problem.q, problem.k, problem.v, problem.config, **problem.extras)
    indices = problem.select_blocks()
    assert_same_selection(indices, expected)
    if expected.block_indices is not None and not torch.equal(indices, expected.block_indices):
        event("a near-tie went the other way")
        expected = nsa_oracle(
            problem.q,
            problem.k,
            problem.v,
            problem.config,
            block_indices=indices,
            **problem.extras,
        )
    torch.testing.assert_close(problem.forward(), expected.out, atol=tolerance, rtol=tolerance)
    given_indices = problem.forward(block_indices=indices)
    torch.testing.assert_close(given_indices, expected.out, atol=tolerance, rtol=tolerance)


@given(problems(selection="token"))
def test_token_mode_equals_the_oracle(problem):
    assert_equals_oracle(problem)


@given(problems(selection="tile"))
def test_tile_mode_equals_the_oracle(problem):
    assert_equals_oracle(problem)


@pytest.mark.parametrize("name", SMALL)
def test_150_tokens_equal_the_oracle(name):
    q, k, v = make_inputs((1, 150), 6, 2, 8, 5, dtype=F64)
    expected = nsa_oracle(q, k, v, SMALL[name])
    assert_same_selection(nsa.select_blocks(q, k, config=SMALL[name]), expected)
    out = nsa.forward(q, k, v, config=SMALL[name])
    torch.testing.assert_close(out, expected.out, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["token", "tile"])
def test_the_callers_blocks_are_attended(name):
    config = SMALL[name]
    q, k, v = make_inputs((2, 45), 4, 2, 8, 5, dtype=F64)
    generator = torch.Generator().manual_seed(1)
    chosen = nsa.select_blocks(q, k, config=config)
    rows = chosen.flatten(0, -2)
    for row in rows:
        # Any ascending blocks, future ones too (whose tokens stay masked), then empty slots.
        count = int(torch.randint(len(row) + 1, (), generator=generator))
        row.fill_(-1)
        row[:count] = torch.randperm(6, generator=generator)[:count].sort().values
    indices = rows.view_as(chosen)
    out = nsa.forward(q, k, v, config=config, block_indices=indices)
    expected = nsa_oracle(q, k, v, config, block_indices=indices)
    torch.testing.assert_close(out, expected.out, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(out, nsa.forward(q, k, v, config=config))


def _selected_attention_alone(*leading, num_heads):
    gates = torch.zeros(*leading, num_heads, 3, dtype=F64)
    gates[..., 1] = 1
    return gates


# Long enough that a matrix product works in several blocks of columns, whose sums may differ.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [257, 2000])
@pytest.mark.parametrize("selection", ["token", "tile"])
def test_equal_keys_select_the_lowest_blocks(selection, length, dtype):
    stride = 8
    config = nsa.NSAConfig(
        selection=selection,
        compress_block_size=stride,
        num_selected_blocks=5,
        num_local_blocks=1,
        q_tile_size=64,
        tile_summary="mean",
    )
    q, _, _ = make_inputs((1, length), 8, 2, 24, dtype=dtype)
    k = torch.randn(2, 24).to(dtype).expand(1, length, 2, 24)
    indices = nsa.select_blocks(q, k, config=config)
    unit = 1 if selection == "token" else config.q_tile_size
    for i in range(-(-length // unit)):
        last = min((i + 1) * unit, length) - 1
        scored = range((last + 1) // stride)
        # The last block of the unit's end, which the sequence may not reach.
        own = ((i + 1) * unit - 1) // stride
        # Four blocks beside that one, the lowest complete ones.
        want = sorted([*[block for block in scored if block != own][:4], own])
        want = [block for block in want if block * stride < length]
        want += [-1] * (5 - len(want))
        got = indices[0, i] if selection == "token" else indices[0, :, i]
        assert got.tolist() == [want] * len(got), f"unit {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("selection", ["token", "tile"])
def test_a_block_repeated_far_away_ties(selection, dtype):
    # Every block is a copy of one of seven, in random order.
    length, size, n = 1003, 4, 6
    config = nsa.NSAConfig(
        selection=selection,
        compress_block_size=size,
        num_selected_blocks=n,
        q_tile_size=32,
        tile_summary="mean",
    )
    q, pool, _ = make_inputs((1, length), 6, 2, 20, dtype=dtype)
    kind = torch.randint(7, (length // size + 1,))
    k = pool[:, : 7 * size].unflatten(1, (7, size))[:, kind].flatten(1, 2)[:, :length]
    indices = nsa.select_blocks(q, k, config=config)
    rows = indices[0] if selection == "token" else indices[0].transpose(0, 1)
    unit = 1 if selection == "token" else config.q_tile_size
    for i, row in enumerate(rows):
        complete = min((i + 1) * unit, length) // size
        for blocks in row.tolist():
            taken = set(blocks) - {-1}
            started = -(-min((i + 1) * unit, length) // size)
            exist = started if selection == "token" else complete
            assert len(taken) == min(n, exist), f"unit {i}: {blocks}"
            for J in taken & set(range(complete)):
                lower = [b for b in range(J) if kind[b] == kind[J]]
                assert set(lower) <= taken, f"unit {i}: {blocks}, {lower} tie with {J}"


def test_equation_9_weights_are_1_2_2_2_1():
    config = nsa.NSAConfig.paper(
        num_selected_blocks=3, num_initial_blocks=0, num_local_blocks=0, scale=1.0
    )
    num_cmp, length = 19, 320  # five selection blocks
    k_cmp = torch.zeros(1, num_cmp, 1, 1, dtype=F64)
    q = torch.ones(1, length, 1, 1, dtype=F64)
    probability = {3: 0.2, 8: 0.15, 9: 0.15, 15: 0.4}
    k_cmp += math.log(1e-9)
    for j, p in probability.items():
        k_cmp[0, j] = math.log(p)
    # J=0: p3; J=1: p3 (weight 1 of j=4J-1); J=2: 2 p8 + 2 p9; J=3: p15; J=4: p15.
    shares = {0: 0.2, 1: 0.2, 2: 0.6, 3: 0.4, 4: 0.4}
    kv = (k_cmp, k_cmp)
    expected = nsa_oracle(q, q, q, config, compressed_kv=kv)
    last = expected.scores[0, -1, 0]
    total = sum(probability.values()) + 15 * 1e-9
    for block, share in shares.items():
        assert last[block].item() == pytest.approx(share / total, abs=1e-7)
    # Equal shares within 1e-9 differ by the tiny rest; 0.6 and both 0.4 lead.
    indices = nsa.select_blocks(q, q, config=config, compressed_kv=kv)
    assert indices[0, -1, 0].tolist() == [2, 3, 4]


@pytest.mark.parametrize("name", SMALL)
def test_one_token_attends_itself(name):
    q, k, v = make_inputs((1, 1), 4, 2, 8, 5, dtype=F64)
    gates = torch.randn(1, 1, 4, 3, dtype=F64)
    out = nsa.forward(q, k, v, config=SMALL[name], gates=gates)
    # No compressed token. In tile mode no score either, and the local block is the tile's last.
    selected = name == "token"
    share = gates[..., 2:] + (gates[..., 1:2] if selected else 0)
    torch.testing.assert_close(out, share * v.repeat_interleave(2, dim=2))


def test_queries_before_the_first_complete_block_see_none():
    config = SMALL["token"]
    q, k, v = make_inputs((1, 12), 2, 1, 4, dtype=F64)
    gates = torch.zeros(1, 12, 2, 3, dtype=F64)
    gates[..., 0] = 1
    out = nsa.forward(q, k, v, config=config, gates=gates)
    assert (out[:, :3] == 0).all()
    torch.testing.assert_close(out[:, 3], v[:, :4].mean(dim=1).expand(1, 2, 4))
    torch.testing.assert_close(out[:, 4], out[:, 3])
    assert (out[:, 5] - out[:, 3]).abs().min() > 1e-6


def test_a_short_last_block_holds_what_is_left():
    config = nsa.NSAConfig(
        selection="token",
        compress_block_size=4,
        num_selected_blocks=1,
        num_local_blocks=1,
    )
    q, k, v = make_inputs((1, 10), 1, 1, 4, dtype=F64)
    gates = _selected_attention_alone(1, 10, num_heads=1)
    out = nsa.forward(q, k, v, config=config, gates=gates)
    assert nsa.select_blocks(q, k, config=config)[0, 9].tolist() == [[2]]
    weights = (q[0, 9] @ k[0, 8:, 0].T / 2).softmax(dim=-1)  # scale 1/sqrt(4)
    torch.testing.assert_close(out[0, 9], weights @ v[0, 8:, 0])


def test_the_window_holds_window_size_keys():
    config = nsa.NSAConfig(window_size=3)
    v = torch.arange(10, dtype=F64).reshape(1, 10, 1, 1)
    q = torch.zeros_like(v)
    gates = torch.tensor([0.0, 0, 1], dtype=F64).expand(1, 10, 1, 3)
    out = nsa.forward(q, q, v, config=config, gates=gates).flatten()
    torch.testing.assert_close(out, torch.tensor([0, 0.5, *range(1, 9)], dtype=F64))
    both_sides = nsa.NSAConfig(window_size=3, causal=False)
    out = nsa.forward(q, q, v, config=both_sides, gates=gates).flatten()
    torch.testing.assert_close(out[2:8], v.flatten()[2:8])
    assert out[0] == 1.0


def test_gates_win_over_the_projection_and_default_to_a_third():
    config = SMALL["tile"]
    q, k, v = make_inputs((1, 30), 2, 1, 4, dtype=F64)
    weight = torch.randn(2, 3, 4, dtype=F64)
    thirds = torch.full((1, 30, 2, 3), 1 / 3, dtype=F64)
    plain = nsa.forward(q, k, v, config=config)
    both = nsa.forward(q, k, v, config=config, gates=thirds, gate_proj_weight=weight)
    torch.testing.assert_close(both, plain)
    gates = torch.einsum("bnhd,hid->bnhi", q, weight).sigmoid()
    projected = nsa.forward(q, k, v, config=config, gate_proj_weight=weight)
    torch.testing.assert_close(projected, nsa.forward(q, k, v, config=config, gates=gates))


def test_default_config_is_tile_mode_and_paper_runs():
    q, k, v = make_inputs((1, 140), 2, 1, 8, dtype=F64)
    for config in (None, nsa.NSAConfig.paper()):
        expected = nsa_oracle(q, k, v, config or nsa.NSAConfig())
        out = nsa.forward(q, k, v, config=config)
        torch.testing.assert_close(out, expected.out, atol=1e-10, rtol=1e-10)
