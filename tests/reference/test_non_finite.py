"""A NaN or infinity stays with the queries that attend it, forward and backward."""

import math

import pytest
import torch

import nsa
from nsa.reference.products import inner_products, weighted_sum
from nsa.testing import make_cu_seqlens, make_inputs

F64 = torch.float64
CONFIGS = {
    "token": nsa.NSAConfig.paper(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4,
        window_size=6,
    ),
    "tile": nsa.NSAConfig(
        compress_block_size=8, q_tile_size=16, num_selected_blocks=3, num_local_blocks=2,
        window_size=6,
    ),
    "sparse": nsa.NSAConfig(
        compress_block_size=8, q_tile_size=16, num_selected_blocks=3, window_size=6,
        num_cmp_selected_blocks=1, cmp_group_size=2,
    ),
    "not causal": nsa.NSAConfig(
        compress_block_size=8, q_tile_size=16, num_selected_blocks=3, window_size=6, causal=False
    ),
}  # fmt: skip
LENGTHS = [40, 1, 0, 37, 50]
START, END = 41, 78  # the sequence of 37
BAD = [math.nan, math.inf, -math.inf]


def run(q, k, v, config, **extras):
    """Output, and gradients that a NaN in another query's output does not reach by the loss."""
    out = nsa.forward(q, k, v, config=config, **extras)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    return out, torch.autograd.grad(out, (q, k, v), dout)


def spoiled(x, where, value):
    x = x.detach().clone()
    x[where] = value
    return x.requires_grad_()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("mode", CONFIGS)
def test_other_sequences_are_as_without(mode, name, value):
    inputs = dict(zip("qkv", make_inputs((sum(LENGTHS),), 4, 2, 8, dtype=F64), strict=True))
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    call = dict(config=CONFIGS[mode], cu_seqlens=make_cu_seqlens(LENGTHS), backend="reference")
    expected, expected_grads = run(**inputs, **call)
    inputs[name] = spoiled(inputs[name], (START + 11, 1, 3), value)
    out, grads = run(**inputs, **call)
    others = [*range(START), *range(END, sum(LENGTHS))]
    assert torch.equal(out[others], expected[others])
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad[others], wanted[others])
    assert not out[START:END].isfinite().all()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("mode", CONFIGS)
def test_other_entries_of_a_batch_are_as_without(mode, name, value):
    inputs = dict(zip("qkv", make_inputs((3, 45), 4, 2, 8, dtype=F64), strict=True))
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    call = dict(config=CONFIGS[mode], backend="reference")
    expected, expected_grads = run(**inputs, **call)
    inputs[name] = spoiled(inputs[name], (1, 7, 0, 2), value)
    out, grads = run(**inputs, **call)
    for x, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert torch.equal(x[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("mode", ["token", "tile", "sparse"])
def test_earlier_tokens_are_as_without(mode, name, value):
    inputs = dict(zip("qkv", make_inputs((1, 90), 4, 2, 8, dtype=F64), strict=True))
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    call = dict(config=CONFIGS[mode], backend="reference")
    expected, expected_grads = run(**inputs, **call)
    bad = 61
    inputs[name] = spoiled(inputs[name], (0, bad, 0, 2), value)
    out, grads = run(**inputs, **call)
    assert torch.equal(out[:, :bad], expected[:, :bad])
    # A key of infinite score -inf weighs 0.
    assert name == "k" or not out[:, bad, :2].isfinite().all()
    # The other KV head, at every token.
    assert torch.equal(out[:, :, 2:], expected[:, :, 2:])
    assert torch.equal(grads[0][:, :bad], expected_grads[0][:, :bad])


@pytest.mark.parametrize("value", BAD)
def test_a_value_outside_of_window_and_selection_is_not_attended(value):
    """The paper's sums are over what is attended: of the others nothing is known."""
    config = CONFIGS["token"]
    q, k, v = make_inputs((1, 90), 4, 2, 8, dtype=F64)
    gates = torch.ones(1, 90, 4, 3, dtype=F64)
    gates[..., 0] = 0
    blocks = nsa.select_blocks(q, k, config=config)
    call = dict(config=config, block_indices=blocks)
    three = (v, v.clone(), v.clone())
    expected = nsa.forward(q, k, three, gates=gates, **call)
    three[1][0, 20, 0, 2] = value
    three[2][0, 20, 0, 2] = value
    out = nsa.forward(q, k, three, gates=gates, **call)
    selects = (blocks[0, :, 0] == 20 // 8).any(-1) & (torch.arange(90) >= 20)
    near = (torch.arange(90) >= 20) & (torch.arange(90) < 20 + 6)
    attends = selects | near
    channel = torch.zeros(4, 8, dtype=torch.bool)
    channel[:2, 2] = True
    bad = attends[None, :, None, None] & channel
    assert attends.any()
    assert not attends.all()
    assert torch.equal(out[~bad], expected[~bad])
    attended = out[bad]
    same = attended.isnan() if math.isnan(value) else attended == value
    assert same.all()


def test_a_nan_does_not_part_equal_keys():
    """Keys that repeat are found by their bits, whatever else is among them."""
    config = nsa.NSAConfig(
        selection="token", compress_block_size=4, num_selected_blocks=3, window_size=4
    )
    q, k, _ = make_inputs((1, 400), 4, 2, 8)
    k = k[:, :4].repeat(1, 100, 1, 1)
    k[:, 301] = math.nan
    blocks = nsa.select_blocks(q, k, config=config)
    assert (blocks[0, 100:300] == torch.tensor([0, 1, 2])).all()


def test_products_sum_over_the_mask_alone():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 5, 7, generator=generator) < 0.5
    a = torch.randn(2, 5, 7, generator=generator, dtype=F64).masked_fill(~mask, 0)
    b = torch.randn(2, 7, 3, generator=generator, dtype=F64)
    b[0, 1, 0], b[0, 2, 0], b[1, 3, 1], b[1, 4, 1] = math.nan, math.inf, -math.inf, math.inf
    a[1, 2, 3] = 0
    terms = torch.where(mask[..., None], a[..., None] * b[:, None], 0)
    torch.testing.assert_close(weighted_sum(a, b, mask), terms.sum(2), equal_nan=True)


# gradcheck's forward mode compiles some of PyTorch's own formulas with it.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("masked", [False, True])
def test_products_have_two_derivatives(masked):
    mask = torch.rand(2, 3, 4) < 0.5 if masked else None
    x, y = torch.randn(2, 3, 5, dtype=F64), torch.randn(2, 4, 5, dtype=F64)
    a, b = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 4, 5, dtype=F64)
    if masked:
        a = a.masked_fill(~mask, 0)
    for leaf in (x, y, a, b):
        leaf.requires_grad_()

    def inner(left, right):
        products = inner_products(left, right, mask)
        return products if mask is None else products.masked_fill(~mask, 0)

    def weighted(left, right):
        left = left if mask is None else left.masked_fill(~mask, 0)
        return weighted_sum(left, right, mask)

    for function, arguments in ((inner, (x, y)), (weighted, (a, b))):
        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, arguments)
