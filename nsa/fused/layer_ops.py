"""Parts of the layer on kernels of our own: the rotary embedding, and the compressor's rows.

Each is an autograd node in Python, and a torch.library custom op while something traces, for the
reasons in :mod:`nsa.fused.ops`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa.blocks import BlockPlaces
from nsa.config import NSAConfig
from nsa.fused import kernel_calls
from nsa.fused.custom_ops import custom_op
from nsa.fused.plan_tables import BOUNDS, make_rule
from nsa.host import is_traced
from nsa.precision import without_autocast
from nsa.rope import Positions


def can_rotate(x: Tensor, theta: float) -> bool:
    """Whether :func:`rotate` takes ``x``; its kernel has halves of heads in vectors of 8."""
    return x.shape[-1] % 16 == 0 and theta >= 1


def rotate(tensors: list[Tensor], positions: Positions, theta: float) -> list[Tensor]:
    """Each as by :func:`nsa.rope.rotate`, two in a launch. Only boundaries are saved."""
    bounds, origin = positions.bounds, positions.origin
    call = rotate_op if is_traced(*tensors, bounds) else _Rotation.apply
    angles = (float(positions.start), positions.step, theta, False)
    rotated: list[Tensor] = []
    for i in range(0, len(tensors), 2):
        x, other = (*tensors[i : i + 2], None)[:2]
        results = call(x, other, bounds, origin, *angles)
        rotated += results[: 1 if other is None else 2]
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, other, bounds, origin, *angles):
        ctx.save_for_backward(bounds, origin)
        ctx.angles = angles
        with torch.cuda.device_of(x):
            return kernel_calls.rotate(x, other, bounds, origin, *angles)

    @staticmethod
    def backward(ctx, *douts):
        *angles, inverse = ctx.angles
        # The inverse is the transpose, and differentiable too.
        dx = _Rotation.apply(*douts, *ctx.saved_tensors, *angles, not inverse)
        return *dx, *(None,) * (len(ctx.angles) + 2)


@custom_op("rotate")
def rotate_op(
    x: Tensor,
    other: Tensor | None,
    bounds: Tensor | None,
    origin: Tensor | None,
    start: float,
    step: int,
    theta: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The same as one op, which returns an empty tensor for no other."""
    with torch.cuda.device_of(x):
        out, other_out = kernel_calls.rotate(x, other, bounds, origin, start, step, theta, inverse)
    return out, x.new_empty(0) if other_out is None else other_out


@rotate_op.register_fake
def _(x, other, *_):
    return x.new_empty(x.shape), x.new_empty(0 if other is None else other.shape)


def _without_empty(out: Tensor, other: Tensor) -> tuple[Tensor, Tensor | None]:
    return out, None if other.ndim == 1 else other


def _setup_rotation(ctx, inputs, output):
    _, other, bounds, origin, *ctx.angles = inputs
    ctx.has_other = other is not None
    ctx.save_for_backward(bounds, origin)


def _rotation_backward(ctx, dout, dother):
    *angles, inverse = ctx.angles
    other = dother if ctx.has_other else None
    dx = _without_empty(*rotate_op(dout, other, *ctx.saved_tensors, *angles, not inverse))
    return *dx, *(None,) * (len(ctx.angles) + 2)


rotate_op.register_autograd(_rotation_backward, setup_context=_setup_rotation)


