"""The only files that call our own CuTe DSL kernels, but those of decoding. ``fa4`` calls FA4's.

The functions are documented here, so that ``help`` shows them on a machine without CuTe. Functions
of the same names in :mod:`nsa.fused.kernels` check arguments, allocate and launch; ``locals()``
gives them each argument by its name. A kernel file is imported on its first call, because CuTe
takes seconds to import. Callers write ``kernel_calls.gating_forward(...)``, so that a test can
replace the functions of this package.
"""

from nsa.fused.kernel_calls.attention_calls import (
    closing_forward,
    few_key_deltas,
    join_near_blocks,
    listed_backward,
    round_listed_sums,
    round_sums,
    row_statistics,
    selected_backward,
    selected_forward,
)
from nsa.fused.kernel_calls.compression_calls import mean_backward, mean_forward
from nsa.fused.kernel_calls.gating_calls import (
    gating_backward,
    gating_forward,
    gradient_of_sums,
    query_gradient,
)
from nsa.fused.kernel_calls.layer_calls import (
    activation_gradient,
    column_sums,
    gather_blocks,
    product_gradient,
    rotate,
    scatter_blocks,
    split_product,
)
from nsa.fused.kernel_calls.plan_calls import (
    count_query_tiles,
    list_key_blocks,
    list_query_tiles,
    plan_tables,
    sequence_bounds,
)
from nsa.fused.kernel_calls.selection_calls import (
    float32_products,
    importance_scores,
    tile_scores,
    top_blocks,
    top_blocks_and_groups,
)
