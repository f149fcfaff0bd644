"""The cache layer of transformers that keeps compressed keys: an :class:`nsa.Cache` for each layer.

``generate()`` and models make a cache of layers whose classes follow from the types of layers that
:func:`transformers.cache_utils.get_layer_types_and_kwargs` finds in a configuration.
:func:`nsa.transformers.register` puts :func:`layer_types_and_kwargs` in its place, which names
:class:`CacheLayer` for configurations with ``attn_implementation="nsa"``, and changes nothing for
others.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from nsa.cache import Cache
from nsa.cache.argument_checks import MAX_LENGTH, check_decodable
from nsa.cache.copies import copy_sequences
from nsa.cache.layout import round_up
from nsa.config import NSAConfig, check_int
from nsa.host import needs_gradients
from nsa.transformers.chosen_blocks import chooses_blocks
from nsa.transformers.sequences import Sequences
from nsa.validation import UnsupportedError

NAME = "nsa"
_LEAST_SPARE = 256
"""Tokens of a sequence for which a cache that grows has room, at the least."""

_LAYER_TYPE = "native_sparse_attention"
_layer_types_and_kwargs = cache_utils.get_layer_types_and_kwargs


def layer_types_and_kwargs(config) -> tuple[list[str], list[dict[str, Any]]]:
    """Types of a model's cache layers, and arguments of their classes."""
    types, arguments = _layer_types_and_kwargs(config)
    if config._attn_implementation == NAME and not chooses_blocks(config):
        for at, name in enumerate(types):
            if name == "full_attention":
                types[at], arguments[at] = _LAYER_TYPE, {"config": config}
    return types, arguments


