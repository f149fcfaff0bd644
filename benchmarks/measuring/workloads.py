"""The measured work: the tensors of a shape, and forward and backward passes over them."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import nsa
from nsa.testing import make_cu_seqlens

PASSES = ("forward", "forward+backward")
DEVICE = "cuda"
PRESETS = {"tile": nsa.NSAConfig, "token": nsa.NSAConfig.paper}


class Tensors(NamedTuple):
    """Arguments of one call; ``dout`` only if a backward pass is measured."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate_proj_weight: Tensor
    dout: Tensor | None
    extra: dict  # the Packing of packed sequences

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self[:4]


def add_shape_arguments(parser: argparse.ArgumentParser):
    """Add arguments for the selection mode, heads, channels and dtype."""
    parser.add_argument(
        "--selection",
        choices=tuple(PRESETS),
        default="tile",
        help="tile: NSAConfig(); token: NSAConfig.paper()",
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")


def shape_columns(options) -> dict:
    """The columns ``SHAPE_FIELDS``."""
    return {name: getattr(options, name) for name in SHAPE_FIELDS}


SHAPE_FIELDS = ("selection", "heads", "kv_heads", "head_dim", "dtype")


def make_config(options, groups: int | None = None) -> nsa.NSAConfig:
    """The preset of ``--selection``, with ``num_cmp_selected_blocks=groups``."""
    return PRESETS[options.selection](num_cmp_selected_blocks=groups)


def groups_argument(text: str) -> int | None:
    """``num_cmp_selected_blocks`` from the command line: a number, or "none" for all."""
    return None if text == "none" else int(text)


def describe_groups(groups: int | None) -> str:
    """The inverse of :func:`groups_argument`."""
    return "none" if groups is None else str(groups)


def make_tensors(
    leading: tuple[int, ...], options, *, backward: bool, lengths: list[int] | None = None
) -> Tensors:
    """Standard normal tensors on the GPU, drawn in their dtype to need no more memory.

    Args:
        leading: ``(B, N)``, or ``(T,)`` with ``lengths``.
        options: heads, kv_heads, head_dim and dtype.
        backward: whether to make ``dout`` for a backward pass.
        lengths: lengths of packed sequences.
    """
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def draw(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0, gain, generator=generator)

    dim = options.head_dim
    q = draw(*leading, options.heads, dim)
    k, v = (draw(*leading, options.kv_heads, dim) for _ in range(2))
    weight = draw(options.heads, 3, dim, gain=dim**-0.5)
    extra = {}
    if lengths is not None:
        extra = dict(cu_seqlens=nsa.Packing(make_cu_seqlens(lengths, DEVICE)))
    dout = draw(*q.shape) if backward else None
    return Tensors(*(x.requires_grad_() for x in (q, k, v, weight)), dout, extra)


def reshaped(tensors: Tensors, leading: tuple[int, ...]) -> Tensors:
    """The same memory as a batch of equal sequences, with ``leading = (B, N)``."""
    q, k, v = (
        x.detach().view(*leading, *x.shape[-2:]).requires_grad_() for x in tensors.leaves[:3]
    )
    dout = None if tensors.dout is None else tensors.dout.view(*leading, *q.shape[-2:])
    return Tensors(q, k, v, tensors.gate_proj_weight, dout, {})


def nsa_attention(tensors: Tensors, config: nsa.NSAConfig, **arguments) -> Callable[[], Tensor]:
    """The fused backend on these tensors. ``arguments`` are passed to :func:`nsa.forward`."""
    q, k, v, weight = tensors.leaves
    arguments = dict(gate_proj_weight=weight, backend="fused") | tensors.extra | arguments
    return lambda: nsa.forward(q, k, v, config=config, **arguments)


def dense_attention(tensors: Tensors) -> Callable[[], Tensor]:
    """FlashAttention-4's causal attention on the same tensors."""
    from flash_attn.cute import flash_attn_func

    q, k, v, _ = tensors.leaves
    return lambda: flash_attn_func(q, k, v, causal=True)[0]


def make_compiled_step(attention: Callable[[], Tensor], tensors: Tensors) -> Callable[[], None]:
    """:func:`make_step` for ``torch.compile(attention, mode="reduce-overhead")``, captured."""
    compiled = torch.compile(attention, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def call():
        torch.compiler.cudagraph_mark_step_begin()
        return compiled()

    step = make_step(call, tensors)
    # The first call compiles, and the second is captured.
    for _ in range(3):
        step()
    return step


def make_step(attention: Callable[[], Tensor], tensors: Tensors) -> Callable[[], None]:
    """One pass over ``attention``, with its backward if ``tensors`` have a ``dout``."""

    def forward():
        with torch.no_grad():
            attention()

    def forward_backward():
        torch.autograd.grad(attention(), tensors.leaves, tensors.dout, allow_unused=True)

    return forward if tensors.dout is None else forward_backward
