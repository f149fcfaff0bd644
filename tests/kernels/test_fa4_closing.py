"""On the GPU: FA4's forward that ends with the sum of the branches, against float64 emulation."""

import pytest
import torch

from nsa.fused import fa4
from nsa.testing import assert_as_accurate
from tests.helpers import emulated_fa4, emulated_kernels
from tests.helpers.gating_cases import make_problem
from tests.helpers.gpu_cases import gpu_test, slice_of_heads
from tests.helpers.poison import poisoned_memory
from tests.helpers.requirements import import_fused

fa4_closing = import_fused("nsa.fused.kernels.fa4_closing")
pytestmark = gpu_test

WINDOW = dict(causal=True, window_size=(99, None))
CASES = {
    # group, KV heads, head_dim, dtype, mask, (queries, keys), form, keep
    "weight": (4, 2, 128, torch.bfloat16, WINDOW, (1000, 1000), "weight", False),
    "kept": (4, 2, 128, torch.bfloat16, WINDOW, (1000, 1000), "weight", True),
    "given": (4, 1, 128, torch.float16, WINDOW, (300, 300), "gates", True),
    "mean": (16, 1, 128, torch.bfloat16, WINDOW, (130, 130), "mean", False),
    "every head": (1, 3, 128, torch.bfloat16, WINDOW, (300, 300), "weight", True),
    "64 channels": (8, 1, 64, torch.float16, WINDOW, (200, 200), "weight", True),
    "64 channels, every head": (1, 2, 64, torch.bfloat16, WINDOW, (500, 500), "weight", False),
    # Of which a tile has 64 tokens, or 3.
    "three heads, 64 channels": (3, 2, 64, torch.float16, WINDOW, (200, 200), "gates", True),
    "64 heads": (64, 1, 128, torch.bfloat16, WINDOW, (50, 50), "weight", False),
    "last queries": (4, 2, 128, torch.bfloat16, WINDOW, (70, 900), "weight", False),
    "one token": (4, 2, 128, torch.bfloat16, WINDOW, (1, 1), "weight", False),
    "more queries than keys": (4, 2, 128, torch.bfloat16, WINDOW, (300, 40), "weight", True),
    "all queries": (
        *(4, 2, 128, torch.bfloat16, dict(causal=False, window_size=(60, 70))),
        *((500, 500), "weight", False),
    ),
    # What takes two kernels.
    "256 channels": (4, 1, 256, torch.bfloat16, WINDOW, (200, 200), "weight", True),
    "five heads": (5, 1, 128, torch.bfloat16, WINDOW, (200, 200), "weight", False),
}


@pytest.mark.parametrize("processors", [2, 1000])
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_the_emulation(name, processors, monkeypatch):
    # With few processors, a CTA has several tiles, of several heads and sequences.
    monkeypatch.setattr(fa4_closing, "sm_count", lambda _: processors)
    group, kv_heads, dim, dtype, mask, (queries, keys), form, keep = CASES[name]
    torch.manual_seed(11)
    shape = (2, queries, group * kv_heads, dim)
    (o_cmp, o_slc, _), q, gates, weight, _ = make_problem(form, shape, dtype, "cuda")
    weight = None if weight is None else weight / dim**0.5
    k, v = (torch.randn(2, keys, kv_heads, dim, dtype=dtype, device="cuda") for _ in "kv")
    call = dict(mask, scale=dim**-0.5, keep=keep)
    tensors = (q, k, v, (o_cmp, o_slc), gates, weight)
    exact, same_dtype = (
        emulated(tensors, cast, call) for cast in (torch.Tensor.double, torch.Tensor.clone)
    )
    # Slices of wider tensors, with rows of NaN between them.
    q, o_cmp, out = (slice_of_heads(x) for x in (q, o_cmp, q))
    tensors = (q, k, v, (o_cmp, o_slc), gates, weight)
    with poisoned_memory():
        results = fa4.closing_forward(*tensors, **call, out=out)
    assert results[0] is out
    assert out._base[:, :, [0, -1]].isnan().all()
    assert (results[1] is not None) == keep
    for which, *found in zip(("out", "o_win", "lse"), results, same_dtype, exact, strict=True):
        if found[0] is not None:
            finite = [x.nan_to_num(neginf=-1e4) for x in found]
            assert_as_accurate(which, *finite)


@pytest.mark.parametrize("keep", [False, True])
def test_bits_are_the_same_for_any_number_of_tiles_of_a_cta(keep, monkeypatch):
    """Of some hundred tiles, again and again: a tile that overtakes another would show in some."""
    torch.manual_seed(12)
    (o_cmp, o_slc, _), q, _, weight, _ = make_problem(
        "weight", (2, 8000, 8, 128), torch.bfloat16, "cuda"
    )
    k, v = (torch.randn_like(q[:, :, :2]) for _ in "kv")
    call = dict(WINDOW, scale=128**-0.5, keep=keep)
    expected = None
    for processors in (10**6, 1, 7, 132):
        monkeypatch.setattr(fa4_closing, "sm_count", lambda _, count=processors: count)
        for _ in range(4):
            with poisoned_memory():
                results = fa4.closing_forward(q, k, v, (o_cmp, o_slc), None, weight / 11, **call)
            results = [x for x in results if x is not None]
            expected = expected or results
            assert all(map(torch.equal, results, expected))
    assert all(x.isfinite().all() for x in expected)


def emulated(tensors, cast, call):
    q, k, v, others, *gates = tensors
    others = tuple(map(cast, others))
    inputs = (*map(cast, (q, k, v)), others, *(None if x is None else cast(x) for x in gates))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            emulated_fa4.kernel_calls, "gating_forward", emulated_kernels.gating_forward
        )
        return emulated_fa4.closing_forward(*inputs, **call)
