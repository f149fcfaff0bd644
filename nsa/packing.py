"""Boundaries of packed sequences: a bare tensor, or a Packing that is read once."""

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from nsa.host import has_readable_values, is_capturing_on, may_keep, refuse_recording

MAX_KEPT = 16
"""Results that a Packing keeps. Few, because index tensors are as long as the sequences."""

Kept = TypeVar("Kept")

_MISSING: Any = object()


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
        cu_seqlens: int32 ``(S + 1,)`` boundaries of the queries, from 0 to the number of queries
            ``T``; sequences may have any length, 0 and 1 included.
        cu_seqlens_k: int32 ``(S + 1,)`` boundaries of the keys, where sequences may have more keys
            than queries; by default ``cu_seqlens``. The queries of a sequence are its last tokens.
        max_seqlen: an upper bound on the queries of a sequence; by default the largest number.
        max_seqlen_k: an upper bound on the keys of a sequence; by default the largest number. Only
            with ``cu_seqlens_k``; otherwise ``max_seqlen`` holds for both.
        device: where the copies are to be; by default where the arguments are. From arguments on
            the CPU, as a data loader has them, the host reads them without waiting for the GPU.

    Attributes:
        cu_seqlens, cu_seqlens_k: the copies. Do not write to them.
            They are one tensor if each sequence has as many queries as keys, as far as was read.
        max_seqlen, max_seqlen_k: the upper bounds; None if values cannot be read (torch.compile,
            fake tensors).
        lengths, lengths_k: queries and keys of each sequence, lists; None in the same cases.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen: int | None = None,
        max_seqlen_k: int | None = None,
        *,
        device: torch.device | str | int | None = None,
    ):
        check_bound_tensors(cu_seqlens, cu_seqlens_k)
        check_bounds_given(max_seqlen, max_seqlen_k, cu_seqlens_k)
        target = cu_seqlens.device if device is None else checked_device(device)
        if is_capturing_on(cu_seqlens.device) or is_capturing_on(target):
            raise ValueError("a Packing must be made before, not while a CUDA graph is captured")
        # A tensor made in inference mode cannot be saved for backward.
        with torch.inference_mode(False):
            self.cu_seqlens = self.cu_seqlens_k = _copy(cu_seqlens, target)
            if cu_seqlens_k is not None:
                self.cu_seqlens_k = _copy(cu_seqlens_k, target)
        self.lengths: list[int] | None = None
        self.lengths_k: list[int] | None = None
        self.max_seqlen = max_seqlen
        self.max_seqlen_k = max_seqlen if cu_seqlens_k is None else max_seqlen_k
        self._kept: dict = {}
        self._rounded: Packing | None = None
        if has_readable_values(cu_seqlens):
            # Before the host waits for a GPU, which else would wait for the host.
            longer = _with_empty_sequences(self.cu_seqlens)
            keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
            self._set_lengths(*read_both(cu_seqlens, keys))
            self._rounded = self._round(longer)
            _know(self)

    def _set_lengths(self, lengths: list[int], lengths_k: list[int]):
        self.lengths, self.lengths_k = lengths, lengths_k
        self.max_seqlen = checked_bound("max_seqlen", self.max_seqlen, lengths)
        self.max_seqlen_k = checked_bound("max_seqlen_k", self.max_seqlen_k, lengths_k)
        if lengths == lengths_k:
            self.cu_seqlens_k, self.max_seqlen_k = self.cu_seqlens, self.max_seqlen

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """The result of ``make()``, which depends on the boundaries and ``key`` only; kept.

        It is not kept where :func:`nsa.host.may_keep` forbids it, such as in CUDA graph capture. It
        must not refer to this Packing, so that both are freed together.
        """
        if not may_keep(self.cu_seqlens):
            return make()
        found = self._kept.get(key, _MISSING)
        if found is _MISSING:
            with torch.inference_mode(False):
                found = make()
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            # Not read again: another thread may clear it.
            self._kept[key] = found
        return found

    @property
    def rounded(self) -> "Packing":
        """The same sequences with sizes rounded up, so that calls with other boundaries share
        recordings and compiled code: their number and ``max_seqlen`` become powers of two, with
        empty sequences at the end. This Packing itself if it has no sequences, keys of their own,
        or was not read.
        """
        return self if self._rounded is None else self._rounded

    @property
    def bounds(self) -> list[Tensor]:
        """The boundaries, and those of the keys if they may be others."""
        if self.cu_seqlens_k is self.cu_seqlens:
            return [self.cu_seqlens]
        return [self.cu_seqlens, self.cu_seqlens_k]

    def unread(self, tokens: int) -> "Packing | None":
        """:attr:`rounded`, for calls that do not read its boundaries.

        None where calls would read them, if there are no such boundaries, and if there are not
        ``tokens`` in all.
        """
        rounded = self._rounded
        if (
            rounded is None
            or not waits_to_read(self.cu_seqlens)
            or sum(self.lengths or ()) != tokens
        ):
            return None
        return rounded

    def _round(self, longer: Tensor) -> "Packing | None":
        if not self.lengths or self.cu_seqlens_k is not self.cu_seqlens:
            return None
        # Nothing is read again, so the constructor does not run.
        other = object.__new__(Packing)
        other.cu_seqlens = other.cu_seqlens_k = longer
        missing = longer.shape[0] - 1 - len(self.lengths)
        other.lengths = other.lengths_k = self.lengths + [0] * missing
        # Of the bound, by which calls step by step choose their kernels.
        most = power_of_two(self.max_seqlen or 0)
        other.max_seqlen = other.max_seqlen_k = min(sum(self.lengths), most)
        other._kept, other._rounded = {}, None
        _know(other)
        return other

    def __reduce__(self):
        bounds = (self.cu_seqlens, self.max_seqlen)
        if self.cu_seqlens_k is self.cu_seqlens:
            return _make_packing, (*bounds, None, None)
        return _make_packing, (*bounds, self.cu_seqlens_k, self.max_seqlen_k)

    def __repr__(self) -> str:
        if self.lengths is None or self.lengths_k is None:
            return f"Packing(sequences={self.cu_seqlens.shape[0] - 1})"
        sequences, tokens = len(self.lengths), sum(self.lengths)
        text = f"sequences={sequences}, tokens={tokens}, max_seqlen={self.max_seqlen}"
        if self.cu_seqlens_k is not self.cu_seqlens:
            text += f", keys={sum(self.lengths_k)}, max_seqlen_k={self.max_seqlen_k}"
        return f"Packing({text})"


