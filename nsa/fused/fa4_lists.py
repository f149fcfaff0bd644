"""Calls of FlashAttention-4 with block lists: the lists and limits as its kernels take them."""

from functools import lru_cache

import torch
from torch import Tensor

from nsa.fused.fa4_call import Call
from nsa.fused.fa4_variants import Mask
from nsa.fused.kernel_inputs import BlockLists
from nsa.host import may_keep


def sparse_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    causal: bool,
    key_limit: Tensor | None,
) -> Call:
    """A call with lists, whose arguments are those of :func:`nsa.fused.fa4.sparse_forward`."""
    if causal and key_limit is not None:
        # FA4 would obey only the limit in forward, and only the causal flag in backward.
        raise ValueError("causal and key_limit exclude each other")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"causal needs no more queries than keys, got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if key_limit is not None:
        # The kernels read the limit of every row of a tile, even past the last query.
        padding = -q.shape[1] % lists.query_block
        if padding:
            key_limit = torch.nn.functional.pad(key_limit, (0, padding))
    return Call(
        q,
        k,
        v,
        scale,
        mask=Mask(causal=causal, limited=key_limit is not None),
        lists=_list_tensors(lists),
        blocks=(lists.query_block, lists.key_block),
        limit=key_limit,
    )


def _list_tensors(lists: BlockLists) -> tuple[Tensor, ...]:
    """Count and index of the partial blocks, then of the full ones, as FA4 takes them."""
    full_count, full_index = lists.full_count, lists.full_index
    if full_count is None or full_index is None:
        # SM90's forward reads the second list even if it is None.
        full_count, full_index = _zero_count(lists.partial_count), lists.partial_index
    tensors = (lists.partial_count, lists.partial_index, full_count, full_index)
    return tuple(map(_unit_stride, tensors))


def _zero_count(count: Tensor) -> Tensor:
    if not may_keep(count):
        return torch.zeros_like(count)
    return _zeros(count.shape, count.device)


@lru_cache(maxsize=8)
def _zeros(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _unit_stride(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dimension, which torch does not ensure if the size is 1."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
