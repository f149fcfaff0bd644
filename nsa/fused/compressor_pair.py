"""The compressors of keys and of values at once, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from nsa.blocks import BlockPlaces
from nsa.fused import kernel_calls
from nsa.precision import without_autocast


def compress_pair(
    x: Tensor, places: BlockPlaces, parameters: Sequence[Tensor], joined: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The learned compression of the first half of the heads, and of the second; and two tensors
    for its backward.

    One product does what two would.

    Args:
        x: ``(..., 2 * H_kv, D)``.
        places: the blocks.
        parameters: of each compressor, in pairs: positions, then weight and bias of two layers.
        joined: all elements of these one after the other, in the dtype of ``x``.

    Returns:
        ``(M, H_kv, D)`` each; and what :func:`compress_pair_backward` takes as ``saved``.
    """
    with torch.cuda.device_of(x), without_autocast(x.device):
        stacked = _stacked(joined, _pair_shapes(parameters))
        position, weight, bias, last_weight, last_bias = stacked
        rows = kernel_calls.gather_blocks(x, position, places)
        flat = rows.flatten(3).flatten(1, 2)
        hidden = torch.baddbmm(bias[:, None], flat, weight.mT)
        out = torch.baddbmm(last_bias[:, None], silu(hidden), last_weight.mT)
    k, v = out.unflatten(1, rows.shape[1:3])
    return k, v, flat, hidden


def compress_pair_backward(
    dk: Tensor,
    dv: Tensor,
    saved: list[Tensor],
    parameters: Sequence[Tensor],
    joined: Tensor,
    *,
    trained: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the rows of blocks, ``(2, M, H_kv, l, D)``, and of the parameters if they are
    ``trained``: parts of one tensor. ``joined`` is of :func:`weights_of`. ``saved`` is emptied."""
    flat, hidden = saved
    saved.clear()
    shapes = _pair_shapes(parameters)
    with torch.cuda.device_of(flat), without_autocast(flat.device):
        weight, last_weight = _stacked(joined, shapes[1::2])
        dout = torch.cat((dk, dv)).view(2, -1, dk.shape[-1])
        found, grads = list[Tensor](), list[Tensor]()
        if trained:
            found = _stacked(flat.new_empty(sum(p.numel() for p in parameters)), shapes)
        dbias = found[2] if trained else hidden.new_empty(2, hidden.shape[-1])
        dhidden = torch.bmm(dout, last_weight)
        active = kernel_calls.activation_gradient("silu", dhidden, hidden, dbias)
        if trained:
            assert active is not None
            torch.bmm(dhidden.mT, flat, out=found[1])
            torch.bmm(dout.mT, active, out=found[3])
        del flat, hidden, active
        drows = torch.bmm(dhidden, weight).view(2, *dk.shape[:2], *shapes[0])
        if trained:
            rows = drows.flatten(1, 2).flatten(2)
            kernel_calls.column_sums(dout, found[4], rows, found[0].flatten(1))
            grads = [x for both in found for x in both]
        return drows, grads


def _pair_shapes(parameters: Sequence[Tensor]) -> list[torch.Size]:
    return [p.shape for p in parameters[::2]]


def weights_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The weights of both layers, which backward takes."""
    return [*parameters[2:4], *parameters[6:8]]


def _stacked(joined: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Two parameters of each shape in one tensor, all of them parts of ``joined``."""
    parts = joined.split([2 * shape.numel() for shape in shapes])
    return [part.view(2, *shape) for part, shape in zip(parts, shapes, strict=True)]
