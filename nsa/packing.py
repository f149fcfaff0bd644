"""Boundaries of packed sequences: a bare tensor, or a Packing that is read once."""

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from nsa.host import has_readable_values, is_capturing, may_keep

MAX_KEPT = 16
"""Results that a Packing keeps. Few, because index tensors are as long as the sequences."""

_MAX_INT32 = 2**31 - 1
_Kept = TypeVar("_Kept")


class Packing:
    """Boundaries of packed sequences, read and checked once.

    Pass it as ``cu_seqlens`` to every layer and step with the same boundaries. Results that follow
    from the boundaries are computed at first use and kept here: about 100 bytes a token on a GPU
    for each configuration, and at most 16 of them. A bare tensor gives equal results, but each call
    reads it and plans again. If activation checkpointing repeats a forward, a bare tensor must
    still have its values; a Packing always has.

    A Packing copies the boundaries, so later writes to ``cu_seqlens`` do not change it. Make it
    outside of CUDA graph capture, and keep it alive as long as a graph captured with it.

    Args:
        cu_seqlens: int32 ``(S + 1,)`` boundaries, from 0 to the number of tokens ``T``; sequences
            may have any length, 0 and 1 included.
        max_seqlen: an upper bound on the lengths, in tokens; by default the longest length.

    Attributes:
        cu_seqlens: the copy, on the device of the argument. Do not write to it.
        max_seqlen: the upper bound; None if values cannot be read (torch.compile, fake tensors).
        lengths: tokens of each sequence, a list; None in the same cases.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    def __init__(self, cu_seqlens: Tensor, *, max_seqlen: int | None = None):
        _check_tensor(cu_seqlens)
        check_max_seqlen(max_seqlen)
        if is_capturing(cu_seqlens):
            raise ValueError("a Packing must be made before, not while a CUDA graph is captured")
        # A tensor made in inference mode cannot be saved for backward.
        with torch.inference_mode(False):
            self.cu_seqlens = cu_seqlens.detach().clone()
        self.lengths = None
        self.max_seqlen = max_seqlen
        self._kept: dict = {}
        if has_readable_values(cu_seqlens):
            self.lengths = read_lengths(self.cu_seqlens)
            _check_longest(max_seqlen, self.lengths)
            if max_seqlen is None:
                self.max_seqlen = max(self.lengths, default=0)
            _by_address[_address(self.cu_seqlens)] = self

    def keep(self, key: Hashable, make: Callable[[], _Kept]) -> _Kept:
        """The result of ``make()``, which depends on the boundaries and ``key`` only; kept.

        It is not kept where :func:`nsa.host.may_keep` forbids it, such as in CUDA graph capture. It
        must not refer to this Packing, so that both are freed together.
        """
        if not may_keep(self.cu_seqlens):
            return make()
        if key not in self._kept:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            with torch.inference_mode(False):
                self._kept[key] = make()
        return self._kept[key]

    def __reduce__(self):
        return _make_packing, (self.cu_seqlens, self.max_seqlen)

    def __repr__(self) -> str:
        if self.lengths is None:
            return f"Packing(sequences={self.cu_seqlens.shape[0] - 1})"
        sequences, tokens = len(self.lengths), sum(self.lengths)
        return f"Packing(sequences={sequences}, tokens={tokens}, max_seqlen={self.max_seqlen})"


def _make_packing(cu_seqlens: Tensor, max_seqlen: int | None) -> Packing:
    return Packing(cu_seqlens, max_seqlen=max_seqlen)


# Custom ops take tensors only, so they find a Packing by its address, unique while it lives.
_by_address: WeakValueDictionary = WeakValueDictionary()


def find_packing(cu_seqlens: Tensor) -> Packing | None:
    """The Packing whose ``cu_seqlens`` this tensor is or aliases; None for any other tensor."""
    packing = _by_address.get(_address(cu_seqlens))
    if packing is None:
        return None
    own = packing.cu_seqlens
    same = own.shape == cu_seqlens.shape and own.stride() == cu_seqlens.stride()
    return packing if same else None


def _address(x: Tensor) -> tuple[torch.device, int]:
    return x.device, x.data_ptr()


class Boundaries(NamedTuple):
    """What a call knows of its packed sequences.

    Attributes:
        cu_seqlens: int32 ``(S + 1,)``.
        lengths: tokens of each sequence; None if they were not read.
        max_seqlen: an upper bound on the lengths; None if it was neither given nor read.
        packing: the caller's Packing, or None for a bare tensor.
    """

    cu_seqlens: Tensor
    lengths: list[int] | None
    max_seqlen: int | None
    packing: Packing | None

    def keep(self, key: Hashable, make: Callable[[], _Kept]) -> _Kept:
        """:meth:`Packing.keep`. Nothing is kept for a bare tensor."""
        return make() if self.packing is None else self.packing.keep(key, make)


def check_boundaries(cu_seqlens, max_seqlen, x: Tensor) -> Boundaries | None:
    """Check the boundaries of packed ``x (T, ...)``; None for batched input, which has none.

    A bare tensor's values are read on a CPU, and on a GPU if ``max_seqlen`` is not given; never
    while torch.compile traces or a CUDA graph is captured. Nothing about it is kept.
    """
    check_max_seqlen(max_seqlen)
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen must be None without cu_seqlens, got {max_seqlen}")
        return None
    packing = None
    if isinstance(cu_seqlens, Packing):
        packing, cu_seqlens = cu_seqlens, cu_seqlens.cu_seqlens
    else:
        _check_tensor(cu_seqlens)
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens must be on the device of q, {x.device}, got {cu_seqlens.device}"
        )
    if torch.compiler.is_compiling():
        # Lengths are not read, because torch.compile would guard their values.
        if packing is not None:
            max_seqlen = packing.max_seqlen
        if max_seqlen is not None:
            max_seqlen = min(max_seqlen, _MAX_INT32)
        return Boundaries(cu_seqlens, None, max_seqlen, packing)
    lengths = _lengths(cu_seqlens, packing, max_seqlen)
    if lengths is None:
        if max_seqlen is None and is_capturing(cu_seqlens):
            raise ValueError("max_seqlen must be an int while a CUDA graph is captured, got None")
        if max_seqlen is not None:
            max_seqlen = min(max_seqlen, x.shape[0])
        return Boundaries(cu_seqlens, None, max_seqlen, packing)
    if sum(lengths) != x.shape[0]:
        raise ValueError(f"cu_seqlens must end at the {x.shape[0]} tokens of q, got {sum(lengths)}")
    _check_longest(max_seqlen, lengths)
    if packing is not None:
        # All calls use one bound, so that they share what was computed.
        max_seqlen = packing.max_seqlen
    elif max_seqlen is None:
        max_seqlen = max(lengths, default=0)
    return Boundaries(cu_seqlens, lengths, min(max_seqlen, x.shape[0]), packing)


def _lengths(
    cu_seqlens: Tensor, packing: Packing | None, max_seqlen: int | None
) -> list[int] | None:
    """The lengths if they are known or may be read, else None."""
    if packing is not None:
        return packing.lengths
    if not has_readable_values(cu_seqlens):
        return None
    waits = cu_seqlens.device.type != "cpu"
    return None if waits and max_seqlen is not None else read_lengths(cu_seqlens)


def check_max_seqlen(max_seqlen):
    """Check that ``max_seqlen`` is None or an int of at least 0."""
    if max_seqlen is None or isinstance(max_seqlen, torch.SymInt):
        return
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int):
        raise TypeError(f"max_seqlen must be an int, got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}")


def read_lengths(cu_seqlens: Tensor) -> list[int]:
    """The lengths between valid boundaries, read on the host."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    for at, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, got {start} then {end} at entry {at}")
    return [end - start for start, end in pairwise(bounds)]


def _check_tensor(cu_seqlens):
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"cu_seqlens must be an int32 tensor, got {type(cu_seqlens).__name__}; or a Packing"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")


def _check_longest(max_seqlen: int | None, lengths: list[int]):
    longest = max(lengths, default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence, {longest}, got {max_seqlen}"
        )
