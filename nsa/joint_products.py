"""One product for several linear layers, which stay modules with their own parameters.

A small product costs the host as much as a large one, and one product reads its input once. Modules
that are wrapped or hooked are called instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from nsa.blocks import BlockPlaces
from nsa.compressor import PLAIN_TYPES, BlockCompressor
from nsa.linears import MLP
from nsa.plain_modules import is_plain, plain_parameters
from nsa.precision import autocast_dtype, without_autocast

Layer = Any
"""A :class:`nsa.NativeSparseAttention`, whose module imports this one."""

OF_COMPRESSOR = [BlockCompressor, MLP, nn.Linear, nn.SiLU, nn.Linear]
"""A compressor and the modules in it."""


class Projections(NamedTuple):
    """What a layer projects from its input. The last two are given if one product made them.

    Attributes:
        heads: queries ``(..., H, D)``, and keys and values of each branch, or of all; not rotated.
        both: keys and values ``(..., 2 * H_kv, D)`` of all branches; None where these have their
            own, or other dimensions.
        logits: of the gates; None without an MLP.
    """

    heads: tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]
    both: Tensor | None = None
    logits: Tensor | None = None


def project_jointly(layer: Layer, x: Tensor) -> Projections | None:
    """The projections, or None if modules must be called."""
    if layer.backend == "reference" or not (layer.backend == "fused" or x.is_cuda):
        return None
    # Without rotation q is saved for backward, and a view would keep the whole product alive.
    if layer.recompute or layer.rope_theta is None or not _has_plain_derivatives():
        return None
    linears, mlp = [layer.q_proj, layer.k_proj, layer.v_proj], layer.gate_mlp
    if mlp is not None:
        linears.append(mlp[0] if is_plain(mlp, MLP) else mlp)
    if not all(is_plain(module, nn.Linear) for module in linears):
        return None
    biases = [module.bias for module in linears]
    weights = [module.weight for module in linears]
    dtype = joint_dtype(weights, x)
    if dtype is None or any(bias is not None for bias in biases[:3]):
        return None
    if not has_sizes_of(layer, x, weights):
        return None
    # Aliases keep the current memory, because `leaf.data` may be set to another.
    aliases = [t.view_as(t) for t in (x.to(dtype), *weights)]
    rows = list(map(len, weights))
    # torch.compile chooses itself what to save, and warns of nodes in Python.
    product = _product if torch.compiler.is_compiling() else _JointProduct.apply
    q, kv, *rest = product([rows[0], rows[1] + rows[2], *rows[3:]], *aliases)
    logits = None
    if rest:
        # A tensor of its own, because SiLU keeps it for backward.
        hidden = rest[0].contiguous() if biases[3] is None else rest[0] + biases[3].to(dtype)
        if layer.saves_less(x) and torch.is_grad_enabled():
            logits = checkpoint(mlp.after_first, hidden, x.dtype, use_reentrant=False)
        else:
            logits = mlp.after_first(hidden, x.dtype)
    heads, both = _key_heads(layer, kv)
    return Projections((q.unflatten(-1, (layer.num_heads, layer.head_dim)), *heads), both, logits)


def has_sizes_of(layer: Layer, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the products have the sizes that the layer splits them into."""
    key_rows = layer.num_kv_branches * layer.num_kv_heads
    rows = (
        layer.num_heads * layer.head_dim,
        key_rows * layer.head_dim,
        key_rows * layer.value_head_dim,
    )
    same = all(len(weight) == size for weight, size in zip(weights, rows, strict=False))
    return same and all(weight.shape[1:] == x.shape[-1:] for weight in weights)


