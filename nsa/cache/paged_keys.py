"""Keys and values in the pages of a server, for calls that only read them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.boundaries import Boundaries
from nsa.cache.argument_checks import check_table
from nsa.cache.context import segments_of
from nsa.cache.places import page_places
from nsa.config import NSAConfig
from nsa.host import has_readable_values, needs_gradients
from nsa.segments import locate_items
from nsa.validation import Problem, check_qkv, check_tensor


class PagedKeys(NamedTuple):
    """Keys and values of sequences, in pages.

    Attributes:
        k, v: ``(pages, page_size, H_kv, D)`` and ``(pages, page_size, H_kv, Dv)``, any strides.
        table: int32 ``(B, max_pages)``: token ``p`` of sequence ``b`` lies in page
            ``table[b, p // page_size]`` at slot ``p % page_size``.
        lengths: int32 ``(B,)``, tokens of each sequence.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor

    @property
    def max_length(self) -> int:
        """Tokens of a sequence for which the table has pages."""
        return self.table.shape[1] * self.k.shape[1]

    def copied(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys ``(Tk, H_kv, D)`` and values of one sequence after another, and boundaries.

        Each is read and written once. The host reads the lengths.
        """
        tokens = segments_of(self.lengths.long())
        pages, page_size = self.k.shape[:2]
        places = page_places(self.table, tokens.owner, tokens.local, page_size, pages)
        return places.read(self.k), places.read(self.v), tokens.offset.int()


def check_paged_qkv(q, pages: PagedKeys, config: NSAConfig, cu_seqlens) -> Problem:
    """Check queries, pools, table and lengths, but for the values of the latter two."""
    # As if the queries were the keys: checks q alone.
    problem = check_qkv(q, (q, q, q), None, config, cu_seqlens)
    for name, x, dim in (("k", pages.k, problem.head_dim), ("v", pages.v, None)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4 or 0 in x.shape or problem.num_heads % x.shape[2]:
            raise ValueError(
                f"{name} must have shape (pages, page_size, H_kv, channels) with page_table, with "
                f"sizes of at least 1 and an H_kv that divides the {problem.num_heads} heads of q, "
                f"got {tuple(x.shape)}"
            )
        channels = x.shape[3] if dim is None else dim
        check_tensor(name, x, q, (*pages.k.shape[:3], channels))
    check_table(pages.table, pages.lengths, pages.k.device, "seqused_k")
    sequences = q.shape[0] if q.ndim == 4 else None
    if sequences is not None and pages.table.shape[0] != sequences:
        raise ValueError(
            f"page_table must have a row for each of the {sequences} sequences of q, got "
            f"{pages.table.shape[0]}"
        )
    if needs_gradients(q, pages.k, pages.v):
        raise ValueError(
            "q, k and v must not require gradients with page_table, which has none; use "
            "torch.no_grad()"
        )
    return problem._replace(num_kv_heads=pages.k.shape[2], value_dim=pages.v.shape[3])


def check_used_pages(q: Tensor, pages: PagedKeys, boundaries: Boundaries | None):
    """Check lengths, and the pages that they need; the host waits for them where it can read."""
    sequences = pages.table.shape[0]
    if boundaries is not None and boundaries.cu_seqlens.shape[0] != sequences + 1:
        raise ValueError(
            f"page_table must have a row for each of the {boundaries.cu_seqlens.shape[0] - 1} "
            f"sequences of cu_seqlens, got {sequences}"
        )
    if not has_readable_values(pages.table):
        return
    new = _queries(q, boundaries)
    short = (pages.lengths < new) | (pages.lengths > pages.max_length)
    first = torch.arange(pages.table.shape[1], device=q.device) * pages.k.shape[1]
    lost = (pages.table < 0) | (pages.table >= pages.k.shape[0])
    lost &= first < pages.lengths[:, None]
    if not bool(short.any() | lost.any()):
        return
    if short.any():
        at = int(short.nonzero()[0, 0])
        queries = int(new if isinstance(new, int) else new[at])
        raise ValueError(
            f"seqused_k must be at least the queries of a sequence, {queries}, and at most the "
            f"tokens of its pages, {pages.max_length}; got {int(pages.lengths[at])} for sequence "
            f"{at}"
        )
    sequence, index = lost.nonzero()[0].tolist()
    raise ValueError(
        f"page_table must name one of the {pages.k.shape[0]} pages for each token that seqused_k "
        f"counts, got {int(pages.table[sequence, index])} for page {index} of sequence {sequence}"
    )


def blocks_of_rows(
    q: Tensor, pages: PagedKeys, boundaries: Boundaries | None, config: NSAConfig
) -> tuple[Tensor, int]:
    """Blocks that each row of ``block_indices`` may name, on the device, and the most of all."""
    count = num_selection_blocks(pages.lengths, config)
    if boundaries is None:
        count = count.view(-1, 1, 1, 1)
    else:
        owner, _ = locate_items(boundaries.cu_seqlens.long(), q.shape[0])
        count = count[owner][:, None, None]
    return count, num_selection_blocks(pages.max_length, config)


def _queries(q: Tensor, boundaries: Boundaries | None) -> int | Tensor:
    """Queries of each sequence."""
    return q.shape[1] if boundaries is None else boundaries.cu_seqlens.diff()


def attend_copied(
    attend: Callable[..., Any],
    q: Tensor,
    pages: PagedKeys,
    block_indices: Tensor,
    boundaries: Boundaries | None,
    **options,
) -> tuple[Tensor, Tensor]:
    """A backend's selected branch on a copy of the keys and values.

    Args:
        attend: takes packed queries, keys, values and lists, ``boundaries`` and ``options``.

    Returns:
        The output ``(B, Nq, H, Dv)`` or ``(T, H, Dv)``, the log-sum-exp ``(B, H, Nq)`` or
        ``(H, T)``.
    """
    k, v, cu_seqlens_k = pages.copied()
    rows, lists = (x.flatten(0, -3) for x in (q, block_indices))
    if boundaries is None:
        step = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        cu_seqlens = step * q.shape[1]
    else:
        cu_seqlens = boundaries.cu_seqlens
    lengths, lengths_k = (x.diff().tolist() for x in (cu_seqlens, cu_seqlens_k))
    bounds = Boundaries(
        cu_seqlens, lengths, max(lengths), None, cu_seqlens_k, lengths_k, max(lengths_k)
    )
    out, lse = attend(rows, k, v, lists, boundaries=bounds, return_lse=True, **options)
    if q.ndim == 4:
        shape = q.shape[:2]
        return out.unflatten(0, shape), lse.unflatten(-1, shape).transpose(0, 1)
    return out, lse
