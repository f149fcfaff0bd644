"""On the GPU: FA4's forward where a query sees the blocks of keys that end before it."""

import math

import pytest
import torch

from nsa.fused import fa4
from nsa.testing import assert_as_accurate
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

CASES = {
    # batch, queries, keys, group, KV heads, head dimension, stride, first
    "a whole sequence": (1, 3000, 186, 16, 2, 128, 16, 31),
    "one group": (2, 3000, 187, 1, 3, 128, 16, 15),
    "many keys": (1, 9000, 562, 4, 2, 128, 16, 31),
    "started blocks": (1, 1000, 63, 4, 2, 128, 16, 0),
    "later queries": (1, 500, 140, 4, 2, 128, 16, 63 - 1800),
    "later queries of two entries": (2, 333, 700, 4, 1, 128, 64, 63 - 44500),
    "one query": (1, 1, 500, 4, 2, 128, 16, 31 - 8000),
    "queries after the last key": (1, 300, 20, 4, 2, 128, 64, 63 - 1300),
    "keys that no query sees": (1, 300, 200, 2, 1, 128, 4, 3),
    "no key seen": (1, 300, 200, 2, 1, 128, 64, 1000),
    "64 channels": (1, 5000, 78, 2, 3, 64, 64, 63),
    "96 channels": (1, 2000, 125, 3, 1, 96, 16, 15),
    "256 channels": (1, 2000, 125, 3, 1, 256, 16, 15),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_as_masks_in_float64(name, dtype):
    batch, queries, keys, group, kv_heads, head_dim, step, first = CASES[name]
    torch.manual_seed(5)
    kind, heads = dict(device="cuda", dtype=dtype), group * kv_heads
    # Slices of wider tensors.
    q = torch.randn(batch, queries, heads + 2, head_dim, **kind)[..., 1:-1, :]
    k, v = (torch.randn(batch, keys + 3, kv_heads, head_dim, **kind)[:, :keys] for _ in "kv")
    wide = torch.full((batch, queries, heads + 1, head_dim), torch.nan, **kind)
    out = wide[:, :, 1:]
    lse = torch.full((heads, batch, queries), torch.nan, device="cuda").transpose(0, 1)
    call = dict(scale=head_dim**-0.5, block_ends=(step, first))
    found = fa4.forward_of_blocks(q, k, v, out=out, lse=lse, **call)
    assert found[0] is out
    assert found[1] is lse
    assert wide[:, :, 0].isnan().all()
    exact, exact_lse = attend(*(x.double() for x in (q, k, v)), **call)
    rounded, rounded_lse = attend(q, k, v, **call)
    assert_as_accurate("out", out, rounded, exact)
    hidden = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, hidden)
    assert (out.transpose(1, 2)[hidden] == 0).all()
    assert_as_accurate("lse", lse[~hidden], rounded_lse[~hidden].float(), exact_lse[~hidden])


def attend(q, k, v, scale, block_ends):
    """Output and log-sum-exp, with probabilities in the dtype of the values."""
    (step, first), group = block_ends, q.shape[2] // k.shape[2]
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    query, key = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    mask = key * step + first <= query[:, None]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    largest = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    p = (scores - largest).exp()
    total = p.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bhqd", p.to(q.dtype).to(wide), v.to(wide))
    out = out / total.masked_fill(total == 0, 1)
    return out.transpose(1, 2).to(q.dtype), (total.log() + largest)[..., 0]
