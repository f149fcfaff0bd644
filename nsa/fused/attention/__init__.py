"""The three attention branches (paper section 3.3), forward and backward.

Shapes: ``q`` and ``out (B, Nq, H, D)``, ``k`` and ``v (B, Nk, H_kv, D)``, with ``B = 1`` and all
tokens in a row if packed. The queries of a sequence are its last tokens. A forward returns the
log-sum-exp in the layout of its kernel: :meth:`nsa.fused.plan.Plan.statistics_placements` says
where each token lies. A backward takes statistics in that layout, and no result of the forward. In
packed tile mode, outputs and gradients of queries of the compressed and selected branch are in the
layouts of the kernels too; :meth:`nsa.fused.plan.Plan.query_placements` says where tokens lie.
"""

from nsa.fused.attention.compressed import (
    compressed_attention,
    compressed_attention_backward,
    compressed_lse,
)
from nsa.fused.attention.selected import (
    closing_attention,
    selected_attention,
    selected_attention_backward,
)
from nsa.fused.attention.window import (
    closing_window,
    window_attention,
    window_attention_backward,
)
