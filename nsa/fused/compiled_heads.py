"""What a compiled layer does between its projections and its attention, as one op.

These are the rotary embedding and both compressors. Eager calls have an autograd node for each, and
recordings of the whole layer. A compiled call cannot be recorded as a whole, and an op, a product
or a Triton kernel takes the host longer than a step of a recording. So this is one op, whose inside
is recorded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa import recordings
from nsa.blocks import BlockPlaces
from nsa.fused import kernel_calls
from nsa.fused.custom_ops import custom_op
from nsa.fused.layer_ops import PLACES, compress_pair, compress_pair_backward

NUM_PARAMETERS = 10


class _Options(NamedTuple):
    """The last arguments of the ops: where blocks are, the base of the wavelengths, and whether
    there will be a backward."""

    block_size: int
    stride: int
    blocks: int
    entry_tokens: int
    entry_blocks: int
    token_bounds: Tensor | None
    block_bounds: Tensor | None
    theta: float
    save: bool

    @property
    def places(self) -> BlockPlaces:
        return BlockPlaces(
            self.block_size,
            self.stride,
            self.blocks,
            self.entry_tokens,
            self.entry_blocks,
            self.token_bounds,
            self.block_bounds,
        )

    @property
    def bounds(self) -> list[Tensor]:
        """None for a batch."""
        return [x for x in (self.token_bounds, self.block_bounds) if x is not None]

    def rotate(self, q: Tensor, k: Tensor, *, inverse: bool = False) -> list[Tensor]:
        """Tokens rotated by their positions, or back."""
        with torch.cuda.device_of(q):
            angles = (0.0, 1, self.theta, inverse)
            rotated = kernel_calls.rotate(q, k, self.token_bounds, None, *angles)
        return [x for x in rotated if x is not None]

    def rotate_blocks(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Compressed tokens rotated by the positions of their centres, or back."""
        centre = (self.block_size - 1) / 2
        with torch.cuda.device_of(x):
            angles = (centre, self.stride, self.theta, inverse)
            return kernel_calls.rotate(x, None, self.block_bounds, None, *angles)[0]


_OPTIONS = f"{PLACES}, float theta, bool save"


