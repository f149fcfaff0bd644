"""The selected branch of token mode, forward and backward, on kernels of our own.

Shapes as in :mod:`nsa.fused.attention`; ``block_indices`` are ``(B, T, H_kv, n)``.
"""

from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.plan import Plan


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Attention of each token over its selected blocks; the log-sum-exp is ``(B * T, H)``."""
    rows = (x.flatten(0, 1) for x in (q, k, v))
    forced = plan.config.num_initial_blocks + plan.config.num_local_blocks
    selected = _selected(q, block_indices, plan)
    out, lse = kernel_calls.selected_forward(*rows, *selected, forced > 0)
    return out.unflatten(0, q.shape[:2]), lse


def token_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    rows = (x.flatten(0, 1) for x in (dout, q, k, v, out))
    grads = kernel_calls.selected_backward(*rows, lse, *_selected(q, block_indices, plan))
    return tuple(grad.unflatten(0, q.shape[:2]) for grad in grads)


def _selected(q: Tensor, block_indices: Tensor, plan: Plan) -> tuple:
    """The arguments that say what each token attends, and how."""
    config = plan.config
    return (
        block_indices.flatten(0, 1),
        plan.token_blocks(q.shape[0]),
        config.select_block_size,
        config.softmax_scale(q.shape[-1]),
        config.causal,
    )
