"""The module that the adapters share: ``nsa.forward`` with a gate projection of its own."""

import torch
from torch import Tensor, nn

from nsa import backends, dispatch
from nsa.config import NSAConfig
from nsa.host import has_readable_values
from nsa.validation import (
    UnsupportedError,
    check_config,
    check_max_workspace_bytes,
    check_new_tensors,
    check_size,
)

_GATES = ("q", None)


class GatedAttention(nn.Module):
    """:func:`nsa.forward` on given queries, keys and values, with gates from the queries.

    Args:
        config: block sizes and rules; default ``NSAConfig()``.
        num_heads: query heads ``H``; only ``gate="q"`` needs them.
        head_dim: channels ``D`` of queries and keys; likewise.
        gate: ``"q"`` has a parameter ``gate_proj_weight (H, 3, D)``, initialised normal with std
            0.02, so that all gates start near 1/2. None makes each gate 1/3, without a parameter.
        max_workspace_bytes, backend: as in :func:`nsa.forward`.
        device, dtype: of the parameter; by default torch's defaults.
    """

    def __init__(
        self,
        config: NSAConfig | None,
        num_heads: int | None,
        head_dim: int | None,
        gate: str | None,
        max_workspace_bytes: int | None,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if gate not in _GATES:
            raise ValueError(f"gate must be one of {_GATES}, got {gate!r}")
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend must be one of {backends.BACKENDS}, got {backend!r}")
        check_max_workspace_bytes(max_workspace_bytes)
        check_new_tensors(dtype, device)
        self.nsa_config = check_config(config)
        self.max_workspace_bytes = max_workspace_bytes
        self.backend = backend
        self.gate_proj_weight: nn.Parameter | None = None
        if gate == "q":
            sizes = check_size("num_heads", num_heads), 3, check_size("head_dim", head_dim)
            weight = torch.empty(*sizes, device=device, dtype=dtype)
            self.gate_proj_weight = nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise ``gate_proj_weight``, if any."""
        if self.gate_proj_weight is not None:
            nn.init.normal_(self.gate_proj_weight, std=0.02)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """:func:`nsa.forward` with the settings and gates of this module."""
        weight = self.gate_proj_weight
        return dispatch.forward(
            q,
            k,
            v,
            config=self.nsa_config,
            gate_proj_weight=None if weight is None else weight.to(q.dtype),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            max_workspace_bytes=self.max_workspace_bytes,
            backend=self.backend,
        )


def check_same_boundaries(names: tuple[str, str], queries: Tensor, keys: Tensor | None):
    """Check that queries and keys have the same boundaries.

    One tensor for both is the same. The host reads two, for which it waits for a GPU.
    """
    if keys is None or keys is queries:
        return
    if queries.shape == keys.shape and has_readable_values(keys) and torch.equal(queries, keys):
        return
    raise UnsupportedError(
        f"{names[1]} must be the tensor {names[0]}: queries and keys are those of the same tokens"
    )
