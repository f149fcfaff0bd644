"""Compressed keys and values, and their gradients: as autograd has them."""

import pytest
import torch

import nsa
from nsa.blocks import num_compressed_blocks
from nsa.boundaries import boundaries_of
from nsa.fused.compression import compress, compress_pair, compress_pair_backward
from nsa.fused.planning import make_plan
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import slice_of_heads

TILES = nsa.NSAConfig(compress_block_size=16, select_block_size=64, q_tile_size=64)
OVERLAPPING = nsa.NSAConfig(selection="token", compress_block_size=32, compress_stride=16)
HEADS, DIM = 3, 8


def compress_plainly(x, weight, lengths, config, rows):
    """Of sequences ``lengths`` in each entry of ``x (B, T, H, D)``: ``(B, rows, H, D)``."""
    out = x.new_zeros(len(x), rows, *x.shape[2:])
    offset = block = 0
    for length in lengths:
        for j in range(num_compressed_blocks(length, config)):
            start = offset + j * config.compress_stride
            mean = x[:, start : start + config.compress_block_size].mean(dim=1)
            if weight is not None:
                mean = torch.einsum("bhd,hde->bhe", mean, weight)
            out[:, block] = mean
            block += 1
        offset += length
    return out


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("weighted", ["", "k", "v", "kv"])
@pytest.mark.parametrize("lengths", [[1], [65], [100, 0, 1, 63]], ids=str)
@pytest.mark.parametrize("config", [TILES, OVERLAPPING], ids=["tiles", "overlapping"])
def test_equals_autograd(config, lengths, weighted, shared):
    """Also where there are no blocks, and tokens without a block."""
    total, packed, double = sum(lengths), len(lengths) > 1, dict(dtype=torch.float64)
    shape = (1 if packed else 2, total, HEADS, DIM)
    k, v = (torch.randn(shape, **double).requires_grad_() for _ in range(2))
    weights = tuple(
        torch.randn(HEADS, DIM, DIM, **double).requires_grad_() if name in weighted else None
        for name in "kv"
    )
    bounds = boundaries_of(make_cu_seqlens(lengths), max(lengths)) if packed else None
    plan = make_plan(k, config, bounds)
    rows = plan.geometry.compressed.total
    expected = [
        compress_plainly(x, weight, lengths, config, rows)
        for x, weight in zip((k, v), weights, strict=True)
    ]
    with torch.no_grad():
        actual = compress_pair(slice_of_heads(k), v, weights, plan)
        alone = [compress(x, w, plan) for x, w in zip((k, v), weights, strict=True)]
    torch.testing.assert_close(list(actual), expected)
    torch.testing.assert_close(alone, expected)

    douts = [torch.randn_like(x) for x in expected]
    used = [x for x in weights if x is not None]
    inputs = [k, v, *used]
    # Without blocks nothing depends on them.
    loss = sum((x * dout).sum() for x, dout in zip(expected, douts, strict=True))
    grads = torch.autograd.grad(loss + 0 * sum(x.sum() for x in inputs), inputs)
    addends, dkv = None, list(grads[:2])
    if shared:
        window, selected = torch.randn(2, 2, *shape, **double)
        dkv = [sum(x) for x in zip(dkv, window, selected, strict=True)]
        addends = tuple(map(slice_of_heads, window)), tuple(selected)
    with torch.no_grad():
        dxs, dweights = compress_pair_backward(*douts, k, v, weights, plan, addends)
    if shared:
        assert [x.data_ptr() for x in dxs] == [x.data_ptr() for x in addends[0]]
    assert [x is None for x in dweights] == [x is None for x in weights]
    torch.testing.assert_close([*dxs, *(x for x in dweights if x is not None)], [*dkv, *grads[2:]])
