"""On the GPU: float32 sums of keys and values rounded in one launch, against FA4's for each."""

import pytest
import torch

from nsa.fused.fa4_variants import Mask, Variant, backward_tile
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.requirements import import_fused

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

LENGTHS = (300, 0, 1, 128, 77)
SCALE = 0.3


@pytest.mark.parametrize("form", ["batched", "packed", "packed with a table"])
@pytest.mark.parametrize(
    ("dim", "blocks", "dtype"),
    [
        (64, None, torch.float16),
        (96, None, torch.bfloat16),
        (128, None, torch.bfloat16),
        (256, None, torch.float16),
        (256, (256, 64), torch.bfloat16),
    ],
)
def test_results_are_those_of_fa4(dim, blocks, dtype, form):
    fa4_sm90 = import_fused("nsa.fused.kernels.fa4_sm90")
    fa4_call = import_fused("nsa.fused.fa4_call")
    packed, many, heads = form != "batched", form.endswith("table"), 3
    variant = Variant(dtype, dim, dim, 4, Mask(causal=True), packed, many, blocks)
    tile, plain = backward_tile(variant), variant.plain()
    layout = (tile.key_atoms, tile.swap_keys, tile.channels)
    bounds = starts = None
    leading, length = (2,), 333
    if packed:
        bounds = make_cu_seqlens(LENGTHS).cuda()
        leading, length = (), sum(LENGTHS)
    if many:
        starts = fa4_sm90._tile_starts(fa4_sm90.compile_tile_starts(tile.keys, 1), bounds)
    shape = (2, *leading, length, heads, dim)
    grads, others = (torch.full(shape, torch.nan, dtype=dtype, device="cuda") for _ in range(2))
    of_head, rows = fa4_call.rounded_rows(grads[0], bounds, tile.keys)
    sums = torch.randn(2, *of_head, rows * dim, device="cuda")

    both = fa4_sm90.compile_key_conversion(plain, tile.keys, *layout)
    both(*fa4_sm90._key_conversion_arguments(*sums, *grads, SCALE, bounds, starts))
    alone = fa4_sm90.compile_conversion(plain, tile.keys, 256, *layout)
    for total, grad, scale in zip(sums, others, (SCALE, 1.0), strict=True):
        alone(*fa4_sm90._conversion_arguments(total, grad, scale, bounds, starts))
    assert others.isfinite().all()
    assert torch.equal(grads, others)
