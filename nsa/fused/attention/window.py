"""The window branch (paper section 3.3): queries attend the nearest keys.

Shapes as in :mod:`nsa.fused.attention`.
"""

from torch import Tensor

from nsa.fused.attention.fa4_calls import dense_backward, dense_forward
from nsa.fused.fa4_call import sums_bytes
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes


def window_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Attention over the last ``window_size`` keys, the query's own included."""
    return dense_forward(q, k, v, plan, **_window_call(plan))


def window_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    return dense_backward(dout, q, k, v, out, lse, plan, **_window_call(plan))


def _window_call(plan: Plan) -> dict:
    # The kernels add positions to this int32, so it must leave room for them.
    reach = min(plan.config.window_size - 1, 1 << 30)
    return dict(
        causal=plan.config.causal,
        window_size=(reach, None if plan.config.causal else reach),
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=plan.cu_seqlens,
    )


def window_backward_bytes(sizes: Sizes) -> int:
    """Bytes that the backward allocates: gradients, and FA4's sums."""
    return sizes.query + 2 * sizes.key + window_sums_bytes(sizes)


def window_sums_bytes(sizes: Sizes) -> int:
    """Bytes of FA4's sums."""
    heads, kv_heads, length = sizes.num_heads, sizes.num_kv_heads, sizes.length
    sums = sums_bytes(heads, kv_heads, sizes.head_dim, length, length, sizes.sequences)
    return sizes.batch * sums
