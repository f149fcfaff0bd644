"""Queries that see a few compressed keys: which they are, and the error of their gradients."""

import pytest
import torch

import nsa
from nsa.boundaries import boundaries_of
from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import MOST_FEW_KEYS
from nsa.fused.planning import make_plan
from nsa.testing import make_cu_seqlens, make_inputs

LENGTHS = [5, 0, 40, 1, 100, 33, 64]
KEY_LENGTHS = [5, 7, 60, 90, 130, 33, 100]
SHAPES = {
    "batch": dict(batch=2, queries=150, keys=150),
    "short batch": dict(batch=3, queries=50, keys=50),
    "last queries": dict(batch=2, queries=100, keys=140),
    "packed": dict(lengths=LENGTHS, key_lengths=LENGTHS),
    "packed last queries": dict(lengths=LENGTHS, key_lengths=KEY_LENGTHS),
}


def plan_of(config, *, batch=1, queries=0, keys=0, lengths=None, key_lengths=None):
    if lengths is None:
        return make_plan(torch.empty(batch, queries, 2, 8), config, num_keys=keys)
    keys = None if lengths is key_lengths else make_cu_seqlens(key_lengths)
    bounds = boundaries_of(make_cu_seqlens(lengths), max(key_lengths), keys)
    q = torch.empty(1, sum(lengths), 2, 8)
    return make_plan(q, config, bounds, num_keys=sum(key_lengths))


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("visibility", ["complete", "started"])
@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_found(shape, visibility):
    config = nsa.NSAConfig.paper(compressed_visibility=visibility, scale=1.0)
    plan = plan_of(config, **SHAPES[shape])
    few, geometry = plan.few_keys, plan.geometry
    first, end = geometry.compressed_interval()
    covered = config.compress_block_size if visibility == "complete" else 1
    # Of blocks, whether or not the sequence has so many.
    seen = (geometry.queries.position + 1 - covered).div(16, rounding_mode="floor") + 1
    wanted = (end - first > 1) & (seen <= MOST_FEW_KEYS) & geometry.queries.rows.real
    expected = []
    for entry in range(plan.batch):
        for query in wanted.nonzero().flatten().tolist():
            row, key = query + entry * len(first), first[query] + entry * geometry.compressed.total
            expected.append((row, int(key), int(end[query] - first[query])))
    assert expected
    found = [x for x in zip(*(x.tolist() for x in few), strict=True) if x[0] >= 0]
    assert sorted(found) == sorted(expected)
    assert all(x.dtype == torch.int32 for x in few)
    assert (few.keys >= 1).all()


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("lengths", [[128, 0], [0, 64, 0, 0]])
def test_keys_of_rows_that_are_none_can_be_read(lengths):
    """The last sequences have no block, and start behind the last row of k."""
    plan = plan_of(nsa.NSAConfig(scale=1.0), lengths=lengths, key_lengths=lengths)
    few, rows = plan.few_keys, plan.geometry.compressed.total
    assert plan.compressed_bounds[len(lengths) - 1] == rows
    assert (few.query[-3 * 64 :] < 0).all()
    assert (few.first + few.keys <= rows).all()


def test_without_a_causal_mask_there_are_none():
    config = nsa.NSAConfig.paper(causal=False, scale=1.0)
    assert plan_of(config, **SHAPES["batch"]).few_keys is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("preset", ["token", "tile"])
def test_their_gradients_err_no_more_than_the_references(preset, packed, fused_on_cpu, monkeypatch):
    """No query sees more than two keys here. Delta from the 16-bit output errs more."""
    config = nsa.NSAConfig.paper() if preset == "token" else nsa.NSAConfig(q_tile_size=64)
    length = 63 if preset == "token" else 160
    kind = dict(num_heads=64, num_kv_heads=16, head_dim=64)
    tensors = make_inputs((1, length), **kind, dtype=torch.bfloat16)
    blocks = (length - config.compress_block_size) // config.compress_stride + 1
    _, *compressed = make_inputs((1, blocks), 1, 16, 64, dtype=torch.bfloat16, seed=1)
    dout = torch.randn(1, length, 64, 64).bfloat16()
    bounds = {"cu_seqlens": make_cu_seqlens([length])} if packed else {}

    def gradient(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in compressed]
        q, k, v = (x.to(dtype)[0] if packed else x.to(dtype) for x in tensors)
        pair = tuple(x[0] if packed else x for x in leaves)
        out = nsa.forward(q, k, v, compressed_kv=pair, config=config, backend=backend, **bounds)
        return torch.autograd.grad(out, leaves[0], dout.to(dtype).view(out.shape))[0].double()

    def error(x):
        return (x - exact).square().mean().sqrt().item()

    exact = gradient("reference", torch.float64)
    own, ours = (error(gradient(x, torch.bfloat16)) for x in ("reference", "fused"))
    monkeypatch.setattr(kernel_calls, "few_key_deltas", lambda *_, **__: None)
    from_output = error(gradient("fused", torch.bfloat16))
    assert ours < own
    assert from_output > 1.3 * ours
