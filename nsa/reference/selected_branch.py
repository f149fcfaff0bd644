"""The selected branch by itself, for blocks that the caller has chosen."""

import torch
from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.cache.paged_keys import PagedKeys, attend_copied
from nsa.config import NSAConfig
from nsa.geometry import Geometry
from nsa.precision import without_autocast
from nsa.reference import attention
from nsa.reference.determinism import check_deterministic_device


@torch.compiler.disable(reason="nsa's reference reads lengths on the host")
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    boundaries: Boundaries | None,
    return_lse: bool,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`nsa.selected_attention`. Arguments are checked."""
    check_deterministic_device(deterministic, q)
    config = NSAConfig(
        selection="token",
        compress_block_size=block_size,
        num_selected_blocks=block_indices.shape[-1],
        causal=causal,
        scale=scale,
    )
    with without_autocast(q.device):
        bounds = () if boundaries is None else (boundaries.cu_seqlens, boundaries.cu_seqlens_k)
        geometry = Geometry.of(q, k, config, *bounds)
        # A copy, because the caller may overwrite the original before the backward.
        indices = block_indices.clone()
        rows, keys, values, lists = (
            x.flatten(0, 1) if x.ndim == 4 else x for x in (q, k, v, indices)
        )
        out, lse = attention.selected_attention(rows, keys, values, lists, geometry)
        out = out.reshape(*q.shape[:-1], out.shape[-1])
        lse = lse.reshape(q.shape[:-1]).transpose(-1, -2)
        return (out, lse) if return_lse else out


@torch.compiler.disable(reason="nsa's reference reads lengths on the host")
@torch.no_grad()
def selected_from_pages(
    q: Tensor,
    pages: PagedKeys,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    boundaries: Boundaries | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa.selected_attention` with ``page_table``. Arguments are checked."""
    return attend_copied(
        selected_attention, q, pages, block_indices, boundaries,
        block_size=block_size, causal=causal, scale=scale,
    )  # fmt: skip
