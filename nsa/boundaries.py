"""What a call knows of its packed sequences: the boundaries, checked, and their lengths."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.host import has_readable_values, is_capturing
from nsa.packing import (
    Kept,
    Packing,
    check_bound_tensors,
    check_bounds_given,
    checked_bound,
    find_packing,
    read_both,
    waits_to_read,
)

_MAX_INT32 = 2**31 - 1


class Boundaries(NamedTuple):
    """What a call knows of its packed sequences.

    Attributes:
        cu_seqlens: boundaries of the queries, int32 ``(S + 1,)``.
        lengths: queries of each sequence; None if they were not read.
        max_seqlen: an upper bound on the lengths; None if it was neither given nor read.
        packing: the caller's Packing, or None for bare tensors.
        cu_seqlens_k, lengths_k, max_seqlen_k: the same for the keys. ``cu_seqlens_k`` is
            ``cu_seqlens`` itself if queries and keys are known to have the same boundaries.
    """

    cu_seqlens: Tensor
    lengths: list[int] | None
    max_seqlen: int | None
    packing: Packing | None
    cu_seqlens_k: Tensor
    lengths_k: list[int] | None
    max_seqlen_k: int | None

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """:meth:`Packing.keep`. Nothing is kept for a bare tensor."""
        return make() if self.packing is None else self.packing.keep(key, make)


def has_key_boundaries(cu_seqlens, cu_seqlens_k) -> bool:
    """Whether packed keys may have other boundaries than the queries."""
    if isinstance(cu_seqlens, Packing):
        # The rounded Packing, because torch.compile guards on its sizes.
        rounded = cu_seqlens.rounded
        return rounded.cu_seqlens_k is not rounded.cu_seqlens
    return cu_seqlens_k is not None


def check_boundaries(
    cu_seqlens, max_seqlen, q: Tensor, k: Tensor, cu_seqlens_k=None, max_seqlen_k=None
) -> Boundaries | None:
    """Check the boundaries of packed ``q`` and ``k (T, ...)``; None for batched input without any.

    Bare tensors are read on a CPU, and on a GPU unless an upper bound is given for each; never
    while torch.compile traces or a CUDA graph is captured. Nothing about them is kept.
    """
    if cu_seqlens is None:
        others = (max_seqlen, cu_seqlens_k, max_seqlen_k)
        names = ("max_seqlen", "cu_seqlens_k", "max_seqlen_k")
        for name, value in zip(names, others, strict=True):
            if value is not None:
                raise ValueError(f"{name} must be None without cu_seqlens, got {value}")
        return None
    packing = None
    if isinstance(cu_seqlens, Packing):
        if cu_seqlens_k is not None:
            raise ValueError(
                "cu_seqlens_k must be None with a Packing as cu_seqlens, which has the boundaries "
                f"of the keys, got {type(cu_seqlens_k).__name__}"
            )
        # Compiled calls read no lengths, and share recordings by rounded sizes.
        packing = cu_seqlens.rounded if torch.compiler.is_compiling() else cu_seqlens
        cu_seqlens, cu_seqlens_k = packing.cu_seqlens, packing.cu_seqlens_k
    else:
        check_bound_tensors(cu_seqlens, cu_seqlens_k, "; or a Packing")
    check_bounds_given(max_seqlen, max_seqlen_k, cu_seqlens_k)
    if packing is None and cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {bounds.device}")
    found = Boundaries(cu_seqlens, None, max_seqlen, packing, cu_seqlens_k, None, max_seqlen_k)
    if torch.compiler.is_compiling():
        # Lengths are not read, because torch.compile would guard their values.
        if packing is not None:
            found = _with_bounds(found, packing.max_seqlen, packing.max_seqlen_k)
        return _limited(found, _MAX_INT32, _MAX_INT32)
    lengths, lengths_k = _lengths(found)
    if lengths is None or lengths_k is None:
        for name, bound in (("max_seqlen", max_seqlen), ("max_seqlen_k", found.max_seqlen_k)):
            if bound is None and is_capturing(cu_seqlens):
                raise ValueError(f"{name} must be an int while a CUDA graph is captured, got None")
        return _limited(found, q.shape[0], k.shape[0])
    _check_end("cu_seqlens", lengths, "q", q)
    _check_end("cu_seqlens_k", lengths_k, "k", k)
    max_seqlen = checked_bound("max_seqlen", max_seqlen, lengths)
    max_seqlen_k = checked_bound("max_seqlen_k", max_seqlen_k, lengths_k)
    if packing is not None:
        # All calls use one bound, so that they share what was computed.
        max_seqlen, max_seqlen_k = packing.max_seqlen, packing.max_seqlen_k
    elif lengths == lengths_k:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    found = Boundaries(
        cu_seqlens, lengths, max_seqlen, packing, cu_seqlens_k, lengths_k, max_seqlen_k
    )
    return _limited(found, q.shape[0], k.shape[0])


def _with_bounds(found: Boundaries, max_seqlen: int | None, max_seqlen_k: int | None) -> Boundaries:
    # TorchDynamo of PyTorch 2.11 cannot carry what `_replace` gives across a graph break.
    cu_seqlens, lengths, _, packing, cu_seqlens_k, lengths_k, _ = found
    return Boundaries(
        cu_seqlens, lengths, max_seqlen, packing, cu_seqlens_k, lengths_k, max_seqlen_k
    )


def _limited(found: Boundaries, most: int, most_k: int) -> Boundaries:
    """``found`` with bounds of at most ``most`` queries and ``most_k`` keys a sequence."""
    bounds = ((found.max_seqlen, most), (found.max_seqlen_k, most_k))
    return _with_bounds(found, *(None if x is None else min(x, limit) for x, limit in bounds))


def _lengths(found: Boundaries) -> tuple[list[int] | None, list[int] | None]:
    """The lengths of queries and keys if they are known or may be read, else None for both."""
    if found.packing is not None:
        return found.packing.lengths, found.packing.lengths_k
    bounded = found.max_seqlen is not None and found.max_seqlen_k is not None
    if not has_readable_values(found.cu_seqlens) or (bounded and waits_to_read(found.cu_seqlens)):
        return None, None
    return read_both(found.cu_seqlens, found.cu_seqlens_k)


def _check_end(name: str, lengths: list[int], of: str, x: Tensor):
    if sum(lengths) != x.shape[0]:
        raise ValueError(f"{name} must end at the {x.shape[0]} tokens of {of}, got {sum(lengths)}")


def boundaries_of(
    cu_seqlens: Tensor | None,
    max_seqlen_k: int | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Boundaries | None:
    """Boundaries of which a custom op gets the tensors; None for a batch.

    ``cu_seqlens_k`` is None if the keys have the boundaries of the queries.
    """
    if cu_seqlens is None:
        return None
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return Boundaries(cu_seqlens, None, None, None, cu_seqlens_k, None, max_seqlen_k)


def with_packing(boundaries: Boundaries | None) -> Boundaries | None:
    """``boundaries`` with the :class:`Packing` that owns their tensors, if there is one."""
    if boundaries is None:
        return None
    packing = find_packing(boundaries.cu_seqlens, boundaries.cu_seqlens_k)
    return boundaries._replace(packing=packing)
