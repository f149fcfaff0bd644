"""On the GPU: FA4's backward with CTAs that pass through several heads, beside FA4's own."""

import pytest
import torch

from nsa.fused import fa4, fa4_call
from nsa.fused.kernel_inputs import RowStatistics
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

CAUSAL = dict(causal=True, window_size=(None, None))
WINDOW = dict(causal=True, window_size=(100, None))
ALL = dict(causal=False, window_size=(None, None))
CASES = {
    # group, KV heads, head_dim, mask, lengths, packed
    "window": (4, 2, 128, WINDOW, (1000, 1000), False),
    "window of few heads together": (6, 1, 128, WINDOW, (700,), False),
    "window of all queries": (16, 1, 128, dict(causal=False, window_size=(60, 70)), (640,), False),
    "window, 64 channels": (8, 1, 64, WINDOW, (500,), False),
    "window, 96 channels": (4, 2, 96, WINDOW, (500,), False),
    "window, 256 channels": (4, 1, 256, WINDOW, (500,), False),
    "packed window": (4, 2, 128, WINDOW, (300, 1, 64, 500), True),
    "packed, 300 sequences": (4, 1, 128, WINDOW, (5, 70, 2) * 100, True),
    "packed, one key more": (
        *(16, 2, 128, dict(causal=False, window_size=(None, 1)), (300, 1, 500), True),
    ),
    "causal": (64, 1, 128, CAUSAL, (700,), False),
    "packed, causal": (16, 2, 96, CAUSAL, (300, 1, 500), True),
    "all keys": (4, 2, 128, ALL, (300, 300), False),
    "packed, block ends": (*(16, 1, 64, ALL | dict(block_ends=(16, 31)), (300, 1, 20, 500), True),),
    "block ends": (8, 2, 64, ALL | dict(block_ends=(4, 3)), (400, 400), False),
}


def gradients(case, monkeypatch, together, **options):
    group, kv_heads, head_dim, mask, lengths, packed = case
    monkeypatch.setattr(fa4_call, "FEWEST_CTAS", 1)
    monkeypatch.setattr(fa4_call, "MOST_HEADS_PER_CTA", together)
    torch.manual_seed(3)
    tokens = (sum(lengths),) if packed else (len(lengths), lengths[0])
    kind = dict(device="cuda", dtype=torch.bfloat16)
    # Slices of wider tensors.
    q, dout = (
        torch.randn(*tokens, 2 + group * kv_heads, head_dim, **kind)[..., 1:-1, :] for _ in "qd"
    )
    k, v = (torch.randn(*tokens, kv_heads, head_dim, **kind) for _ in "kv")
    call = dict(mask, scale=head_dim**-0.5)
    if packed:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        call |= dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    out, lse = fa4.dense_forward(q, k, v, **call)
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    lse = torch.where(lse.isinf(), torch.inf, lse / torch.log(torch.tensor(2.0)))
    return fa4.dense_backward(dout, q, k, v, RowStatistics(lse, delta), **call, **options)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_fa4(name, monkeypatch):
    expected = gradients(CASES[name], monkeypatch, 1)
    actual = gradients(CASES[name], monkeypatch, 8)
    for which, x, y in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert x.isfinite().all(), which
        error = (x.double() - y.double()).norm() / y.double().norm()
        # The same products, added in another order and rounded to bfloat16.
        assert error < 1e-3, (which, float(error))


@pytest.mark.parametrize("name", [x for x in CASES if x.startswith("window")])
def test_a_fixed_order_gives_the_same_bits(name, monkeypatch):
    expected = gradients(CASES[name], monkeypatch, 1)
    first = gradients(CASES[name], monkeypatch, 8, deterministic=True)
    for which, x, y in zip(("dq", "dk", "dv"), first, expected, strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error < 1e-3, (which, float(error))
    for _ in range(20):
        again = gradients(CASES[name], monkeypatch, 8, deterministic=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
