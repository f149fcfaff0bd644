"""A call of FlashAttention-4's kernels: tensors and options, and float32 buffers of a backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.fused.fa4_variants import BackwardTile, Mask, Variant, Window

MANY_SEQUENCES = 256
"""Above as many, kernels look up in a table where the tiles of each sequence start, as in FA4."""


class Call(NamedTuple):
    """What forward and backward have in common, as tensors or as what kernels are compiled with.

    Attributes:
        q, k, v: ``(B, S, H, D)``, or ``(T, H, D)`` with ``bounds``.
        scale: multiplies ``q @ k^T``.
        mask: the mask.
        window: bounds of the window, (left, right).
        bounds: boundaries of packed sequences, of queries and of keys.
        lists: count and index of partial blocks, then of full ones.
        blocks: (queries, keys) of a block of ``lists``.
        limit: int32, the keys that each query sees; a multiple of the query block long.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Mask
    window: Window = (None, None)
    bounds: tuple[Tensor | None, Tensor | None] = (None, None)
    lists: tuple[Tensor, ...] | None = None
    blocks: tuple[int, int] | None = None
    limit: Tensor | None = None

    def variant(self, *dout: Tensor) -> Variant:
        """Which kernels it needs; ``dout`` in backward."""
        (heads, head_dim), (kv_heads, value_dim) = self.q.shape[-2:], self.v.shape[-2:]
        bounds = self.bounds[0]
        repeated = tuple(map(_repeated, (self.q, self.k, self.v, *dout)))
        return Variant(
            dtype=self.q.dtype,
            head_dim=head_dim,
            value_dim=value_dim,
            group=heads // kv_heads,
            mask=self.mask,
            packed=bounds is not None,
            many=bounds is not None and bounds.shape[0] > MANY_SEQUENCES + 1,
            blocks=self.blocks,
            repeated=repeated if any(repeated) else (),
        )


def _repeated(x: Tensor) -> tuple[int, ...]:
    """Dimensions of stride 0, which the kernels' TMA descriptors leave out when compiled so."""
    strides = x.stride()
    if 0 not in strides:
        return ()
    return tuple(dim for dim, stride in enumerate(strides) if stride == 0 and x.shape[dim] > 1)


class Sums(NamedTuple):
    """Float32 buffers of a backward; ``dk`` and ``dv`` where heads share a KV head."""

    softmax: Tensor
    lse_log2: Tensor
    dq: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None

    @classmethod
    def new(cls, call: Call, variant: Variant, tile: BackwardTile) -> "Sums":
        """As many rows and channels as FA4 has. Only ``dk`` and ``dv`` are added to as they are."""
        kind: dict[str, Any] = dict(dtype=torch.float32, device=call.q.device)
        leading, rows = _rounded_rows(call.q, call.bounds[0], tile.queries)
        channels = _round_up(variant.head_dim, tile.channels)
        softmax, lse_log2 = torch.empty((2, *leading, rows), **kind).unbind()
        dq = torch.empty((*leading, rows * channels), **kind)
        if not variant.adds_keys:
            return cls(softmax, lse_log2, dq)
        # The kernels have one head dimension for both where heads share a KV head.
        leading, rows = _rounded_rows(call.k, call.bounds[1], tile.keys)
        dk_dv = torch.zeros((2, *leading, rows * channels), **kind).unbind()
        return cls(softmax, lse_log2, dq, *dk_dv)


def _rounded_rows(x: Tensor, bounds: Tensor | None, tile: int) -> tuple[tuple[int, ...], int]:
    """Leading dimensions, and rows of a head if each sequence starts at a tile of its own."""
    length, heads = x.shape[-3:-1]
    if bounds is None:
        return (x.shape[0], heads), _round_up(length, tile)
    return (heads,), (length + bounds.shape[0] * tile - 1) // tile * tile


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