def block_bounds(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> Tensor:
    """Where the compressed blocks of each sequence start, then where the last end, int32."""
    sequences = cu_seqlens.shape[0] - 1
    rule = make_rule(
        config, num_queries=num_tokens, num_keys=num_tokens, sequences=sequences, whole=True
    )
    with torch.cuda.device_of(cu_seqlens):
        bounds = kernel_calls.sequence_bounds(cu_seqlens, cu_seqlens, rule)
    return bounds[BOUNDS.index("compressed")]


def can_gather(x: Tensor) -> bool:
    """Whether :func:`gather_blocks` takes ``x``; its kernel has vectors of 8 channels."""
    return x.shape[-1] % 8 == 0


def gather_blocks(x: Tensor, position: Tensor, places: BlockPlaces) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.gather_blocks`. Nothing is saved for backward."""
    if is_traced(x, position, places.token_bounds):
        return gather_blocks_op(x, position, *places)
    return _BlockRows.apply(x, position, *places)


class _BlockRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, position, *places):
        *numbers, token_bounds, block_bounds = places
        ctx.save_for_backward(token_bounds, block_bounds)
        ctx.numbers, ctx.shape = numbers, x.shape
        with torch.cuda.device_of(x):
            return kernel_calls.gather_blocks(x, position, BlockPlaces(*places))

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        dx, dposition = None, None
        if ctx.needs_input_grad[0]:
            places = BlockPlaces(*ctx.numbers, *ctx.saved_tensors)
            dx = kernel_calls.scatter_blocks(drows, ctx.shape, places)
        if ctx.needs_input_grad[1]:
            dposition = drows.sum((-4, -3))
        return dx, dposition, *(None,) * len(BlockPlaces._fields)


def can_compress_both(x: Tensor) -> bool:
    """Whether :func:`compress_both` takes ``x``. It is no custom op: a compiler fuses by itself."""
    return can_gather(x) and not is_traced(x)


def compress_both(
    x: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], places: BlockPlaces
) -> tuple[Tensor, Tensor]:
    """The learned compression of the first half of the heads, and of the second.

    Args:
        x: ``(..., 2 * H_kv, D)``.
        first, second: parameters of each: position, then weight and bias of two linear layers.
        places: the blocks.

    Returns:
        ``(M, H_kv, D)`` each.
    """
    pairs = [p for pair in zip(first, second, strict=True) for p in pair]
    # Aliases keep the memory that they have now, as `leaf.data` may be set to another.
    return _BothCompressed.apply(x, places, *(p.view_as(p) for p in pairs))


class _BothCompressed(torch.autograd.Function):
    """See :func:`compress_pair`, for which ``parameters`` are."""

    @staticmethod
    def forward(ctx, x, places, *parameters):
        k, v, *saved = compress_pair(x, places, parameters)
        *numbers, token_bounds, block_bounds = places
        ctx.save_for_backward(*saved, token_bounds, block_bounds, *parameters)
        ctx.numbers, ctx.shape = numbers, x.shape
        return k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dk, dv):
        flat, hidden, active, *others = ctx.saved_tensors
        places, parameters = BlockPlaces(*ctx.numbers, *others[:2]), others[2:]
        saved = (flat, hidden, active)
        dx, grads = compress_pair_backward(dk, dv, saved, ctx.shape, places, parameters)
        return dx, None, *grads


def compress_pair(
    x: Tensor, places: BlockPlaces, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`compress_both` gives, and three tensors for its backward.

    One product does what two would. Parameters are copied into one tensor at once, because each
    copy takes the host as long as an operation. The copy is not saved. ``parameters`` are pairs: of
    positions, then weights and biases of two layers.
    """
    with torch.cuda.device_of(x), without_autocast(x.device):
        joined = _stacked(_joined(parameters, x.dtype), _pair_shapes(parameters))
        position, weight, bias, last_weight, last_bias = joined
        rows = kernel_calls.gather_blocks(x, position, places)
        flat = rows.flatten(3).flatten(1, 2)
        hidden = torch.baddbmm(bias[:, None], flat, weight.mT)
        active = torch.nn.functional.silu(hidden)
        out = torch.baddbmm(last_bias[:, None], active, last_weight.mT)
    k, v = out.unflatten(1, rows.shape[1:3])
    return k, v, flat, hidden, active


def compress_pair_backward(
    dk: Tensor,
    dv: Tensor,
    saved: Sequence[Tensor],
    shape: Sequence[int],
    places: BlockPlaces,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the ``x`` of this shape, and of the parameters, each in memory of its own."""
    flat, hidden, active = saved
    shapes = _pair_shapes(parameters)
    gradients = _stacked(flat.new_empty(sum(p.numel() for p in parameters)), shapes)
    dposition, dweight, dbias, dlast_weight, dlast_bias = gradients
    with torch.cuda.device_of(flat), without_autocast(flat.device):
        joined = _joined([*parameters[2:4], *parameters[6:8]], flat.dtype)
        weight, last_weight = _stacked(joined, shapes[1::2])
        dout = torch.cat((dk, dv)).view(2, -1, dk.shape[-1])
        torch.sum(dout, 1, out=dlast_bias)
        torch.bmm(dout.mT, active, out=dlast_weight)
        dhidden = torch.ops.aten.silu_backward(torch.bmm(dout, last_weight), hidden)
        torch.sum(dhidden, 1, out=dbias)
        torch.bmm(dhidden.mT, flat, out=dweight)
        rows = (2, *dk.shape[:2], *shapes[0])
        drows = torch.bmm(dhidden, weight).view(rows)
        torch.sum(drows, (1, 2), out=dposition)
        dx = kernel_calls.scatter_blocks(drows, tuple(shape), places)
        # Copies, because a view would keep the memory of all gradients.
        grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
        torch._foreach_copy_(grads, [x for both in gradients for x in both])
    return dx, grads


def _pair_shapes(parameters: Sequence[Tensor]) -> list[torch.Size]:
    return [p.shape for p in parameters[::2]]


def _joined(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([p.flatten() for p in parameters]).to(dtype)


def _stacked(joined: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Two parameters of each shape in one tensor, all of them parts of ``joined``."""
    parts = joined.split([2 * shape.numel() for shape in shapes])
    return [part.view(2, *shape) for part, shape in zip(parts, shapes, strict=True)]


PLACES = (
    "SymInt block_size, SymInt stride, SymInt blocks, SymInt entry_tokens, SymInt entry_blocks, "
    "Tensor? token_bounds, Tensor? block_bounds"
)


@custom_op("gather_blocks", f"(Tensor x, Tensor position, {PLACES}) -> Tensor")
def gather_blocks_op(x, position, *places):
    """The same as one op."""
    with torch.cuda.device_of(x):
        return kernel_calls.gather_blocks(x, position, BlockPlaces(*places))


@gather_blocks_op.register_fake
def _(x, position, block_size, stride, blocks, *_):
    parts = position.shape[:-2]
    heads = x.shape[-2] // math.prod(parts)
    return x.new_empty(*parts, blocks, heads, block_size, x.shape[-1])


@custom_op("scatter_blocks", f"(Tensor drows, SymInt[] shape, {PLACES}) -> Tensor")
def scatter_blocks_op(drows, shape, *places):
    """The gradient of :func:`gather_blocks_op` for ``x`` of this shape."""
    with torch.cuda.device_of(drows):
        return kernel_calls.scatter_blocks(drows, tuple(shape), BlockPlaces(*places))


@scatter_blocks_op.register_fake
def _(drows, shape, *_):
    return drows.new_empty(shape)


def _setup_gather(ctx, inputs, output):
    x, _, *numbers, token_bounds, block_bounds = inputs
    ctx.save_for_backward(token_bounds, block_bounds)
    ctx.numbers, ctx.shape = numbers, x.shape


def _gather_backward(ctx, drows):
    dx = scatter_blocks_op(drows.contiguous(), ctx.shape, *ctx.numbers, *ctx.saved_tensors)
    return dx, drows.sum((-4, -3)), *(None,) * len(BlockPlaces._fields)


gather_blocks_op.register_autograd(_gather_backward, setup_context=_setup_gather)
