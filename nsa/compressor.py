"""The learned compression ``phi`` of Eq. 7 of https://arxiv.org/abs/2502.11089, and its blocks."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from nsa.blocks import BlockPlaces, num_compressed_blocks
from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.host import is_traced
from nsa.linears import MLP, make_mlp
from nsa.plain_modules import Types
from nsa.segments import locate_items, prefix_sum
from nsa.validation import check_new_tensors


class BlockCompressor(nn.Module):
    """The learned compression ``phi`` of the paper's Eq. 7, from ``l`` vectors to one.

    ``phi(x_1 .. x_l) = MLP(concat(x_i + position_i))``; all KV heads share it.

    Args:
        block_size: vectors ``l`` in a block.
        dim: channels ``D`` of a vector.
        device, dtype: of the parameters; by default torch's defaults.

    Linear layers are initialised normal with variance ``1 / fan_in`` (``2 / fan_in`` before the
    SiLU), so a compressed vector has about the scale of its tokens. Positions have std 0.02.
    """

    def __init__(
        self,
        block_size: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_new_tensors(dtype, device)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position = nn.Parameter(torch.empty(block_size, dim, **factory))
        self.mlp = make_mlp(block_size * dim, 2 * dim, dim, **factory)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise the positions. The linear layers initialise themselves."""
        nn.init.normal_(self.position, std=0.02)

    def forward(
        self, x: Tensor, gather: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """``(M, l, H_kv, D)`` to ``(M, H_kv, D)``.

        With ``gather``, ``x`` are tokens, and ``gather(x, position)`` gives ``x_i + position_i`` of
        their blocks, ``(M, H_kv, l, D)``.
        """
        position = self.position.to(x.dtype)
        blocks = x.transpose(1, 2) + position if gather is None else gather(x, position)
        # Two dimensions, because linear layers then need no views, which cost host time.
        return self.mlp(blocks.reshape(-1, blocks.shape[2] * blocks.shape[3])).unflatten(
            0, blocks.shape[:2]
        )


PLAIN_TYPES: Types = {
    nn.Linear: ("weight", "bias"),
    nn.SiLU: (),
    MLP: (),
    BlockCompressor: ("position",),
}
"""Modules of a layer that :func:`nsa.plain_modules.plain_parameters` knows."""


def block_places(
    x: Tensor, boundaries: Boundaries | None, config: NSAConfig, fused: bool
) -> BlockPlaces:
    """The compressed blocks of ``x (B, N, ...)`` or packed ``(T, ...)``.

    For packed sequences of unknown lengths their number is an upper bound.
    """
    size, stride = config.compress_block_size, config.compress_stride
    if boundaries is None:
        batch, length = x.shape[:2]
        count = num_compressed_blocks(length, config)
        return BlockPlaces(size, stride, batch * count, length, count, None, None)
    total = x.shape[0] // stride
    if boundaries.lengths is not None:
        total = sum(num_compressed_blocks(length, config) for length in boundaries.lengths)

    cu_seqlens, num_tokens = boundaries.cu_seqlens, x.shape[0]

    def count_blocks() -> Tensor:
        if fused and not is_traced(cu_seqlens):
            from nsa.fused import layer_ops

            return layer_ops.block_bounds(cu_seqlens, num_tokens, config)
        return prefix_sum(num_compressed_blocks(cu_seqlens.diff(), config)).int()

    bounds = boundaries.keep(("block bounds", config), count_blocks)
    return BlockPlaces(size, stride, total, num_tokens, total, cu_seqlens, bounds)


def kept_items(
    boundaries: Boundaries, key: Hashable, bounds: Tensor, total: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Gives :func:`nsa.segments.locate_items` for ``bounds``, which the caller's Packing keeps."""
    return lambda: boundaries.keep(key, lambda: locate_items(bounds.long(), total))


def gather_blocks(
    x: Tensor,
    position: Tensor,
    places: BlockPlaces,
    locate: Callable[[], tuple[Tensor, Tensor]] | None,
    fused: bool,
) -> Tensor:
    """The tokens of each block with ``position (l, D)`` added: ``(M, H_kv, l, D)``.

    Args:
        x: keys or values ``(B, N, H_kv, D)`` or ``(T, H_kv, D)``.
        position: in the dtype of ``x``.
        places: the blocks.
        locate: gives the sequence of each packed block, and its index there; None for a batch.
        fused: whether the fused backend computes this.
    """
    if fused:
        from nsa.fused import layer_ops

        if layer_ops.can_gather(x):
            return layer_ops.gather_blocks(x, position, places)
    if locate is None:
        first = _first_tokens(places, x.device)
    else:
        owner, local = locate()
        assert places.token_bounds is not None
        first = places.token_bounds.long()[owner] + local * places.stride
    index = first[:, None] + torch.arange(places.block_size, device=x.device)
    # Rows past the last block may read any token.
    index = index.clamp(max=max(0, x.shape[:-2].numel() - 1))
    blocks = x.flatten(0, -3).index_select(0, index.flatten()).unflatten(0, index.shape)
    return blocks.transpose(1, 2) + position


def _first_tokens(places: BlockPlaces, device: torch.device) -> Tensor:
    """The flat first token of each block of a batch, int64 ``(M,)``."""
    block = torch.arange(places.blocks, device=device)
    # There may be no block.
    entry, local = block // max(1, places.entry_blocks), block % max(1, places.entry_blocks)
    return entry * places.entry_tokens + local * places.stride
