"""Parts of the layer on kernels of our own: the rotary embedding, and the compressor's rows.

Each is an autograd node in Python, and a torch.library custom op while something traces, for the
reasons in :mod:`nsa.fused.ops`.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa.blocks import BlockPlaces
from nsa.config import NSAConfig
from nsa.fused import kernel_calls
from nsa.fused.custom_ops import custom_op
from nsa.fused.plan_tables import BOUNDS, make_rule
from nsa.host import is_traced
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
