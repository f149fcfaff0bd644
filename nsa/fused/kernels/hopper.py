"""What is used of FlashAttention-4 and quack-kernels, which no other file imports.

These are FlashAttention-4's kernel classes, the cache of compiled kernels, and functions that
kernels call, most of them for wgmma and the layouts of its operands and results. The numbers of the
hardware are in :mod:`nsa.fused.hardware`.
"""

from pathlib import Path

import flash_attn.cute
from flash_attn.cute.barrier import arrive_inc, wait_eq
from flash_attn.cute.block_info import BlockInfo
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.copy_utils import atomic_add_fp32x4
from flash_attn.cute.cu_blocks_kernel import CuSeqlensToBlocksKernel
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned
from flash_attn.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.mask import mask_r2p_lambda, r2p_bitmask_below, sm90_col_to_r2p_idx
from flash_attn.cute.named_barrier import NamedBarrierBwd
from flash_attn.cute.pack_gqa import make_packgqa_tiled_tma_atom
from flash_attn.cute.seqlen_info import SeqlenInfoQK
from flash_attn.cute.tile_scheduler import (
    SingleTileLPTBwdScheduler,
    SingleTileScheduler,
    SingleTileVarlenScheduler,
    TileSchedulerArguments,
    WorkTileInfo,
)
from flash_attn.cute.utils import (
    AuxData,
    cvt_f16,
    fadd_reduce,
    fmax,
    fmax_reduce,
    get_smem_store_atom,
    predicate_k,
    scalar_to_ssa,
)
from quack import copy_utils
from quack.cache import jit_cache
from quack.copy_utils import (
    get_smem_load_atom,
    get_smem_store_C,
    load_s2r,
    partition_D_position_independent,
    store,
    store_v2,
    store_v4,
    tma_get_copy_fn,
)
from quack.cute_dsl_utils import get_compile_target_capacity, mlir_namedtuple
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

FA4_SOURCES = Path(flash_attn.cute.__file__).parent
"""The folder of FlashAttention-4's kernels."""
