"""The layer's parts on kernels of our own, emulated: gradients, custom ops, and the whole layer."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import nsa
from nsa.blocks import BlockPlaces
from nsa.fused import kernel_calls, layer_ops
from nsa.rope import Positions, apply_rope, rotate
from nsa.testing import make_cu_seqlens

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

LENGTHS = [2, 0, 6, 1]
TOTAL = sum(LENGTHS)
THETA = 10000.0
COUNT = torch.tensor(LENGTHS)
FIRST = torch.tensor([3, 0, 0, 19])
LOCAL = torch.cat([torch.arange(n) for n in LENGTHS])
POSITIONS = {
    "batched": Positions(),
    "centres": Positions(15.5, 16),
    "packed": Positions(bounds=make_cu_seqlens(LENGTHS)),
    "parts of sequences": Positions(
        15.5, 16, make_cu_seqlens(LENGTHS), lambda: FIRST.repeat_interleave(COUNT) + LOCAL,
        make_cu_seqlens(LENGTHS)[:-1] - FIRST.int(), 20,
    ),
}  # fmt: skip


def make_places(packed: bool) -> BlockPlaces:
    """Blocks of 4 tokens at every second one; of packed sequences two rows are none."""
    if not packed:
        return BlockPlaces(4, 2, 2 * 3, TOTAL, 3, None, None)
    bounds = (make_cu_seqlens(x) for x in (LENGTHS, [0, 0, 2, 0]))
    return BlockPlaces(4, 2, 4, TOTAL, 4, *bounds)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("form", POSITIONS)
def test_both_backends_rotate_alike(form):
    x = draw(TOTAL, 2, 32)
    found = layer_ops.rotate([x], POSITIONS[form], THETA)[0]
    torch.testing.assert_close(found, rotate(x, POSITIONS[form], THETA), rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad(found, x, found.detach())
    torch.testing.assert_close(gradient, x.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", POSITIONS)
def test_gradients_of_the_rotation(form):
    def call(*tensors):
        return layer_ops.rotate(tensors, POSITIONS[form], THETA)

    tensors = tuple(draw(TOTAL, heads, 16) for heads in (1, 2, 1))
    assert gradcheck(call, tensors, fast_mode=True)
    assert gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("position", [10**6, 10**6 + 0.5, 2**30])
def test_angles_far_out_are_exact(position):
    x = torch.randn(3, 1, 64, dtype=torch.float64)
    found = kernel_calls.rotate(x, None, None, None, position, 1, THETA, False)[0]
    # The old way: float64 angles, which are exact to 1e-7 there.
    wanted = apply_rope(x, position + torch.arange(3).double(), THETA)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15 * position + 1e-13)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_gradients_of_the_rows(packed):
    places = make_places(packed)
    leading = (TOTAL,) if packed else (2, TOTAL)
    arguments = draw(*leading, 2, 8), draw(4, 8)
    assert gradcheck(lambda *x: layer_ops.gather_blocks(*x, places), arguments)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_custom_ops(packed):
    places, bounds = make_places(packed), make_cu_seqlens(LENGTHS) if packed else None
    x = draw(*((TOTAL,) if packed else (2, TOTAL)), 2, 16)
    origin = bounds[:-1] - 3 if packed else None
    for other in (None, draw(*x.shape[:-2], 1, 16)):
        call = (x, other, bounds, origin, 1.5, 2, THETA, False)
        torch.library.opcheck(layer_ops.rotate_op, call)
    torch.library.opcheck(layer_ops.gather_blocks_op, (x, draw(4, 16), *places))
    rows = torch.randn(places.blocks, 2, 4, 16, dtype=torch.float64)
    torch.library.opcheck(layer_ops.scatter_blocks_op, (rows, x.shape, *places))


OPTIONS = {
    "default": {},
    "mean": {"compressor": "mean"},
    "separate": {"separate_kv": True, "gate": "q"},
    # Channels that the kernels of both parts do not take.
    "other channels": {"head_dim": 12, "value_head_dim": 20},
    "no rope": {"rope_theta": None},
}


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("mode", ["token", "tile"])
def test_layers_of_both_backends_are_equal(mode, options, packed):
    config = nsa.NSAConfig.paper(num_selected_blocks=4) if mode == "token" else nsa.NSAConfig()
    torch.manual_seed(0)
    fused = nsa.NativeSparseAttention(64, 4, 2, config, backend="fused", **options).double()
    reference = nsa.NativeSparseAttention(64, 4, 2, config, backend="reference", **options)
    reference.double().load_state_dict(fused.state_dict())
    lengths = [150, 1, 0, 70]
    x = draw(*((sum(lengths),) if packed else (2, 150)), 64)
    extra = (make_cu_seqlens(lengths),) if packed else ()
    results = []
    for layer in (fused, reference):
        y = layer(x, *extra)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
