"""On the GPU: the scores of selection blocks against their emulation, chunk by chunk."""

import pytest
import torch

import nsa
from nsa.boundaries import boundaries_of
from nsa.fused import kernel_calls
from nsa.fused.planning import make_plan
from nsa.fused.token_inputs import Rule, choose_shape
from nsa.testing import make_cu_seqlens
from tests.helpers import emulated_token_kernels
from tests.helpers.gpu_cases import gpu_test

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

PACKED, BATCHED = [300, 0, 1, 31, 700, 65], [777]
FORMS = [
    # head_dim, group, dtype, changes of the paper's configuration
    (64, 3, torch.bfloat16, {}),
    (96, 4, torch.float16, dict(select_block_size=32)),
    (128, 1, torch.float16, dict(compress_block_size=16, compress_stride=8)),
    (128, 16, torch.bfloat16, {}),
    (128, 16, torch.bfloat16, dict(causal=False)),
    (256, 32, torch.bfloat16, dict(compressed_visibility="started")),
]


def make_case(form, lengths: list[int]):
    """(q, compressed keys, log-sum-exp, plan): an entry of packed sequences, or two of one each."""
    head_dim, group, dtype, changes = form
    config = nsa.NSAConfig.paper(**changes)
    packed, kv_heads = len(lengths) > 1, 2
    batch, total = 1 if packed else 2, sum(lengths)
    q = torch.randn(batch, total, kv_heads * group, head_dim, device="cuda").to(dtype)
    cu_seqlens = make_cu_seqlens(lengths, "cuda") if packed else None
    plan = make_plan(q, config, boundaries_of(cu_seqlens, max(lengths)))
    compressed = plan.geometry.compressed.total
    k_cmp = torch.randn(batch, compressed, kv_heads, head_dim, device="cuda").to(dtype)
    # About what the sums are of some hundred keys.
    lse = torch.randn(batch, kv_heads * group, total, device="cuda") + 5
    return q, k_cmp, lse, plan


def score_chunk(kernels, q, k_cmp, lse, tiles, index: int, plan, rule) -> torch.Tensor:
    batch, total, _, head_dim = q.shape
    tokens = min(tiles.chunk, total - index * tiles.chunk)
    shape = (batch, k_cmp.shape[2], tokens, plan.max_selection_blocks)
    scores = torch.full(shape, torch.nan, dtype=lse.dtype, device=q.device)
    scale = plan.config.softmax_scale(head_dim)
    kernels.importance_scores(q, k_cmp, lse, tiles, index, scores, scale, rule)
    return scores


@pytest.mark.parametrize("lengths", [PACKED, BATCHED], ids=["packed", "batched"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scores(form, lengths):
    q, k_cmp, lse, plan = make_case(form, lengths)
    head_dim, group, _, _ = form
    tile = choose_shape(head_dim, group).tile_tokens
    tiles, rule = plan.token_tiles(tile, tile), Rule.of(plan.config)
    chunks = -(-sum(lengths) // tiles.chunk)
    assert chunks > 1
    wide = [x.cpu().double() for x in (q, k_cmp, lse)]
    emulated_tiles = tiles._replace(fields=tiles.fields.cpu(), first=tiles.first.cpu())
    for index in range(chunks):
        exact = score_chunk(emulated_token_kernels, *wide, emulated_tiles, index, plan, rule)
        actual = score_chunk(kernel_calls, q, k_cmp, lse, tiles, index, plan, rule).cpu()
        written = ~exact.isnan()
        assert written.any()
        # Products of 16-bit numbers are exact: only sums and exponentials are rounded, to float32.
        torch.testing.assert_close(
            actual[written].double(), exact[written], rtol=1e-4, atol=1e-5 * group
        )