class CacheLayer(cache_utils.CacheLayerMixin):
    """Keys and values of one layer, and its compressed ones, in an :class:`nsa.Cache`.

    The model hands new keys and values to :meth:`update`, which returns them as they are; the
    attention function appends them. Padding is not kept. The memory grows by a quarter as it fills,
    or is that of ``max_cache_len`` from the start.

    A first call also attends what no cache can hold: with gradients, packed sequences, or a
    configuration that cannot be decoded. Then the next call raises.

    Args:
        max_cache_len: tokens of a sequence, as in ``cache_implementation="static"``.
        config: that of the model.

    Attributes:
        cache: made in the first call.
        length: tokens of each sequence, padding included.
    """

    _layer_type = _LAYER_TYPE
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, max_cache_len: int | None = None, config=None):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.config = config
        self._empty()

    def _empty(self):
        self.cache: Cache | None = None
        self.length = 0
        # Tokens at the end of each sequence that have no padding between them.
        self._num_last = 0
        self._refusal: str | None = None
        self.is_initialized = False

    @property
    def batch_size(self) -> int:
        return -1 if self.cache is None else self.cache.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor):
        """Nothing: the attention function makes the cache, which depends on the queries too."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_, kwargs: dict | None = None, **__
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, as they are; and the layer itself to the attention function.

        Args:
            kwargs: what the attention function will get by name.
        """
        if kwargs is None:
            raise UnsupportedError(
                "this model does not show its cache what its attention function gets, so nsa "
                "cannot keep its keys: pass use_cache=False"
            )
        if self.config is not None and self.config._attn_implementation != NAME:
            raise UnsupportedError(
                "this cache was made for attn_implementation='nsa', got "
                f"{self.config._attn_implementation!r}: make a new one"
            )
        if self._refusal is not None:
            raise UnsupportedError(f"nothing was kept of the earlier call: {self._refusal}")
        kwargs["cache_layer"] = self
        return key_states, value_states

    def make_room(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor | None,
        config: NSAConfig,
        sequences: Sequences,
    ) -> Cache | None:
        """The cache, with room for new tokens; None if they cannot be kept.

        Args:
            q, k, v: ``(B, N, H, D)`` and so on.
        """
        if sequences.past != self.length:
            raise ValueError(
                f"attention_mask must cover the {self.length} earlier tokens of each sequence, got "
                f"one for {sequences.past}"
            )
        if sequences.padding is None and self._num_last < self.length:
            raise ValueError(
                "attention_mask must mark the padding of earlier calls, got one without, or None"
            )
        refusal = _reason_not_to_keep((q, k, v, gates), config, sequences)
        if refusal is not None:
            if self.length:
                raise UnsupportedError(refusal)
            self._refusal = refusal
            return None
        needed = self.length + q.shape[1]
        if self.cache is None:
            self.cache = Cache(
                config, q.shape[0], self._capacity(needed, config), k.shape[2], k.shape[3],
                v.shape[3], dtype=k.dtype, device=k.device, num_heads=q.shape[2],
            )  # fmt: skip
            self.is_initialized = True
        elif needed > self.cache.max_length and self.max_cache_len is None:
            every = torch.arange(self.cache.batch_size, device="cpu")
            self.cache = copy_sequences(self.cache, every, self._capacity(needed, config))
        return self.cache

    def _capacity(self, needed: int, config: NSAConfig) -> int:
        """Tokens of a sequence to have room for."""
        tokens = self.max_cache_len
        if tokens is None:
            tokens = needed + max(_LEAST_SPARE, needed // 4)
        # Whole tiles, because copies need them.
        return round_up(tokens, config.q_tile_size) if config.selection == "tile" else tokens

    def advance(self, count: int, num_last: int):
        """Count ``count`` new tokens, of which the last ``num_last`` are no padding."""
        self._num_last = num_last + (self._num_last if num_last == count else 0)
        self.length += count

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self):
        self._empty()

    def crop(self, tokens_to_remove: int):
        """Drop the last ``-tokens_to_remove`` tokens of each sequence.

        Raises:
            ValueError: there are fewer tokens, or tile mode cannot go back so far, see
                :meth:`nsa.Cache.truncate`.
            UnsupportedError: there is padding among them.
        """
        # An empty cache has nothing to remove, which transformers allows.
        least = -self.length if self.length else -MAX_LENGTH
        check_int("tokens_to_remove", tokens_to_remove, least, 0)
        count = -tokens_to_remove
        if self.cache is None or count == 0:
            return
        if count > self._num_last:
            raise UnsupportedError(
                f"crop cannot remove padding: {self._num_last} tokens follow the last padding, got "
                f"{tokens_to_remove}"
            )
        known = self.cache.known_lengths()
        left = self.cache.lengths - count if known is None else [n - count for n in known]
        self.cache.truncate(left)
        self.length -= count
        self._num_last -= count

    def reorder_cache(self, beam_idx: Tensor):
        if self.cache is not None:
            self.cache.reorder(beam_idx.to(self.cache.device))

    def batch_repeat_interleave(self, repeats: int):
        rows = torch.arange(self.batch_size, device="cpu")
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor):
        if self.cache is not None:
            index = torch.arange(self.batch_size, device=indices.device)[indices]
            self.cache = copy_sequences(self.cache, index, self.cache.max_length)

    def offload(self):
        raise UnsupportedError("nsa's cache cannot be offloaded: leave out cache_implementation")

    def prefetch(self):
        self.offload()


cache_utils.STATIC_LAYER_TYPE_MAPPING[_LAYER_TYPE] = CacheLayer


def _reason_not_to_keep(
    tensors: tuple[Tensor | None, ...], config: NSAConfig, sequences: Sequences
) -> str | None:
    """Why a cache cannot hold these, with the remedy; None if it can."""
    if needs_gradients(*tensors):
        return "nsa's cache has no gradients; use torch.no_grad(), or pass use_cache=False"
    if sequences.has_packs:
        return (
            "nsa's cache has one sequence for each row, and position_ids or cu_seq_lens_q pack "
            "several; pass use_cache=False"
        )
    try:
        check_decodable(config)
    except UnsupportedError as error:
        return f"{error}, or pass use_cache=False"
    return None
