"""On the GPU: tensors of more than 2^31 elements, whose offsets do not fit 32 bits."""

import pytest
import torch

import nsa
from nsa.fused import kernel_calls
from nsa.testing import assert_as_accurate, make_cu_seqlens, make_inputs
from tests.helpers.gpu_cases import gpu_test

pytestmark = [*gpu_test, pytest.mark.large, pytest.mark.filterwarnings("default")]

LENGTH, HEADS, KV_HEADS, DIM = 540_000, 32, 2, 128  # q has 2.2e9 elements
LAST = 300


@pytest.fixture(scope="module", autouse=True)
def _enough_memory():
    # Inputs and results take 18 GiB, the workspace of the backward 44, or less where less is free.
    if torch.cuda.mem_get_info()[1] < 75 * 2**30:
        pytest.skip("needs a GPU with 75 GiB")


def expected_tail(q, k, v, indices, config, dtype):
    """The output of the last queries, each branch written out."""
    q, k, v = q[0, -LAST:].to(dtype), k[0].to(dtype), v[0].to(dtype)
    size, position = config.compress_block_size, torch.arange(LENGTH, device="cuda")
    query = position[-LAST:, None]
    blocks = LENGTH // size
    k_cmp, v_cmp = (x[: blocks * size].unflatten(0, (blocks, size)).mean(1) for x in (k, v))
    if dtype != torch.float64:
        k_cmp, v_cmp = k_cmp.to(torch.bfloat16).to(dtype), v_cmp.to(torch.bfloat16).to(dtype)
    last_token = torch.arange(blocks, device="cuda") * size + size - 1
    tile = (query // config.q_tile_size)[:, 0]
    chosen = indices[0].long()[:, tile]  # (H, LAST, n)
    # One block more, for empty slots.
    none = -(-LENGTH // size)
    selected = torch.zeros(HEADS, LAST, none + 1, dtype=torch.bool, device="cuda")
    selected.scatter_(2, torch.where(chosen >= 0, chosen, none), True)
    selected = selected.repeat_interleave(size, dim=2)[..., :LENGTH] & (position <= query)
    window = (position <= query) & (position > query - config.window_size)
    total = attend(q, k_cmp, v_cmp, (last_token <= query)[None])
    return (total + attend(q, k, v, selected) + attend(q, k, v, window[None])) / 3


def attend(q, k, v, mask):
    outs = []
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        scores = (q[:, head] @ k[:, kv_head].T) * DIM**-0.5
        scores = scores.masked_fill(~mask[head % len(mask)], -torch.inf)
        outs.append(scores.softmax(-1) @ v[:, kv_head])
    return torch.stack(outs, dim=1)


def test_more_than_2_to_the_31_elements():
    """The last tokens lie past the limit; a wrapped offset would read or write elsewhere."""
    config = nsa.NSAConfig(num_local_blocks=1)
    q, k, v = make_inputs(
        (1, LENGTH), HEADS, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda", requires_grad=True
    )
    assert q.numel() > 2**31
    indices = nsa.select_blocks(q, k, config=config, backend="fused")
    out = nsa.forward(q, k, v, config=config, block_indices=indices, backend="fused")
    with torch.no_grad():
        exact = expected_tail(q, k, v, indices, config, torch.float64)
        same_dtype = expected_tail(q, k, v, indices, config, torch.float32).to(q.dtype)
    # Each branch is stored in 16 bits before their mean is: allow for three roundings more.
    assert_as_accurate("out", out[0, -LAST:].detach(), same_dtype, exact, atol=1e-3)

    # Only the last queries matter to the loss, so only they and the keys they see get a gradient.
    dout = torch.zeros_like(q)
    dout[0, -LAST:] = 1
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert not dq[0, : -LAST - 1].any()
    assert dq[0, -LAST:].isfinite().all()
    assert dq[0, -LAST:].any(dim=-1).all()
    # A query's probabilities sum to 1 in each of three branches, weighted by 1/3 each.
    torch.testing.assert_close(
        dv.double().sum(dim=(0, 1)).sum(0),
        torch.full((DIM,), float(LAST * HEADS), device="cuda", dtype=torch.float64),
        rtol=1e-2,
        atol=0,
    )
    assert dk.isfinite().all()


def test_products_of_a_layer_of_more_than_2_to_the_31_elements():
    """Those of the last sequence, past the limit, are the same as those of it alone."""
    heads, kv_heads, theta = 64, 2, 10000.0
    rows, columns = 2**31 // (heads * DIM) + 2 * LAST, (heads + 2 * kv_heads) * DIM
    product = torch.zeros(1, rows, columns, dtype=torch.bfloat16, device="cuda")
    product[:, -LAST:].normal_()
    call, bounds = (heads, kv_heads, 1, DIM, DIM), make_cu_seqlens([rows - LAST, LAST], "cuda")
    found = kernel_calls.split_product(product, *call, bounds, theta)
    wanted = kernel_calls.split_product(product[:, -LAST:], *call, None, theta)
    for whole, alone in zip(found, wanted, strict=True):
        assert torch.equal(whole[:, -LAST:], alone)
        assert not whole[:, :-LAST].any()
    del product
    gradient = kernel_calls.product_gradient(found, None, None, None, DIM, bounds, theta)
    alone = kernel_calls.product_gradient(wanted, None, None, None, DIM, None, theta)
    assert torch.equal(gradient[:, -LAST:], alone)
    assert not gradient[:, :-LAST].any()


def test_gradients_of_activations_of_more_than_2_to_the_31_elements():
    columns = 1024
    rows = 2**31 // columns + 2 * LAST
    x, dy = torch.zeros(2, rows, columns, dtype=torch.bfloat16, device="cuda")
    for tensor in (x, dy):
        tensor[-LAST:].normal_()
    last, sums, expected = dy[-LAST:].clone(), *torch.empty_like(x[:2])
    wanted = kernel_calls.activation_gradient("silu", last, x[-LAST:], expected)
    active = kernel_calls.activation_gradient("silu", dy, x, sums)
    for whole, alone in ((active, wanted), (dy, last)):
        assert torch.equal(whole[-LAST:], alone)
        assert not whole[:-LAST].any()
    # Other CTAs add up other rows.
    torch.testing.assert_close(sums, expected, rtol=2**-7, atol=1e-3)
