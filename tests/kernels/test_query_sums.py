"""On the GPU: FA4's backwards that add gradients of queries to sums, and what reads these."""

import pytest
import torch

from nsa.fused import fa4, kernel_calls
from nsa.fused.fa4_call import new_query_sums
from nsa.fused.kernel_inputs import RowStatistics
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

WINDOW = dict(causal=True, window_size=(100, None))


def make_call(batch, queries, keys, group, kv_heads, head_dim, dtype, mask):
    """Arguments of a backward: statistics of a forward, and of rows without keys P = 0."""
    torch.manual_seed(3)
    kind = dict(device="cuda", dtype=dtype)
    heads = group * kv_heads
    # Slices of wider tensors.
    q, dout = (torch.randn(batch, queries, heads + 2, head_dim, **kind)[..., 1:-1, :] for _ in "qd")
    k, v = (torch.randn(batch, keys, kv_heads, head_dim, **kind) for _ in "kv")
    call = dict(causal=False, window_size=(None, None)) | mask | dict(scale=head_dim**-0.5)
    out, lse = fa4.dense_forward(q, k, v, **call)
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    lse = torch.where(lse.isinf(), torch.inf, lse / torch.log(torch.tensor(2.0)))
    return (dout, q, k, v, RowStatistics(lse, delta)), call


def error_of(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [
        (4, 64, torch.bfloat16),
        (2, 96, torch.float16),
        (16, 128, torch.bfloat16),
        (1, 128, torch.float16),
        (3, 256, torch.bfloat16),
    ],
)
def test_sums_become_the_gradient_of_queries(group, head_dim, dtype, with_weight):
    tensors, call = make_call(2, 333, 333, group, 2, head_dim, dtype, WINDOW)
    _, q, *_ = tensors
    dq_win, dk, dv = fa4.dense_backward(*tensors, **call)
    sums = new_query_sums(q)
    for _ in range(2):
        added = fa4.add_dense_backward(*tensors, sums, **call)
    for x, y in zip(added, (dk, dv), strict=True):
        assert error_of(x, y) < 1e-3
    heads, dlogits, weight = 2 * group, None, None
    if with_weight:
        dlogits = torch.randn(2, 333, heads, 3, device="cuda")
        weight = torch.randn(heads, 3, head_dim, device="cuda", dtype=dtype)
    dq_slc = torch.randn_like(dq_win)
    expected = kernel_calls.query_gradient(dq_win, dq_slc, dq_win, dlogits, weight)
    out = torch.full((2, 333, heads + 1, head_dim), torch.nan, device="cuda", dtype=dtype)[:, :, 1:]
    scale = call["scale"]
    actual = kernel_calls.gradient_of_sums(sums, dq_slc, dlogits, weight, scale, out)
    assert actual is out
    # Only the expected one is of rounded gradients.
    assert error_of(out, expected) < (4e-3 if dtype is torch.bfloat16 else 5e-4)
    in_place = dq_slc.clone()
    kernel_calls.gradient_of_sums(sums, in_place, dlogits, weight, scale, in_place)
    assert torch.equal(in_place, out)


BLOCKS = {
    # batch, queries, keys, group, KV heads, head dimension, step, first
    "a whole sequence": (1, 3000, 186, 16, 2, 128, 16, 31),
    "segments of queries": (1, 5000, 312, 4, 1, 128, 16, 31),
    "started blocks": (1, 1000, 62, 4, 2, 128, 16, 0),
    "later queries": (1, 500, 140, 4, 2, 128, 16, 63 - 1800),
    "keys that no query sees": (1, 300, 200, 2, 1, 128, 4, 3),
    "64 channels": (1, 5000, 78, 2, 3, 64, 64, 63),
    "96 channels": (1, 2000, 125, 3, 1, 96, 16, 15),
    "256 channels": (1, 4200, 262, 4, 1, 256, 16, 31),
    "many heads": (1, 300, 18, 16, 20, 128, 16, 31),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("case", BLOCKS)
def test_gradients_of_blocks_are_those_of_a_mask(case, deterministic):
    *sizes, step, first = BLOCKS[case]
    mask = dict(block_ends=(step, first))
    tensors, call = make_call(*sizes, torch.bfloat16, mask)
    _, q, *_ = tensors
    expected = fa4.dense_backward(*tensors, **call)
    options = dict(mask, scale=call["scale"], deterministic=deterministic)
    results = []
    for _ in range(5 if deterministic else 1):
        sums = new_query_sums(q)
        dk, dv = fa4.add_dense_backward(*tensors, sums, **options)
        zeros = torch.zeros_like(expected[0])
        dq = kernel_calls.gradient_of_sums(sums, zeros, None, None, call["scale"])
        results.append((dq, dk, dv))
    for which, x, y in zip(("dq", "dk", "dv"), results[0], expected, strict=True):
        assert x.isfinite().all(), which
        # The same products, added in another order and rounded to bfloat16.
        assert error_of(x, y) < 1e-3, which
    for others in results[1:]:
        for x, y in zip(others, results[0], strict=True):
            assert torch.equal(x, y)