def checked_device(device: Any) -> torch.device:
    """A device by its name or number, on which tensors can be."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        text = f"device must be a torch.device or its name, got {device!r}"
        if type(device) is int:
            text += f": {error}"
        raise ValueError(text) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is there, got {device!r} and no GPU was found")
    return found


def _copy(x: Tensor, device: torch.device) -> Tensor:
    """A copy on a device. If that is a GPU, the host does not wait for it."""
    x = x.detach()
    if x.is_cpu and device.type == "cuda":
        # The GPU reads it later, also if the caller has pinned memory and writes to it before.
        return x.clone().pin_memory().to(device, non_blocking=True)
    # "cuda" is the device "cuda:0" too, of which nothing is copied without being asked for.
    return x.to(device, copy=True)


def _with_empty_sequences(cu_seqlens: Tensor) -> Tensor:
    """A copy of boundaries, with empty sequences at the end up to a power of two in all."""
    count = cu_seqlens.shape[0] - 1
    # A tensor made in inference mode cannot be saved for backward.
    with torch.inference_mode(False):
        return torch.cat((cu_seqlens, cu_seqlens[-1:].expand(power_of_two(count) - count)))


def power_of_two(number: int) -> int:
    """The next one, from ``number`` on."""
    return 1 << max(0, number - 1).bit_length()


def _make_packing(
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
) -> Packing:
    return Packing(cu_seqlens, cu_seqlens_k, max_seqlen=max_seqlen, max_seqlen_k=max_seqlen_k)


# Custom ops take tensors only, so they find a Packing by its address, unique while it lives.
_by_address: WeakValueDictionary = WeakValueDictionary()


def _know(packing: Packing) -> None:
    """Have :func:`find_packing` find it, unless all of its device have one address."""
    if not packing.cu_seqlens.is_meta:
        _by_address[_address(packing.cu_seqlens)] = packing


def find_packing(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None) -> Packing | None:
    """The Packing whose boundaries these tensors are or alias; None for any other tensors.

    Without ``cu_seqlens_k`` the keys have the boundaries of the queries.
    """
    packing = _by_address.get(_address(cu_seqlens))
    if packing is None:
        return None
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    same = _is_alias(cu_seqlens, packing.cu_seqlens)
    if not same or not _is_alias(cu_seqlens_k, packing.cu_seqlens_k):
        return None
    # What it keeps would be constants of the recording, which is for other boundaries too.
    refuse_recording("what a Packing keeps is for its boundaries alone")
    return packing


def _is_alias(x: Tensor, own: Tensor) -> bool:
    same = x.shape == own.shape and x.stride() == own.stride()
    return same and _address(x) == _address(own)


def _address(x: Tensor) -> tuple[torch.device, int]:
    return x.device, x.data_ptr()


def waits_to_read(x: Tensor) -> bool:
    """Whether the host waits for a device when it reads ``x``."""
    return x.device.type != "cpu"


def check_max_seqlen(max_seqlen, name: str = "max_seqlen"):
    """Check that ``max_seqlen`` is None or an int of at least 0."""
    if max_seqlen is None or isinstance(max_seqlen, torch.SymInt):
        return
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int):
        raise TypeError(f"{name} must be an int, got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"{name} must be at least 0, got {max_seqlen}")


def read_lengths(cu_seqlens: Tensor, name: str = "cu_seqlens") -> list[int]:
    """The lengths between valid boundaries, read on the host."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name} must start at 0, got {bounds[0]}")
    for at, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"{name} must not decrease, got {start} then {end} at entry {at}")
    return [end - start for start, end in pairwise(bounds)]


