"""What a step of decoding finds: odd lengths, pages in any order, and poison elsewhere."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.fused.decode_inputs import DecodeRule, DecodeShape, Pool


class Form(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int
    rule: DecodeRule


class State(NamedTuple):
    """Pools, page table and lengths before a step, and the tokens of the step."""

    pool: Pool
    compressed: Pool
    table: Tensor
    lengths: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None
    shape: DecodeShape
    max_length: int

    def to(self, device: str) -> "State":
        """A copy of all tensors on a device."""

        def copy(x):
            if isinstance(x, Pool):
                return Pool(*(y.to(device, copy=True) for y in x))
            return x.to(device, copy=True) if isinstance(x, Tensor) else x

        return State(*map(copy, self))


def make_state(
    form: Form, lengths: list[int], new: list[int] | int, kv_heads: int = 2, ctas: int = 20,
    page_blocks: int = 2,
) -> State:  # fmt: skip
    """A state on the CPU. A list of new tokens gives packed tokens.

    A page has ``page_blocks`` selection blocks.
    Rows that hold no token, and compressed rows that hold no block, are NaN.
    """
    rule, batch = form.rule, len(lengths)
    page_size = page_blocks * rule.select_size
    counts = [new] * batch if isinstance(new, int) else new
    ends = [a + b for a, b in zip(lengths, counts, strict=True)]
    max_pages = max(ends) // page_size + 2
    num_pages = batch * max_pages + 3
    table = torch.full((batch, max_pages), -1, dtype=torch.int32)
    free = torch.randperm(num_pages).tolist()
    slots = page_size // rule.stride

    def pages(rows: int, dim: int) -> Tensor:
        # Apart from each other, as a server may have them.
        wide = torch.full((num_pages, rows + 1, kv_heads, dim), torch.nan, dtype=form.dtype)
        return wide[:, 1:]

    pool = Pool(pages(page_size, form.head_dim), pages(page_size, form.value_dim))
    compressed = Pool(pages(slots, form.head_dim), pages(slots, form.value_dim))
    for sequence, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        for index in range(-(-end // page_size)):
            table[sequence, index] = free.pop()
        for position in range(length):
            page, row = table[sequence, position // page_size], position % page_size
            for store in pool:
                store[page, row] = torch.randn(store.shape[2:])
        for slot in range(rule.carried, length // rule.stride):
            page, row = table[sequence, slot // slots], slot % slots
            for store in compressed:
                store[page, row] = torch.randn(store.shape[2:])
    total, heads = sum(counts), kv_heads * form.group

    def rows(count: int, dim: int) -> Tensor:
        return torch.randn(total, count, dim).to(form.dtype)

    cu_seqlens = None
    if not isinstance(new, int):
        cu_seqlens = torch.tensor([0, *new]).cumsum(0).int()
    return State(
        pool,
        compressed,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        rows(heads, form.head_dim),
        rows(kv_heads, form.head_dim),
        rows(kv_heads, form.value_dim),
        cu_seqlens,
        DecodeShape(batch, max(counts), kv_heads, form.group, ctas),
        max_pages * page_size,
    )
