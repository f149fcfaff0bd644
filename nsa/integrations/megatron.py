"""The core attention of a Megatron layer, with the interface of megatron-core 0.16.

A layer specification chooses it, where Megatron's own ``DotProductAttention`` would stand:

    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=CoreAttention, params={"nsa_config": nsa.NSAConfig.paper()}
    )
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from nsa.config import NSAConfig
from nsa.integrations.gated import GatedAttention, check_same_boundaries
from nsa.validation import UnsupportedError, check_config

_CAUSAL = ("causal", "padding_causal")
_NOT_CAUSAL = ("no_mask", "padding")


class CoreAttention(GatedAttention):
    """Native Sparse Attention where Megatron calls a core attention.

    The first eight arguments are those that Megatron passes; ``params`` of a ``ModuleSpec`` has the
    others. Tensors have this rank's heads.

    Args:
        config: Megatron's ``TransformerConfig``. Read are ``attention_dropout``, ``kv_channels``,
            ``num_attention_heads``, ``params_dtype``, ``context_parallel_size`` and, where it has
            them, ``window_size`` and ``softmax_type``.
        layer_number: not needed.
        attn_mask_type: Megatron's ``AttnMaskType`` of calls that pass none.
        attention_type: ``"self"``.
        attention_dropout: None (that of ``config``) or 0.
        softmax_scale: factor on the logits; by default that of ``nsa_config``.
        cp_comm_type: not needed.
        pg_collection: Megatron's process groups; ``tp`` is read.
        nsa_config: block sizes and rules; default ``NSAConfig()``.
        gate: ``"q"`` learns gates from the queries, by a parameter ``gate_proj_weight (H, 3, D)``,
            without tensor parallelism. None makes each gate 1/3, without a parameter.
        max_workspace_bytes, backend: as in :func:`nsa.forward`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: cross attention, dropout, context parallelism, a softmax with an offset,
            Megatron's own window, or learned gates with tensor parallelism.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        *,
        nsa_config: NSAConfig | None = None,
        gate: str | None = None,
        max_workspace_bytes: int | None = None,
        backend: str = "auto",
    ):
        _check_transformer(config, attention_type, attention_dropout)
        ranks = 1 if pg_collection is None else pg_collection.tp.size()
        if gate is not None and ranks > 1:
            raise UnsupportedError(
                f"gate must be None with tensor parallelism, got {gate!r} and {ranks} ranks: "
                "Megatron would save the gates of one rank for all"
            )
        nsa_config = check_config(nsa_config)
        if softmax_scale is not None:
            nsa_config = replace(nsa_config, scale=softmax_scale)
        super().__init__(
            nsa_config,
            config.num_attention_heads,
            config.kv_channels,
            gate,
            max_workspace_bytes,
            backend,
            device=None,
            dtype=config.params_dtype,
        )
        self.config = config
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend within each entry of the batch, or within each packed sequence.

        Args:
            query: ``(s, b, H, D)``, or packed ``(t, H, D)`` with ``packed_seq_params``.
            key: ``(s, b, H_kv, D)`` or ``(t, H_kv, D)``.
            value: ``(s, b, H_kv, Dv)`` or ``(t, H_kv, Dv)``.
            attention_mask: not read with the mask type ``causal`` or ``packed_seq_params``; else
                None.
            attn_mask_type: Megatron's ``AttnMaskType``; causal or not as ``nsa_config`` is.
            attention_bias: must be None.
            packed_seq_params: Megatron's ``PackedSeqParams`` with ``qkv_format="thd"``. Where
                sequences are padded (``cu_seqlens_q_padded``), the padding is attended as tokens at
                their ends are, which no real token sees. It needs a strictly causal ``nsa_config``,
                and the host reads the boundaries.

        Returns:
            ``(s, b, H * Dv)`` or ``(t, H * Dv)`` in the dtype of the query.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            UnsupportedError: a mask, a bias or a packing that this cannot do.
        """
        if attention_bias is not None:
            raise UnsupportedError("attention_bias must be None: no branch has a bias")
        packed = packed_seq_params is not None
        self._check_mask(attn_mask_type or self.attn_mask_type, attention_mask, packed)
        if not packed:
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            return self.attend(q, k, v).transpose(0, 1).flatten(2)
        cu_seqlens, max_seqlen = self._boundaries(packed_seq_params)
        return self.attend(query, key, value, cu_seqlens, max_seqlen).flatten(1)

    def _check_mask(self, mask_type, mask: Tensor | None, packed: bool):
        name = getattr(mask_type, "name", mask_type)
        wanted = _CAUSAL if self.nsa_config.causal else _NOT_CAUSAL
        if name not in wanted:
            raise UnsupportedError(
                f"attn_mask_type must be one of {wanted} with NSAConfig(causal="
                f"{self.nsa_config.causal}), got {name}"
            )
        # With "causal" Megatron may pass a mask that says no more than that.
        if mask is not None and name != "causal" and not packed:
            raise UnsupportedError(
                f"attention_mask must be None with attn_mask_type {name}: pack the sequences"
            )

    def _boundaries(self, params) -> tuple[Tensor, int | None]:
        """Boundaries of packed sequences, and an upper bound on their lengths if it is known."""
        if params.qkv_format != "thd":
            raise UnsupportedError(
                f"packed_seq_params.qkv_format must be 'thd', got {params.qkv_format!r}"
            )
        if (getattr(params, "local_cp_size", None) or 1) > 1:
            raise UnsupportedError(
                "packed_seq_params.local_cp_size must be 1: this adapter has no context "
                f"parallelism, got {params.local_cp_size}"
            )
        names = ("cu_seqlens_q", "cu_seqlens_kv")
        check_same_boundaries(names, params.cu_seqlens_q, params.cu_seqlens_kv)
        padded = params.cu_seqlens_q_padded
        if padded is None:
            return params.cu_seqlens_q, params.max_seqlen_q
        names = ("cu_seqlens_q_padded", "cu_seqlens_kv_padded")
        check_same_boundaries(names, padded, params.cu_seqlens_kv_padded)
        if not _is_strictly_causal(self.nsa_config):
            raise UnsupportedError(
                "cu_seqlens_q_padded must be None with a configuration that sees later tokens, "
                f"which may be padding: {self.nsa_config}"
            )
        # Megatron's max_seqlen_q may be of the lengths without padding.
        return padded, None


def _is_strictly_causal(config: NSAConfig) -> bool:
    ahead = config.selection == "tile" and config.tile_summary == "mean"
    return config.causal and config.compressed_visibility == "complete" and not ahead


def _check_transformer(config, attention_type: str, attention_dropout: float | None):
    """Check that nothing is asked of the attention that it does not do."""
    dropout = config.attention_dropout if attention_dropout is None else attention_dropout
    softmax_type = getattr(config, "softmax_type", "vanilla")
    for name, value, wanted, remedy in (
        ("attention_type", attention_type, "self", "cross attention has no causal order"),
        ("attention_dropout", dropout, 0, "no branch drops weights"),
        ("context_parallel_size", config.context_parallel_size, 1, "give each rank all tokens"),
        ("window_size", getattr(config, "window_size", None), None, "use NSAConfig(window_size=)"),
        ("softmax_type", softmax_type, "vanilla", "no branch has an offset"),
    ):
        if value != wanted:
            raise UnsupportedError(f"{name} must be {wanted!r}, got {value!r}: {remedy}")
