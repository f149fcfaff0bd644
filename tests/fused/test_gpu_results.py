"""On the GPU: calls that add to sums of the caller are as accurate as one call."""

import pytest
import torch

import nsa
from nsa.testing import assert_as_accurate, make_inputs
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.pieces_of_results import Leaves, attend_in_two

pytestmark = gpu_test

LENGTH, FIRST = 2048, 768


@pytest.mark.parametrize("config", [nsa.NSAConfig.paper(), nsa.NSAConfig()], ids=["token", "tile"])
@pytest.mark.parametrize("heads", [(4, 1), (8, 2)], ids=["one KV head", "two"])
def test_two_calls_are_as_accurate_as_one(config, heads):
    exact = make_inputs((1, LENGTH), *heads, 128, dtype=torch.float64)
    dout = torch.randn(1, LENGTH, heads[0], 128, dtype=torch.float64)
    size, stride = config.compress_block_size, config.compress_stride
    compressed = [x.unfold(1, size, stride).mean(-1) for x in exact[1:]]
    # All start from the same numbers of bfloat16, and select the same blocks.
    given = [x.cuda().bfloat16() for x in (*exact, *compressed)]
    q, k, _, *compressed = given
    blocks = nsa.select_blocks(q, k, config=config, compressed_kv=tuple(compressed))
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out = nsa.forward(
            *leaves[:3], config=config, compressed_kv=tuple(leaves[3:]), block_indices=blocks,
            backend="reference",
        )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, dout.cuda().bfloat16().to(dtype))
        results.append([x[0].detach() for x in (out, *grads)])
    leaves = Leaves(*(x.clone().requires_grad_() for x in given))
    found, added = attend_in_two(leaves, dout.cuda().bfloat16(), FIRST, config, blocks)
    assert all(added)
    names = ("out", "dq", "dk", "dv", "dk_cmp", "dv_cmp")
    for name, x, wanted, same_dtype in zip(names, found, *results, strict=True):
        assert_as_accurate(name, x, same_dtype, wanted)