def _key_heads(layer: Layer, kv: Tensor) -> tuple[tuple, Tensor | None]:
    """Keys and values of each branch, or of all, and :attr:`Projections.both`."""
    branches, num_heads = layer.num_kv_branches, layer.num_kv_heads
    dims, both = (layer.head_dim, layer.value_head_dim), None
    if branches == 1 and dims[0] == dims[1]:
        both = kv.unflatten(-1, (2 * num_heads, dims[0]))
        k, v = (x.flatten(-2) for x in both.chunk(2, -2))
    else:
        k, v = kv.split([branches * num_heads * dim for dim in dims], -1)
    # Values are saved for backward, and a view would keep the whole product alive.
    pair = zip((k, v.contiguous()), dims, strict=True)
    return tuple(layer._branches(x, dim) for x, dim in pair), both


def compress_both(
    compressors: Sequence[nn.Module | None], x: Tensor, places: BlockPlaces
) -> tuple[Tensor, Tensor] | None:
    """The results of both compressors for keys and values ``(..., 2 * H_kv, D)``, on the fused
    backend. None if the modules must be called."""
    from nsa.fused import layer_ops

    parameters = parameters_of_both(compressors, x)
    if parameters is None or not layer_ops.can_compress_both(x):
        return None
    first, second = parameters
    return layer_ops.compress_both(x, first, second, places)


def parameters_of_both(
    compressors: Sequence[nn.Module | None], x: Tensor
) -> list[list[Tensor]] | None:
    """For each compressor: position, then weight and bias of the first and the last linear layer.
    None if the modules must be called, or if shapes differ. ``x`` is what they compress.
    """
    found = []
    for module in compressors:
        plain = plain_parameters({"": module}, PLAIN_TYPES)
        if plain is None or [x[1] for x in plain[1] if isinstance(x, tuple)] != OF_COMPRESSOR:
            return None
        found.append(plain[0])
    first, second = found
    if len(first) != 5 or [p.shape for p in first] != [p.shape for p in second]:
        return None
    return found if joint_dtype([*first, *second], x) == x.dtype else None


def joint_dtype(parameters: Sequence[Tensor], x: Tensor) -> torch.dtype | None:
    """The dtype in which linear layers compute. None if they differ, or if a tensor is not
    plain."""
    if not all(type(p) in (Tensor, nn.Parameter) for p in parameters):
        return None
    given, wanted = {x.dtype, *(p.dtype for p in parameters)}, autocast_dtype(x.device)
    # Autocast leaves float64 alone.
    if wanted is None or torch.float64 in given:
        return x.dtype if len(given) == 1 else None
    return wanted


def _has_plain_derivatives() -> bool:
    """Whether a node needs gradients alone: no forward-mode AD is active."""
    return torch.compiler.is_dynamo_compiling() or forward_ad._current_level < 0


def _product(sizes: Sequence[int], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """``x`` times weights below one another, in parts of ``sizes`` columns."""
    with without_autocast(x.device):
        product = linear(x, torch.cat(weights).to(x.dtype))
    # Not views of one tensor, because autograd tracks those.
    return torch.unsafe_split_with_sizes(product, sizes, -1)


class _JointProduct(torch.autograd.Function):
    """:func:`_product`, which saves the weights themselves, not the joint weight made of them."""

    @staticmethod
    def forward(ctx, sizes: Sequence[int], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return _product(sizes, x, *weights)

    @staticmethod
    def backward(ctx, *douts: Tensor):
        x, *weights = ctx.saved_tensors
        dout = torch.cat(douts, -1)
        _, of_x, *of_weights = ctx.needs_input_grad
        dx = dout @ torch.cat(weights).to(x.dtype) if of_x else None
        rows_of_x = x.flatten(0, -2)
        if all(of_weights):
            dweight = dout.flatten(0, -2).mT @ rows_of_x
            # Copies, in one launch, because a view of one gradient would keep all of them alive.
            grads = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
            torch._foreach_copy_(grads, dweight.split(list(map(len, weights))))
            return None, dx, *grads
        columns = dout.flatten(0, -2).split(list(map(len, weights)), -1)
        return (
            None,
            dx,
            *(
                (part.mT @ rows_of_x).to(w.dtype) if wanted else None
                for part, w, wanted in zip(columns, weights, of_weights, strict=True)
            ),
        )
