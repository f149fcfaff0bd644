"""On the GPU: FA4's backward of a window that attends near blocks for another branch too."""

import pytest
import torch

from nsa.fused import fa4, fa4_call
from nsa.fused.kernel_inputs import RowStatistics
from tests.helpers import emulated_fa4
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

CASES = {
    # group, KV heads, head_dim, batch, queries, keys, causal
    "16 heads": (16, 1, 128, 1, 700, 700, True),
    "two entries": (4, 2, 128, 2, 300, 300, True),
    "last queries": (8, 1, 128, 1, 330, 650, True),
    "non-causal": (4, 1, 128, 1, 400, 400, False),
    "64 channels": (8, 1, 64, 1, 500, 500, True),
    "64 channels, last queries": (2, 2, 64, 1, 200, 456, True),
    "96 channels": (3, 2, 96, 1, 400, 400, True),
    "one head": (1, 2, 128, 1, 300, 300, True),
}


def make_case(case):
    """Tensors, statistics of which each kind of key has its own, and options of a call."""
    group, kv_heads, head_dim, batch, queries, keys, causal = case
    torch.manual_seed(5)
    kind = dict(device="cuda", dtype=torch.bfloat16)
    shape = (batch, queries, group * kv_heads, head_dim)
    q, dout = (torch.randn(shape, **kind) for _ in "qd")
    k, v = (torch.randn(batch, keys, kv_heads, head_dim, **kind) for _ in "kv")
    rows = -(-queries // 128) * 128
    lse = 6 + 4 * torch.rand(batch, shape[2], 3, rows, device="cuda")
    delta = 3 * torch.randn_like(lse)
    lse[..., queries:], delta[..., queries:] = torch.inf, 0
    options = dict(scale=head_dim**-0.5, causal=causal, near_block=64)
    options["window_size"] = (149, None if causal else 149)
    return (dout, q, k, v), RowStatistics(lse, delta), options


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_emulation(name, together, deterministic, monkeypatch):
    monkeypatch.setattr(fa4_call, "FEWEST_CTAS", 1)
    monkeypatch.setattr(fa4_call, "MOST_HEADS_PER_CTA", together)
    tensors, statistics, options = make_case(CASES[name])
    wide = [x.double() for x in tensors]
    expected = emulated_fa4.dense_backward(
        *wide, RowStatistics(*(x.double() for x in statistics)), **options
    )
    actual = fa4.dense_backward(*tensors, statistics, deterministic=deterministic, **options)
    for which, x, y in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        error = (x.double() - y).norm() / y.norm()
        # P and dS are rounded to bfloat16.
        assert error < 6e-3, (which, float(error))
    if deterministic:
        again = fa4.dense_backward(*tensors, statistics, deterministic=True, **options)
        assert all(torch.equal(x, y) for x, y in zip(again, actual, strict=True))
