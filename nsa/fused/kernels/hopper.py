"""What our kernels use of FlashAttention-4 and quack-kernels.

Of our kernels' files, only this one and :mod:`nsa.fused.kernels.compiled`, for the cache on disk,
import from either. :mod:`nsa.fused.kernels.fa4_sm90` imports FlashAttention-4's kernel classes.
Most of the functions are for wgmma and for the layouts of its operands and results. The numbers of
the hardware are in :mod:`nsa.fused.hardware`.
"""

from flash_attn.cute.barrier import arrive_inc, wait_eq
from flash_attn.cute.copy_utils import atomic_add_fp32x4
from flash_attn.cute.utils import cvt_f16, fadd_reduce, fmax, fmax_reduce
from quack.copy_utils import (
    get_smem_store_C,
    load_s2r,
    partition_D_position_independent,
    store,
    store_v2,
    store_v4,
)
from quack.cute_dsl_utils import mlir_namedtuple
from quack.layout_utils import (
    mma_partition_C_vec,
    reshape_acc_to_frgA,
    reshape_acc_to_mn,
    transpose_view,
)
from quack.sm90_utils import (
    gemm,
    gemm_w_idx,
    gemm_zero_init,
    make_smem_layout,
    partition_fragment_ABC,
)
from quack.utils import (
    f32x2_to_i64,
    i64_to_f32x2,
    store_shared_remote,
    store_shared_remote_x4,
    warp_prefix_sum,
)

__all__ = [
    "arrive_inc",
    "atomic_add_fp32x4",
    "cvt_f16",
    "f32x2_to_i64",
    "fadd_reduce",
    "fmax",
    "fmax_reduce",
    "gemm",
    "gemm_w_idx",
    "gemm_zero_init",
    "get_smem_store_C",
    "i64_to_f32x2",
    "load_s2r",
    "make_smem_layout",
    "mlir_namedtuple",
    "mma_partition_C_vec",
    "partition_D_position_independent",
    "partition_fragment_ABC",
    "reshape_acc_to_frgA",
    "reshape_acc_to_mn",
    "store",
    "store_shared_remote",
    "store_shared_remote_x4",
    "store_v2",
    "store_v4",
    "transpose_view",
    "wait_eq",
    "warp_prefix_sum",
]