@custom_op(
    "rotate_and_compress",
    f"(Tensor q, Tensor k, Tensor both, Tensor[] parameters, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def rotate_and_compress(q, k, both, parameters, *options):
    """Rotated queries and keys, rotated compressed keys, and compressed values.

    Args:
        q, k: ``(..., H, D)`` and ``(..., H_kv, D)``, not rotated.
        both: keys and values ``(..., 2 * H_kv, D)``.
        parameters: as in :func:`nsa.fused.layer_ops.compress_pair`.
        options: see :class:`_Options`.

    With ``save``, what the compressors' backward needs comes last.
    """
    given = _Options(*options)
    tensors = (q, k, both, *parameters)
    q, k, k_cmp, v_cmp, *saved = _run_recorded(run_forward, given, tensors)
    return q, k, k_cmp, v_cmp, saved


def run_forward(options: _Options, q: Tensor, k: Tensor, both: Tensor, *parameters: Tensor) -> list:
    k_cmp, v_cmp, *saved = compress_pair(both, options.places, parameters)
    shape = _compressed_shape(k, options)
    compressed = options.rotate_blocks(k_cmp.view(shape)), v_cmp.clone().view(shape)
    rotated = options.rotate(q, k)
    return [*rotated, *compressed, *(saved if options.save else [])]


def _compressed_shape(k: Tensor, options: _Options) -> tuple[int, ...]:
    leading = (k.shape[0], options.entry_blocks) if k.ndim == 4 else (options.blocks,)
    return *leading, *k.shape[-2:]


@rotate_and_compress.register_fake
def _(q, k, both, parameters, *options):
    given = _Options(*options)
    shape = _compressed_shape(k, given)
    results = [x.new_empty(x.shape) for x in (q, k)] + [k.new_empty(shape) for _ in range(2)]
    saved = []
    if given.save:
        rows = given.blocks * k.shape[-2]
        weight = parameters[2]
        saved = [k.new_empty(2, rows, size) for size in (*weight.shape[::-1], weight.shape[0])]
    return *results, saved


def _setup_context(ctx, inputs, output):
    _, _, both, parameters, *options = inputs
    given = _Options(*options)
    ctx.save_for_backward(given.token_bounds, given.block_bounds, *parameters, *output[-1])
    ctx.options = given._replace(token_bounds=None, block_bounds=None)
    ctx.shape = both.shape


def _backward(ctx, dq, dk, dk_cmp, dv_cmp, _):
    token_bounds, block_bounds, *tensors = ctx.saved_tensors
    options = ctx.options._replace(token_bounds=token_bounds, block_bounds=block_bounds)
    parameters, saved = tensors[:NUM_PARAMETERS], tensors[NUM_PARAMETERS:]
    douts = [x.contiguous() for x in (dq, dk, dk_cmp, dv_cmp)]
    grads = rotate_and_compress_backward(*douts, saved, parameters, ctx.shape, *options)
    return *grads[:3], grads[3:], *(None,) * len(options)


rotate_and_compress.register_autograd(_backward, setup_context=_setup_context)


@custom_op(
    "rotate_and_compress_backward",
    "(Tensor dq, Tensor dk, Tensor dk_cmp, Tensor dv_cmp, Tensor[] saved, Tensor[] parameters, "
    f"SymInt[] shape, {_OPTIONS}) -> Tensor[]",
)
def rotate_and_compress_backward(dq, dk, dk_cmp, dv_cmp, saved, parameters, shape, *options):
    """Gradients of ``q``, ``k``, ``both`` of this shape, and the parameters."""
    tensors = (dq, dk, dk_cmp, dv_cmp, *saved, *parameters)
    given = _Options(*options)
    return _run_recorded(run_backward, given, tensors, tuple(shape))


def run_backward(
    shape: tuple[int, ...],
    options: _Options,
    dq: Tensor,
    dk: Tensor,
    dk_cmp: Tensor,
    dv_cmp: Tensor,
    *tensors: Tensor,
) -> list[Tensor]:
    saved, parameters = tensors[:-NUM_PARAMETERS], tensors[-NUM_PARAMETERS:]
    dk_cmp = options.rotate_blocks(dk_cmp, inverse=True)
    dk_cmp, dv_cmp = (x.flatten(0, -3) for x in (dk_cmp, dv_cmp))
    places = options.places
    dboth, grads = compress_pair_backward(dk_cmp, dv_cmp, saved, shape, places, parameters)
    return [*options.rotate(dq, dk, inverse=True), dboth, *grads]


@rotate_and_compress_backward.register_fake
def _(dq, dk, dk_cmp, dv_cmp, saved, parameters, shape, *options):
    given = (dq, dk)
    return [
        *(x.new_empty(x.shape) for x in given),
        dk.new_empty(shape),
        *(x.new_empty(x.shape) for x in parameters),
    ]


def _run_recorded(function, options: _Options, tensors: Sequence[Tensor], *shape) -> list[Tensor]:
    """``function(*shape, options, *tensors)``, as a recording where it can."""
    bounds, plain = options.bounds, options._replace(token_bounds=None, block_bounds=None)

    def call(*given: Tensor) -> list[Tensor]:
        own = options
        if bounds:
            own = options._replace(token_bounds=given[-2], block_bounds=given[-1])
        return function(*shape, own, *given[: len(tensors)])

    found = recordings.run_op(
        (function, *shape, plain, len(bounds)),
        call,
        [*tensors, *bounds],
        trains=options.save,
        backward=len(shape) > 0,
    )
    return call(*tensors, *bounds) if found is None else found
