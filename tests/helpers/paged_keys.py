"""Keys and values of a problem in the pages of a server, and poison in all other places."""

from typing import Any

import torch
from torch import Tensor

from tests.helpers.selected_cases import SelectedProblem


def in_pages(problem: SelectedProblem, page_size: int, by_heads: bool = False) -> dict[str, Any]:
    """Arguments ``k``, ``v``, ``page_table`` and ``seqused_k`` for a problem.

    Pages are in random order. Rows without a token are NaN, and table entries without any are
    out of range. With ``by_heads`` pools are ``(pages, H_kv, page_size, D)`` in memory.
    """
    lengths = [keys for _, keys in problem.lengths]
    device = problem.k.device
    max_pages = max(1, -(-max(lengths) // page_size)) + 1
    num_pages = len(lengths) * max_pages + 2
    order = torch.randperm(num_pages)
    table = torch.full((len(lengths), max_pages), num_pages, dtype=torch.int32)
    table[:, ::2] = -1
    pools = []
    for x in (problem.k, problem.v):
        shape = [num_pages, page_size, *x.shape[-2:]]
        if by_heads:
            shape[1], shape[2] = shape[2], shape[1]
        pool = torch.full(shape, torch.nan, dtype=x.dtype, device=device)
        pools.append(pool.transpose(1, 2) if by_heads else pool)
    sequences = [x.detach() for x in (problem.k, problem.v)]
    parts = [x.split(lengths) if x.ndim == 3 else x.unbind() for x in sequences]
    used = 0
    for sequence, length in enumerate(lengths):
        for first in range(0, length, page_size):
            page = int(order[used])
            table[sequence, first // page_size] = page
            used += 1
            for pool, rows in zip(pools, parts, strict=True):
                new = rows[sequence][first : first + page_size]
                pool[page, : len(new)] = new
    seqused = torch.tensor(lengths, dtype=torch.int32, device=device)
    return dict(k=pools[0], v=pools[1], page_table=table.to(device), seqused_k=seqused)


def attend_pages(problem: SelectedProblem, pages: dict[str, Any], **changes) -> tuple[Tensor, ...]:
    """:meth:`SelectedProblem.attend` with keys and values in pages."""
    bounds = problem.boundaries()
    bounds.pop("cu_seqlens_k", None)
    problem = problem._replace(q=problem.q.detach(), k=pages["k"], v=pages["v"])
    rest = {name: x for name, x in pages.items() if name not in ("k", "v")}
    # attend() adds no boundaries where they are given.
    return problem.attend(**(dict(cu_seqlens=None) | bounds | rest | changes))
