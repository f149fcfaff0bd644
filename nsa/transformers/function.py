"""The attention function of ``attn_implementation="nsa"``."""

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nsa import dispatch
from nsa.cache import Cache
from nsa.config import NSAConfig
from nsa.precision import autocast_tensors
from nsa.transformers.cache_layer import NAME, CacheLayer
from nsa.transformers.chosen_blocks import attend_chosen_blocks, chooses_blocks
from nsa.transformers.sequences import NO_CACHE, Rows, Sequences, window_message
from nsa.validation import UnsupportedError

GATES = "nsa_gate_proj_weight"

_REFUSED = ("indices", "position_bias", "sinks")
"""Arguments of some models' attention that would change the result."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sequences | None,
    dropout: float | None = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cache_layer: CacheLayer | None = None,
    block_indices: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function of ``attn_implementation="nsa"``, in transformers' form.

    Args:
        module: the attention module; ``module.config.nsa`` has the configuration.
        query: ``(B, H, N, D)``.
        key: ``(B, H_kv, N, D)``.
        value: ``(B, H_kv, N, Dv)``.
        attention_mask: what :func:`find_sequences` returned, or None for a batch without padding.
        dropout, sliding_window, softcap, s_aux: must be 0 or None.
        scaling: factor on the logits.
        is_causal: by default that of the module; as the configuration is.
        position_ids, cu_seq_lens_q: say where packed sequences end.
        cache_layer: has the earlier tokens, if there are any; ``key`` and ``value`` are the new
            ones, which it keeps.
        block_indices: the blocks of models that choose them, ``(B, H_kv, N, n)``, see
            :func:`nsa.selected_attention`; None in their dense layers. ``key`` and ``value`` then
            are those of all tokens.

    Returns:
        ``(B, N, H, Dv)`` and None, as there are no weights to return. Padding gets 0.

    Raises:
        TypeError, ValueError: the configuration is wrong; the message names the field.
        UnsupportedError: something is asked that nsa does not do; the message names it.
    """
    if sliding_window is not None:
        raise UnsupportedError(window_message(sliding_window))
    for name, given in (
        ("dropout", dropout),
        ("softcap", softcap is not None),
        ("s_aux", s_aux is not None),
        *((name, kwargs.get(name) is not None) for name in _REFUSED),
        ("output_attentions", kwargs.get("output_attentions")),
    ):
        if given:
            raise UnsupportedError(f"attn_implementation='nsa' has no {name}: leave it out")
    if not isinstance(attention_mask, Sequences | None):
        raise UnsupportedError(
            "attention_mask must be a padding mask (B, N): nsa takes no mask of queries and keys"
        )
    sequences = attention_mask
    if sequences is None:
        sequences = Sequences(past=0 if cache_layer is None else cache_layer.length)
    if chooses_blocks(module.config):
        return attend_chosen_blocks(
            module, query, key, value, sequences, block_indices, scaling
        ), None
    if block_indices is not None:
        raise UnsupportedError(
            "block_indices are for models whose configuration has index_block_size, as "
            "minimax_m3_vl: leave them out"
        )
    config = _nsa_config(module, scaling)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal != config.causal:
        raise UnsupportedError(f"causal in config.nsa must be that of the model, {causal}")
    if cache_layer is None and (sequences.past or query.shape[2] != key.shape[2]):
        raise UnsupportedError(f"{key.shape[2]} keys for {query.shape[2]} queries: {NO_CACHE}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    gates = getattr(module, GATES, None)
    gates = None if gates is None else gates.to(q.dtype)
    if cache_layer is None:
        rows = sequences.locate(q, position_ids, cu_seq_lens_q)
        return _attend(q, k, v, config, gates, rows), None
    q, k, v, gates = autocast_tensors(q, k, v, gates)
    positions = position_ids, cu_seq_lens_q
    return _attend_and_keep(q, k, v, config, gates, sequences, positions, cache_layer), None


@torch.compiler.disable(reason="a cache is read on the host")
def _attend_and_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    gates: Tensor | None,
    sequences: Sequences,
    positions: tuple[Tensor | None, Tensor | None],
    layer: CacheLayer,
) -> Tensor:
    """:func:`_attend` with the tokens that ``layer`` has, which keeps the new ones."""
    lengths = None if layer.cache is None else layer.cache.lengths
    rows = sequences.locate(q, *positions, lengths)
    cache = layer.make_room(q, k, v, gates, config, sequences)
    out = _attend(q, k, v, config, gates, rows, cache)
    layer.advance(q.shape[1], sequences.num_last)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    gates: Tensor | None,
    rows: Rows,
    cache: Cache | None = None,
) -> Tensor:
    """:func:`nsa.forward` on the tokens that are no padding, ``(B, N, H, Dv)``."""
    if rows.packing is None:
        return dispatch.forward(q, k, v, config=config, gate_proj_weight=gates, cache=cache)
    kept, shape = rows.kept, (*q.shape[:-1], v.shape[-1])
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if kept is not None:
        q, k, v = (x[kept] for x in (q, k, v))
    out = dispatch.forward(
        q, k, v, config=config, gate_proj_weight=gates, cu_seqlens=rows.packing, cache=cache
    )
    if kept is not None:
        out = out.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy(0, kept, out)
    return out.view(shape)


def _nsa_config(module: nn.Module, scaling: float | None) -> NSAConfig:
    fields = getattr(module.config, NAME, None)
    if fields is None:
        fields = {}
    if not isinstance(fields, dict):
        raise TypeError(
            f"config.nsa must be a dict of the fields of NSAConfig, got {type(fields).__name__}; "
            "dataclasses.asdict makes one"
        )
    return _kept_config(tuple(fields.items()), scaling)


@torch.compiler.assume_constant_result
def _kept_config(fields: tuple[tuple[str, Any], ...], scaling: float | None) -> NSAConfig:
    # Text tells 512 from 512.0 and 1 from True, which are equal keys of a cache.
    return _make_config(json.dumps(dict(fields), default=_refuse), scaling)


@lru_cache(maxsize=64)
def _make_config(encoded: str, scaling: float | None) -> NSAConfig:
    given: dict[str, Any] = json.loads(encoded)
    own = given.get("scale")
    if own is not None and scaling is not None and own != scaling:
        raise ValueError(f"scale in config.nsa must be that of the model, {scaling}, got {own}")
    return NSAConfig(**(given | {"scale": scaling if own is None else own}))


def _refuse(value: object):
    raise TypeError(
        f"config.nsa must have values that JSON has, for save_pretrained; got {value!r}"
    )
