"""Attention of models that choose blocks of keys themselves, such as MiniMax-M3.

Their attention modules hand ``block_indices`` on: where they chose blocks, these take the place of
nsa's own branches; where they did not, the layer is a dense one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nsa.selected_dispatch import selected_attention
from nsa.transformers.sequences import Sequences
from nsa.validation import UnsupportedError


def chooses_blocks(config) -> bool:
    """Whether models of a configuration choose blocks of keys themselves."""
    return hasattr(config, "index_block_size")


def attend_chosen_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    block_indices: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """:func:`nsa.selected_attention` over the model's blocks; dense attention without any.

    Args:
        module: the attention module; ``module.config.index_block_size`` is the size of a block.
        query: ``(B, H, N, D)``, the last tokens of ``key``.
        key: ``(B, H_kv, Nk, D)``, of all tokens.
        value: ``(B, H_kv, Nk, Dv)``.
        sequences: padding must follow all tokens of a row where blocks are chosen, because the
            model counts blocks from the start of the row.
        block_indices: ``(B, H_kv, N, n)``, integers in any order, -1 in empty slots.
        scaling: factor on the logits, default ``1 / sqrt(D)``.

    Returns:
        ``(B, N, H, Dv)``. Padding gets any values.

    Raises:
        ValueError: nsa has no blocks of this size.
        UnsupportedError: there is padding before a token, or rows are packed.
    """
    if sequences.packed:
        raise UnsupportedError(
            "models that choose blocks count them from the start of a row: pass one sequence a "
            "row, not packed position_ids"
        )
    if block_indices is None:
        mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=query.shape[2],
            kv_length=key.shape[2],
            q_offset=key.shape[2] - query.shape[2],
            attention_mask=None if sequences.padding is None else sequences.padding.to(key.device),
            device=key.device,
        )
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
    if sequences.has_padding_before_tokens:
        raise UnsupportedError(
            "models that choose blocks count them from the start of a row, padding included: pad "
            "on the right, or pass sequences of one length"
        )
    q, k, v, lists = (x.transpose(1, 2) for x in (query, key, value, _ascending(block_indices)))
    config: Any = module.config
    out = selected_attention(
        q, k, v, lists, config.index_block_size, scale=scaling, return_lse=False
    )
    assert isinstance(out, Tensor)
    return out


def _ascending(block_indices: Tensor) -> Tensor:
    """Lists as nsa takes them: int32, ascending, -1 at the end."""
    last = torch.iinfo(torch.int32).max
    lists = block_indices.masked_fill(block_indices < 0, last).int().sort(-1).values
    return lists.masked_fill(lists == last, -1)
