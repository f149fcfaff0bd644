"""On the GPU: the backward by query tile against float64, for each form that is compiled."""

import itertools

import pytest
import torch

from nsa.fused import fixed_order, kernel_calls
from nsa.fused.kernel_inputs import BlockLists, RowStatistics
from tests.helpers import emulated_fa4
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

FORMS = [
    # head_dim, group, kv_heads, query_block, limited, dtype
    (128, 4, 2, 256, False, torch.bfloat16),
    (128, 1, 3, 128, False, torch.float16),
    (128, 6, 1, 64, False, torch.bfloat16),
    (128, 3, 2, 256, True, torch.float16),
    (96, 3, 2, 256, False, torch.bfloat16),
    (96, 1, 2, 192, True, torch.bfloat16),
    (96, 4, 1, 128, False, torch.float16),
    (64, 16, 1, 256, False, torch.float16),
    (64, 1, 2, 512, True, torch.bfloat16),
    (64, 4, 2, 128, True, torch.bfloat16),
]


def random_lists(heads, tiles, num_keys, query_block, limit) -> BlockLists:
    """Some blocks of each tile, those of which it sees every key in the full list if there is a
    limit; some lists are empty."""
    blocks = num_keys // 64
    chosen = torch.rand(heads, tiles, blocks) < 0.5
    chosen[0, 0] = False
    if limit is None:
        # Blocks that start at or before the tile's last query.
        end = (torch.arange(tiles)[:, None] + 1) * query_block + num_keys - tiles * query_block
        chosen &= torch.arange(blocks) * 64 < end
        full = torch.zeros_like(chosen)
    else:
        least = limit.view(tiles, query_block).amin(-1)
        full = chosen & ((torch.arange(blocks) + 1) * 64 <= least[:, None])

    def compact(x):
        count = x.sum(-1)
        width = max(1, int(count.max()))
        order = torch.where(x, torch.arange(blocks), blocks).sort(-1).values[..., :width]
        # What is past the count is not read.
        index = order.masked_fill(torch.arange(width) >= count[..., None], -(10**6))
        return count[None].int().cuda(), index[None].int().contiguous().cuda()

    lists = (*compact(chosen & ~full), *(compact(full) if limit is not None else (None, None)))
    return BlockLists(*lists, query_block, 64)


@pytest.mark.parametrize("sums", [None, "of KV heads", "of query heads"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients(form, sums, monkeypatch):
    """In any order, or in a fixed one with sums of few or of all blocks for each query head."""
    deterministic = sums is not None
    monkeypatch.setattr(fixed_order, "OWN_SUMS_BYTES", 1 << 60 if sums == "of query heads" else -1)
    head_dim, group, kv_heads, query_block, limited, dtype = form
    heads, scale = group * kv_heads, head_dim**-0.5
    for tiles, extra_keys in itertools.product((1, 3), (0, 128)):
        num_rows = tiles * query_block
        num_keys = num_rows + extra_keys
        limit = None
        if limited:
            limit = torch.randint(0, num_keys + 1, (num_rows,), dtype=torch.int32)
            limit[-query_block:] = num_keys
        lists = random_lists(heads, tiles, num_keys, query_block, limit)
        limit = None if limit is None else limit.cuda()
        q, dout = (
            torch.randn(1, num_rows, heads, head_dim, device="cuda", dtype=dtype) for _ in range(2)
        )
        k, v = (
            torch.randn(1, num_keys, kv_heads, head_dim, device="cuda", dtype=dtype)
            for _ in range(2)
        )
        arguments = dict(scale=scale, causal=not limited, key_limit=limit)
        wide = [x.double() for x in (q, k, v)]
        exact_out, exact_lse = emulated_fa4.sparse_forward(*wide, lists, **arguments)
        statistics = emulated_fa4.row_statistics(dout.double(), exact_out, exact_lse)
        # Gates, of which some are 0.
        gate = torch.rand_like(exact_lse).mul(1.1).sub(0.1).clamp(min=0)
        statistics = statistics._replace(lse_log2=statistics.lse_log2 - gate.log2())
        exact = emulated_fa4.listed_gradients(dout.double(), *wide, statistics, lists, **arguments)
        rounded = RowStatistics(*(x.float() for x in statistics))
        options = (lists, scale, limit, deterministic)
        actual = kernel_calls.listed_backward(dout, q, k, v, rounded, *options)
        for name, x, y in zip(("dq", "dk", "dv"), actual, exact, strict=True):
            assert x.isfinite().all(), name
            error = (x.double() - y).norm() / y.norm()
            # P and dS are rounded to 16 bits once each.
            assert error < (5e-3 if dtype == torch.bfloat16 else 1e-3), (name, tiles, float(error))


def test_other_sizes_are_refused():
    x = torch.randn(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16)
    count, index = (torch.zeros(s, dtype=torch.int32, device="cuda") for s in ((1, 1, 1), (1,) * 4))
    statistics = RowStatistics(*torch.zeros(2, 1, 1, 64, device="cuda"))
    for changes, message in (
        (dict(key_block=128), "they must be of 64"),
        (dict(query_block=128), "multiple of 128"),
    ):
        lists = BlockLists(count, index, None, None, 64, 64)._replace(**changes)
        with pytest.raises(ValueError, match=message):
            kernel_calls.listed_backward(x, x, x, x, statistics, lists, 1.0, None)
    wide = torch.randn(1, 64, 1, 256, device="cuda", dtype=torch.bfloat16)
    lists = BlockLists(count, index, None, None, 64, 64)
    with pytest.raises(ValueError, match="same 64, 96 or 128 channels"):
        kernel_calls.listed_backward(wide, wide, wide, wide, statistics, lists, 1.0, None)
