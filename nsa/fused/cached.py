"""The entry point of the fused backend for calls with a cache."""

import torch
from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.cache import Cache
from nsa.config import NSAConfig
from nsa.fused import decoding, prefill
from nsa.fused.entry import forward, select_blocks

Branches = tuple[Tensor, Tensor, Tensor]


@torch.compiler.disable(reason="a cache is read on the host, and its kernels are no custom ops")
@torch.no_grad()
def forward_cached(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    cache: Cache,
    config: NSAConfig,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
    max_workspace_bytes: int | None = None,
    recompute_window: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """:func:`nsa.fused.entry.forward` with a cache, whose configuration is ``config``.

    Few new tokens are a decoding step. Others are a call without a cache, of all keys. There are no
    gradients, for which the last two arguments are.
    """
    if decoding.unsupported_reason(q, cache, boundaries, block_indices is not None) is None:
        return decoding.forward(
            q, k, v, cache=cache, gate_proj_weight=gate_proj_weight, gates=gates,
            compress_k_weight=compress_k_weight, compress_v_weight=compress_v_weight,
            compressed_kv=compressed_kv, block_indices=block_indices, boundaries=boundaries,
        )  # fmt: skip
    prompt = prefill.begin(
        q, k, v, cache=cache, compress_weights=(compress_k_weight, compress_v_weight),
        compressed_kv=compressed_kv, block_indices=block_indices, boundaries=boundaries,
    )  # fmt: skip
    call, blocks = prompt.call, prompt.block_indices
    if blocks is None and config.selection == "tile":
        # Selected here, because the cache keeps them.
        blocks = select_blocks(
            call.q, call.k[0], config=config, compressed_kv=call.compressed_kv,
            boundaries=call.boundaries,
        )  # fmt: skip
    out = forward(
        call.q, call.k, call.v, config=config, gate_proj_weight=gate_proj_weight,
        gates=None if gates is None else gates.reshape(*call.q.shape[:-1], 3),
        compressed_kv=call.compressed_kv, block_indices=blocks, boundaries=call.boundaries,
        max_workspace_bytes=max_workspace_bytes,
    )  # fmt: skip
    prompt.end(blocks)
    return out.reshape(*q.shape[:-1], out.shape[-1])
