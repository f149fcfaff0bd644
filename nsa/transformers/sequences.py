"""The sequences of a call of a model, which stand where other attention functions get a mask."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.packing import Packing
from nsa.validation import UnsupportedError

NO_CACHE = "nsa has no KV cache in transformers yet: pass use_cache=False"


class Sequences:
    """What the layers of one call of a model know of its sequences; transformers hands it on.

    It stands where other attention functions get a mask. The first layer locates the sequences,
    for which the host reads once, and the others take its result.

    Args:
        padding: bool ``(B, N)``, whether a token is one; None if all are.
        packed: whether a mask hides a token from the next one, as between packed sequences.
    """

    def __init__(self, padding: Tensor | None = None, packed: bool = False):
        self.padding, self.packed = padding, packed
        self.index: Tensor | None = None
        self.packing: Packing | None = None
        self._located = False

    def locate(self, q: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None):
        """Set ``packing``, and ``index``, the tokens that are in it; None if these are all.

        Args:
            q: ``(B, N, H, D)``.
            position_ids: ``(B, N)`` or ``(1, N)``; a sequence ends where they do not go on by 1.
            cu_seqlens: int32 boundaries in the ``B * N`` tokens, where the caller knows them.
        """
        if self._located:
            return
        self._located = True
        batch, length = q.shape[:2]
        if cu_seqlens is not None:
            self.packing = Packing(cu_seqlens.to(device=q.device, dtype=torch.int32))
        elif self.padding is not None:
            self.index = self.padding.flatten().nonzero()[:, 0]
            self.packing = Packing(self._bounds_without_padding(position_ids))
        elif position_ids is not None and position_ids.ndim == 2:
            # The first token of a row starts a sequence: its difference is 0.
            starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
            starts = starts.expand(batch, length).flatten()
            if int(starts.sum()) > batch:
                ends = starts.new_ones(1).nonzero() + starts.numel()
                bounds = torch.cat((starts.nonzero(), ends))[:, 0]
                self.packing = Packing(bounds.int())
        if self.packed and self.packing is None:
            raise UnsupportedError(
                "the mask hides tokens from the next ones, and no position_ids (B, N) say why: nsa "
                "takes padding masks and packed position_ids"
            )

    def _bounds_without_padding(self, position_ids: Tensor | None) -> Tensor:
        """Boundaries of the tokens in ``index``: of rows, and where positions do not grow."""
        assert self.padding is not None
        assert self.index is not None
        lengths = self.padding.sum(1)
        bounds = pad(lengths.cumsum(0), (1, 0))
        if position_ids is None or position_ids.ndim != 2:
            return bounds.int()
        kept = position_ids.expand(self.padding.shape).flatten()[self.index]
        # Row starts are in both; an empty row's is there twice.
        starts = (kept.diff() <= 0).nonzero()[:, 0] + 1
        return torch.cat((bounds, starts)).unique().int() if len(starts) else bounds.int()


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
        UnsupportedError: keys of earlier calls are in a cache, or the mask is more than causal,
            padding and packed sequences.
    """
    if kv_length != q_length or kv_offset:
        raise UnsupportedError(f"{kv_length} keys for {q_length} queries: {NO_CACHE}")
    if local_size is not None:
        raise UnsupportedError(window_message(local_size))
    packed = ahead = False
    if mask_function is not None and not allow_is_causal_skip and q_length > 1:
        # The mask is more than causal, or transformers could not tell because it is compiled.
        first = torch.arange(q_length - 1, device=device)[None]
        entry = torch.arange(batch_size, device=device)[:, None]
        ahead = bool(mask_function(entry, 0, first, first + 1).any())
        packed = not bool(mask_function(entry, 0, first + 1, first).all())
    if use_vmap or ahead:
        raise UnsupportedError(
            "the mask of this model is more than causal, padding and packed sequences, which nsa "
            "cannot do: use another attn_implementation"
        )
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    return Sequences(attention_mask, packed)


def window_message(size: int) -> str:
    return (
        f"sliding_window must be None with attn_implementation='nsa', got {size}: the window is "
        "window_size of config.nsa"
    )
