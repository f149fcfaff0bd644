"""The selected branch by itself, of few queries, from the pages where the keys lie."""

import math
from functools import partial

import torch
from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.cache.paged_keys import PagedKeys, attend_copied
from nsa.fused import decode_calls
from nsa.fused.constraints import in_place_limit
from nsa.fused.decode_inputs import (
    NO_REFERENCE,
    TILE_KEYS,
    DecodeShape,
    Parts,
    Pool,
    Schedule,
)
from nsa.fused.decoding import choose_splits, most_tokens
from nsa.fused.selected_branch import selected_attention
from nsa.precision import accumulation_dtype


@torch.compiler.disable(reason="kernels of decoding are not custom ops, and copies need lengths")
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
    in_place = in_place_limit(q, pages, block_size, boundaries) is None
    attend = _attend_in_place if in_place else partial(attend_copied, selected_attention)
    return attend(
        q, pages, block_indices, boundaries, block_size=block_size, causal=causal, scale=scale
    )


def _attend_in_place(
    q: Tensor,
    pages: PagedKeys,
    block_indices: Tensor,
    boundaries: Boundaries | None,
    *,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A kernel as of decoding; it reads what is listed, and nothing on the host."""
    rows, lists = q.flatten(0, -3), block_indices.flatten(0, -3)
    batch, kv_heads, dims = pages.table.shape[0], pages.k.shape[2], (q.shape[-1], pages.v.shape[-1])
    tokens, group = most_tokens(q, boundaries), q.shape[-2] // kv_heads
    if not q.numel() or not tokens:
        out = q.new_zeros(*q.shape[:-1], dims[1])
        lse = q.new_full(q.shape[:-1], -math.inf, dtype=accumulation_dtype(q.dtype))
        return out, lse.transpose(-1, -2)
    cu_seqlens = None if boundaries is None else boundaries.cu_seqlens
    # The kernel trusts both. Without causality each query stands at the end.
    ends = pages.lengths.clamp(max=pages.max_length)
    new = tokens if cu_seqlens is None else cu_seqlens.diff()
    starts = ends - (new if causal else 1)
    tiles = -(-lists.shape[-1] * block_size // TILE_KEYS)
    splits = choose_splits(tiles, rows.shape[0] * kv_heads, group, dims, q.device)
    with torch.cuda.device_of(q):
        parts = decode_calls.decode_attend(
            rows, Pool(pages.k, pages.v), pages.table.contiguous(),
            Schedule(starts, ends, ends.new_empty(0)), cu_seqlens, lists,
            DecodeShape(batch, tokens, kv_heads, group, 1), block_size, scale, splits,
        )  # fmt: skip
    out, lse = _combine(parts, rows.shape[0], kv_heads, splits)
    return out.to(q.dtype).unflatten(0, q.shape[:-2]), lse.unflatten(0, q.shape[:-2]).transpose(
        -1, -2
    )


def _combine(parts: Parts, tokens: int, kv_heads: int, splits: int) -> tuple[Tensor, Tensor]:
    """The output ``(T, H, Dv)`` and log-sum-exp ``(T, H)`` of the selected branch's parts."""
    out, reference, total = (x.view(tokens, kv_heads, splits, *x.shape[1:]) for x in parts)
    seen = reference != NO_REFERENCE
    largest = reference.amax(2)
    weight = torch.exp2((reference - largest[:, :, None]).to(total.dtype)).where(seen, 0)
    total = (total * weight).sum(2)
    # Outputs of parts without keys are not written.
    out = (out.where(seen[..., None], 0) * weight[..., None]).sum(2)
    some = total > 0
    out = out / total.where(some, 1)[..., None]
    lse = ((total.log2() + largest) * math.log(2)).where(some, -math.inf)
    return out.flatten(1, 2), lse.flatten(1, 2)
