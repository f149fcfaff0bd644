"""The sequences of a call of a model, which stand where other attention functions get a mask."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.packing import Packing
from nsa.validation import UnsupportedError

NO_CACHE = (
    "only a cache of nsa's layers continues sequences, which generate() and "
    "DynamicCache(config=model.config) make after nsa.transformers.register(); use one, or pass "
    "use_cache=False"
)


class Rows(NamedTuple):
    """Which tokens of a call attend, on one device.

    Attributes:
        kept: those of the ``B * N`` tokens that are no padding, int64; None if all are.
        packing: the sequences of these tokens; None for a batch of ``B`` sequences.
    """

    kept: Tensor | None
    packing: Packing | None

    def to(self, device: torch.device) -> "Rows":
        kept = None if self.kept is None else self.kept.to(device)
        if self.packing is None:
            return Rows(kept, None)
        return Rows(kept, Packing(self.packing.cu_seqlens.to(device)))


class Sequences:
    """What the layers of one call of a model know of its sequences; transformers hands it on.

    It stands where other attention functions get a mask. The first layer locates the sequences,
    for which the host reads, and the others take its result; layers may be on several devices.

    Args:
        padding: bool ``(B, past + N)``, whether a token is one; None if all are.
        packed: whether a mask hides a token from the next one, as between packed sequences.
        past: tokens and padding of each row that earlier calls left in a cache.

    Attributes:
        has_packs: whether a row has several sequences.
        num_last: of the last tokens in each row, how many are no padding in any row.
    """

    def __init__(self, padding: Tensor | None = None, packed: bool = False, past: int = 0):
        self.padding, self.packed, self.past = padding, packed, past
        self.has_packs = False
        self.num_last = 0
        self._rows: dict[torch.device, Rows] = {}

    @cached_property
    def has_padding_before_tokens(self) -> bool:
        """Whether a row has a token after padding, for which the host reads."""
        if self.padding is None:
            return False
        return bool((~self.padding[:, :-1] & self.padding[:, 1:]).any())

    def locate(
        self,
        q: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None = None,
    ) -> Rows:
        """The tokens of this call, on the device of ``q``.

        Args:
            q: ``(B, N, H, D)``.
            position_ids: ``(B, N)`` or ``(1, N)``; a sequence ends where they do not go on by 1.
                Not used if there are earlier tokens.
            cu_seqlens: int32 boundaries in the ``B * N`` tokens, where the caller knows them.
            lengths: int32 ``(B,)``, the earlier tokens that a cache has.
        """
        device = q.device
        if device in self._rows:
            return self._rows[device]
        if self._rows:
            rows = next(iter(self._rows.values())).to(device)
        else:
            self.num_last = q.shape[1]
            if self.padding is not None:
                self.padding = self.padding.to(device)
            if position_ids is not None:
                position_ids = position_ids.to(device) if position_ids.ndim == 2 else None
            if self.past:
                rows = self._continued(q, cu_seqlens, lengths)
            else:
                rows = self._started(q, position_ids, cu_seqlens)
        self._rows[device] = rows
        return rows

    def _started(self, q: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> Rows:
        batch, length = q.shape[:2]
        bounds = kept = None
        if cu_seqlens is not None:
            bounds = self._given_bounds(cu_seqlens).to(q.device)
        elif self.padding is not None:
            kept = self.padding.flatten().nonzero()[:, 0]
            bounds = self._bounds_without_padding(self.padding, kept, position_ids)
            self.num_last = int(_num_last(self.padding))
        elif position_ids is not None:
            # The first token of a row starts a sequence: its difference is 0.
            starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
            starts = starts.expand(batch, length).flatten()
            if int(starts.sum()) > batch:
                ends = starts.new_ones(1).nonzero() + starts.numel()
                bounds = torch.cat((starts.nonzero(), ends))[:, 0].int()
                self.has_packs = True
        if cu_seqlens is not None:
            self.has_packs = True
        if self.packed and bounds is None:
            raise UnsupportedError(
                "the mask hides tokens from the next ones, and no position_ids (B, N) say why: nsa "
                "takes padding masks and packed position_ids"
            )
        return Rows(kept, None if bounds is None else Packing(bounds))

    def _given_bounds(self, cu_seqlens: Tensor) -> Tensor:
        """The caller's boundaries in int32."""
        if self.padding is not None:
            raise UnsupportedError(
                "cu_seq_lens_q cannot be given with padding: leave it or attention_mask out"
            )
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            kind = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
            raise TypeError(f"cu_seq_lens_q must be an int32 or int64 tensor, got {kind}")
        return cu_seqlens.int()

    def _bounds_without_padding(
        self, padding: Tensor, kept: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        """Boundaries of the tokens in ``kept``: of rows, and where positions do not grow.

        After padding only position 0 starts a sequence: ``generate()`` counts on from the last
        padding, which has position 0, after prompts that are padded on the right.
        """
        bounds = _row_bounds(padding)
        if position_ids is None:
            return bounds
        positions = position_ids.expand(padding.shape).flatten()[kept]
        # Row starts are in both; an empty row's is there twice.
        starts = (positions.diff() <= 0) & ((kept.diff() == 1) | (positions[1:] == 0))
        both = torch.cat((bounds, starts.nonzero()[:, 0] + 1)).unique().int()
        if len(both) <= len(bounds.unique()):
            return bounds
        self.has_packs = True
        return both

    def _continued(self, q: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> Rows:
        """The new tokens of sequences in a cache."""
        if cu_seqlens is not None or lengths is None:
            raise UnsupportedError("cu_seq_lens_q cannot be given with keys of earlier calls")
        if self.padding is None:
            return Rows(None, None)
        old, new = self.padding[:, : self.past], self.padding[:, self.past :]
        found = torch.stack((old.sum(1).ne(lengths).sum(), _num_last(new))).tolist()
        changed, self.num_last = found
        if changed:
            raise ValueError(
                "attention_mask must be that of the earlier calls for tokens that they saw, but "
                f"it has other numbers of tokens in {changed} of {len(lengths)} sequences"
            )
        if self.num_last == q.shape[1]:
            return Rows(None, None)
        return Rows(new.flatten().nonzero()[:, 0], Packing(_row_bounds(new)))


def _row_bounds(padding: Tensor) -> Tensor:
    """Boundaries of the tokens of each row, int32 ``(B + 1,)``."""
    return pad(padding.sum(1).cumsum(0), (1, 0)).int()


def _num_last(padding: Tensor) -> Tensor:
    """Of the last tokens in each row, how many are no padding in any row."""
    return padding.all(0).flip(0).int().cumprod(0).sum()


def find_sequences(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device | None = None,
    **_,
) -> Sequences:
    """The :class:`Sequences` of a call, for the arguments that transformers makes masks of.

    Raises:
        ValueError: the mask has another shape than the tokens.
        UnsupportedError: the mask is more than causal, padding and packed sequences.
    """
    past = kv_length - q_length
    if past < 0:
        raise ValueError(
            f"attention_mask must cover the {q_length} tokens of each sequence, got one for "
            f"{kv_length}"
        )
    if kv_offset or (past and int(q_offset) != past):
        raise UnsupportedError(f"{kv_length} keys for {q_length} queries: {NO_CACHE}")
    if local_size is not None:
        raise UnsupportedError(window_message(local_size))
    packed = ahead = False
    if mask_function is not None and not allow_is_causal_skip and q_length > 1:
        # The mask is more than causal, or transformers could not tell because it is compiled.
        first = past + torch.arange(q_length - 1, device=device)[None]
        entry = torch.arange(batch_size, device=device)[:, None]
        ahead = bool(mask_function(entry, 0, first, first + 1).any())
        packed = not bool(mask_function(entry, 0, first + 1, first).all())
    if use_vmap or ahead:
        raise UnsupportedError(
            "the mask of this model is more than causal, padding and packed sequences, which nsa "
            "cannot do: use another attn_implementation"
        )
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch_size, kv_length):
            raise ValueError(
                f"attention_mask must have shape {(batch_size, kv_length)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        if bool(attention_mask.all()):
            attention_mask = None
    return Sequences(attention_mask, packed, past)


def window_message(size: int) -> str:
    return (
        f"sliding_window must be None with attn_implementation='nsa', got {size}: the window is "
        "window_size of config.nsa"
    )