def read_both(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> tuple[list[int], list[int]]:
    """The numbers of queries and of keys of each sequence, read on the host and checked."""
    lengths = read_lengths(cu_seqlens)
    if cu_seqlens_k is cu_seqlens:
        return lengths, lengths
    lengths_k = read_lengths(cu_seqlens_k, "cu_seqlens_k")
    for at, (queries, keys) in enumerate(zip(lengths, lengths_k, strict=True)):
        if queries > keys:
            raise ValueError(
                "cu_seqlens must give a sequence at most as many queries as cu_seqlens_k gives "
                f"keys, got {queries} queries and {keys} keys in sequence {at}; queries are the "
                "last tokens of their sequence, so pass the keys of all its tokens"
            )
    return lengths, lengths_k


def check_bound_tensors(cu_seqlens, cu_seqlens_k, alternative: str = ""):
    _check_tensor("cu_seqlens", cu_seqlens, alternative)
    if cu_seqlens_k is None:
        return
    _check_tensor("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_k must have the shape of cu_seqlens, {tuple(cu_seqlens.shape)}, one entry "
            f"more than sequences, got {tuple(cu_seqlens_k.shape)}"
        )
    if cu_seqlens_k.device != cu_seqlens.device:
        raise ValueError(
            f"cu_seqlens_k must be on the device of cu_seqlens, {cu_seqlens.device}, got "
            f"{cu_seqlens_k.device}"
        )


def _check_tensor(name: str, cu_seqlens, alternative: str = ""):
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"{name} must be an int32 tensor, got {type(cu_seqlens).__name__}{alternative}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")


def check_bounds_given(max_seqlen, max_seqlen_k, cu_seqlens_k):
    check_max_seqlen(max_seqlen)
    check_max_seqlen(max_seqlen_k, "max_seqlen_k")
    if max_seqlen_k is not None and cu_seqlens_k is None:
        raise ValueError(f"max_seqlen_k must be None without cu_seqlens_k, got {max_seqlen_k}")


def checked_bound(name: str, bound: int | None, lengths: list[int]) -> int:
    """``bound``, which must hold, or the largest of ``lengths``."""
    longest = max(lengths, default=0)
    if bound is not None and bound < longest:
        raise ValueError(f"{name} must be at least the longest sequence, {longest}, got {bound}")
    return longest if bound is None else bound


def read_once(
    cu_seqlens: Tensor | Packing | None, max_seqlen: int | None
) -> Tensor | Packing | None:
    """A Packing, if boundaries would otherwise be read by a caller and again by what it calls."""
    if isinstance(cu_seqlens, Tensor) and max_seqlen is None and has_readable_values(cu_seqlens):
        return Packing(cu_seqlens)
    return cu_seqlens
