"""The inner attention of a torchtitan model, with the interface of torchtitan 0.3.0.

torchtitan's attention blocks project and rotate, then call an inner attention that a configuration
chooses. It must be one of torchtitan's modules, which a few lines of your own make of it:

    class NSAttention(Module):  # torchtitan.protocols.module
        @dataclass(kw_only=True, slots=True)
        class Config(VarlenAttention.Config):  # so that the decoder passes boundaries of documents
            nsa: InnerAttention.Config

        def __init__(self, config):
            super().__init__()
            self.inner = config.nsa.build()

        def forward(self, q_BLNH, k_BLNH, v_BLNH, **kwargs):
            return self.inner(q_BLNH, k_BLNH, v_BLNH, **kwargs)

        def reset_parameters(self):
            self.inner.reset_parameters()

and ``inner_attention=NSAttention.Config(nsa=InnerAttention.Config(...))`` chooses it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nsa.config import NSAConfig, check_scale
from nsa.integrations.gated import GatedAttention, check_same_boundaries
from nsa.validation import UnsupportedError


class VarlenMetadata(Protocol):
    """What is read of torchtitan's ``VarlenMetadata``.

    Attributes:
        cu_seq_q: int32 ``(S + 1,)`` boundaries of the documents in the ``B * L`` tokens of a batch.
        cu_seq_k: the same tensor.
        max_q: tokens of the longest document.
    """

    @property
    def cu_seq_q(self) -> Tensor: ...
    @property
    def cu_seq_k(self) -> Tensor: ...
    @property
    def max_q(self) -> int: ...


class InnerAttention(GatedAttention):
    """Native Sparse Attention where torchtitan calls an inner attention.

    Tensors are local: under tensor parallelism, those of this rank's heads. There is no context
    parallelism.

    Args:
        config: block sizes and rules; default ``NSAConfig()``.
        num_heads, head_dim: query heads ``H`` and channels ``D``; needed for ``gate="q"`` only.
        gate: ``"q"`` learns gates from the queries, by a parameter ``gate_proj_weight (H, 3, D)``.
            None makes each gate 1/3, without a parameter.
        max_workspace_bytes, backend: as in :func:`nsa.forward`.
        device, dtype: of the parameter; by default torch's defaults.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config:
        """The arguments of :class:`InnerAttention`, as torchtitan's configurations have them."""

        config: NSAConfig | None = None
        num_heads: int | None = None
        head_dim: int | None = None
        gate: str | None = None
        max_workspace_bytes: int | None = None
        backend: str = "auto"

        def build(self) -> "InnerAttention":
            """The module."""
            return InnerAttention(
                self.config,
                num_heads=self.num_heads,
                head_dim=self.head_dim,
                gate=self.gate,
                max_workspace_bytes=self.max_workspace_bytes,
                backend=self.backend,
            )

    def __init__(
        self,
        config: NSAConfig | None = None,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        gate: str | None = None,
        max_workspace_bytes: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            config, num_heads, head_dim, gate, max_workspace_bytes, backend, device, dtype
        )

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: VarlenMetadata | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend within each document, or within each entry of the batch.

        Args:
            q_BLNH: queries ``(B, L, H, D)``.
            k_BLNH: keys ``(B, L, H_kv, D)``.
            v_BLNH: values ``(B, L, H_kv, Dv)``.
            attention_masks: torchtitan's ``VarlenMetadata``, the boundaries of documents; None if
                each entry of the batch is one document.
            scale: None, or the scale of the configuration.
            enable_gqa: not needed; the numbers of heads say so.
            out_transform: must be None.

        Returns:
            ``(B, L, H, Dv)`` in the dtype of the queries.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            UnsupportedError: the mask is no ``VarlenMetadata``, ``out_transform`` is given, or
                ``backend="fused"`` cannot do this.
        """
        if out_transform is not None:
            raise UnsupportedError(
                "out_transform must be None: it needs the log-sum-exp of one softmax, and each of "
                "the three branches has its own"
            )
        self._check_scale(scale, q_BLNH.shape[-1])
        if attention_masks is None:
            return self.attend(q_BLNH, k_BLNH, v_BLNH)
        if not hasattr(attention_masks, "cu_seq_q"):
            raise UnsupportedError(
                f"attention_masks must be a VarlenMetadata or None, got "
                f"{type(attention_masks).__name__}: derive the Config of your module from "
                "VarlenAttention.Config"
            )
        bounds = attention_masks.cu_seq_q
        check_same_boundaries(("cu_seq_q", "cu_seq_k"), bounds, attention_masks.cu_seq_k)
        q, k, v = (x.flatten(0, 1) for x in (q_BLNH, k_BLNH, v_BLNH))
        out = self.attend(q, k, v, bounds, attention_masks.max_q)
        return out.unflatten(0, q_BLNH.shape[:2])

    def _check_scale(self, scale: float | None, head_dim: int):
        check_scale(scale)
        own = self.nsa_config.softmax_scale(head_dim)
        if scale is not None and not math.isclose(scale, own, rel_tol=1e-6):
            raise ValueError(
                f"scale must be None or that of the configuration, {own}, got {scale}; set "
                "NSAConfig(scale=...)"
            )
