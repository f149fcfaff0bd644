"""Token mode's selected branch, the band: attention over a sequence's first block and the last two.

The paper's configuration has each token select the first block of its sequence, its own block and
the one before. Tokens of a block have these in common, so that one CTA (a warpgroup) keeps K and V
of all three in shared memory while the query rows of the block's tokens stream past, 64 at a time:
row r is query head ``r % G`` of token ``r // G``. They then need neither an index nor a partial
result each. A token sees those of the three that its list names, whatever the configuration.
"""

import functools
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils import LayoutEnum
from flash_attn.cute import utils
from quack import layout_utils, sm90_utils

from nsa.fused.kernels.forward_tiles import (
    QUAD,
    load_values,
    make_mmas,
    softmax,
    store_row,
    store_values,
)
from nsa.fused.kernels.rows import TILE_ROWS, load_rows, pair_and_head
from nsa.fused.kernels.vectors import CUTE_DTYPES, compile_kernel, fake_flat

_THREADS = 128
# In this order: the first block, the one before the tokens' own, their own.
_PARTS = 3
_SHARED_BYTES = 228 * 1024
# What the hardware takes of a CTA's shared memory.
_RESERVED_BYTES = 1024


def shared_bytes(head_dim: int, head_dim_v: int, block_size: int) -> int:
    elements = TILE_ROWS * head_dim + _PARTS * block_size * (head_dim + head_dim_v)
    return 2 * elements + 4 * _PARTS * block_size + _RESERVED_BYTES


def band_fits(head_dim: int, head_dim_v: int, block_size: int) -> bool:
    """Whether three blocks fit shared memory: not of 64 tokens with 256 channels of both."""
    return shared_bytes(head_dim, head_dim_v, block_size) <= _SHARED_BYTES


class BandForward:
    """Writes outputs and log2 of the sums of the tokens of all sequences, 0 and -inf for none."""

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        head_dim: int,
        head_dim_v: int,
        group: int,
        block_size: int,
        causal: bool,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.block_size = block_size
        self.causal = causal
        self.keys = _PARTS * block_size
        # Values pass through registers, which hold 192 rows of 128 channels at once.
        self.value_passes = _PARTS if head_dim_v > 128 else 1
        # Scores of 192 keys take 96 registers of a thread.
        self.ctas = min(3, _SHARED_BYTES // shared_bytes(head_dim, head_dim_v, block_size))

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mIndices: cute.Tensor,
        mBase: cute.Tensor,
        mFirst: cute.Tensor,
        mKeys: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        q_stride: Int64,
        k_stride: Int64,
        v_stride: Int64,
        blocks: Int32,
        slots: Int32,
        kv_heads: Int32,
        scale_log2: Float32,
        stream,
    ):
        q_smem, k_smem, v_smem = (
            sm90_utils.make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, shape)
            for shape in (
                (TILE_ROWS, self.head_dim),
                (self.keys, self.head_dim),
                (self.keys, self.head_dim_v),
            )
        )
        mma_qk, mma_pv = make_mmas(self.dtype, self.keys, self.head_dim_v)
        tensors = (mQ, mK, mV, mIndices, mBase, mFirst, mKeys, mOut, mLse)
        sizes = (q_stride, k_stride, v_stride, slots, kv_heads, scale_log2)
        self.kernel(*tensors, *sizes, mma_qk, mma_pv, q_smem, k_smem, v_smem).launch(
            grid=[blocks, kv_heads, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mIndices: cute.Tensor,
        mBase: cute.Tensor,
        mFirst: cute.Tensor,
        mKeys: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        q_stride: Int64,
        k_stride: Int64,
        v_stride: Int64,
        slots: Int32,
        kv_heads: Int32,
        scale_log2: Float32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        q_smem: cute.ComposedLayout,
        k_smem: cute.ComposedLayout,
        v_smem: cute.ComposedLayout,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        block, kv_head, _ = cute.arch.block_idx()
        # Of the block: tokens, and 0 where it is of no sequence.
        count = mKeys[block]
        if count > 0:
            first = mFirst[block]
            base = mBase[first]
            own = block - base

            smem = cutlass.utils.SmemAllocator()
            sQ, sK, sV = (
                smem.allocate_tensor(self.dtype, x.outer, 1024, swizzle=x.inner)
                for x in (q_smem, k_smem, v_smem)
            )
            # Of each part, the keys that a token sees.
            limits_layout = cute.make_layout((_PARTS, self.block_size))
            sLimits = smem.allocate_tensor(Int32, limits_layout, 16)

            key_place = functools.partial(self._key_place, mFirst[base], first, own, count)
            place = functools.partial(key_place, kv_head * self.head_dim, 0)
            load_rows(mK, sK, k_stride, place, tidx, _THREADS)
            load_queries = functools.partial(
                self._load_queries, mQ, sQ, q_stride, first, kv_head, count, tidx
            )
            load_queries(Int32(0))
            if tidx < self.block_size:
                token = cutlass.min(tidx, count - 1)
                row = Int64(first + token) * kv_heads + kv_head
                limits = self._limits(mIndices, row * slots, slots, own, token, count)
                for part in cutlass.range_constexpr(_PARTS):
                    sLimits[part, tidx] = limits[part]
            pass_rows = const_expr(self.keys // self.value_passes)
            for i in cutlass.range_constexpr(self.value_passes):
                sV_pass = cute.local_tile(sV, (pass_rows, self.head_dim_v), (i, 0))
                place = functools.partial(key_place, kv_head * self.head_dim_v, i * pass_rows)
                values = load_values(mV, sV_pass, v_stride, place, tidx)
                store_values(values, sV_pass, tidx)

            _, tSrQ, tSrK = sm90_utils.partition_fragment_ABC(
                mma_qk.get_slice(0), (TILE_ROWS, self.keys, self.head_dim), sQ, sK
            )
            _, tOrP, tOrVt = sm90_utils.partition_fragment_ABC(
                mma_pv.get_slice(0),
                (TILE_ROWS, self.head_dim_v, self.keys),
                None,
                layout_utils.transpose_view(sV),
            )
            tScS = layout_utils.reshape_acc_to_mn(
                mma_qk.get_slice(tidx).partition_C(
                    cute.make_identity_tensor((TILE_ROWS, self.keys))
                )
            )

            rows = count * self.group
            tiles = cute.ceil_div(rows, TILE_ROWS)
            for tile in cutlass.range(tiles, unroll=1):
                cute.arch.cp_async_commit_group()
                cute.arch.cp_async_wait_group(0)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier()
                acc_S = sm90_utils.gemm_zero_init(
                    mma_qk, (TILE_ROWS, self.keys), tSrQ, tSrK, wg_wait=-1
                )
                # A thread has two rows, this one and the 8th after it.
                row = tile * TILE_ROWS + tScS[0, 0][0]
                limits = cute.make_rmem_tensor((_PARTS, 2), Int32)
                for r in cutlass.range_constexpr(2):
                    token = cutlass.min((row + 8 * r) // self.group, count - 1)
                    for part in cutlass.range_constexpr(_PARTS):
                        limits[part, r] = sLimits[part, token]
                warpgroup.wait_group(0)
                # All warps have read the queries.
                cute.arch.barrier()
                if tile + 1 < tiles:
                    load_queries(tile + 1)
                acc_S_mn = layout_utils.reshape_acc_to_mn(acc_S)
                self._mask(acc_S_mn, tScS, limits)

                inverse_sum, lse = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
                for r in cutlass.range_constexpr(2):
                    inverse_sum[r], lse[r] = softmax(acc_S_mn[r, None], scale_log2, empty=True)
                utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_S), tOrP)
                # Stored before the scores are converted, ptxas waits after each wgmma (D=64, G=1).
                for r in cutlass.range_constexpr(2):
                    if tidx % QUAD == 0 and row + 8 * r < rows:
                        mLse[self._out_row(row + 8 * r, first, kv_heads, kv_head)] = lse[r]
                acc_O = sm90_utils.gemm_zero_init(
                    mma_pv, (TILE_ROWS, self.head_dim_v), tOrP, tOrVt, wg_wait=0
                )
                acc_O_mn = layout_utils.reshape_acc_to_mn(acc_O)
                for r in cutlass.range_constexpr(2):
                    acc_O_mn[r, None].store(acc_O_mn[r, None].load() * inverse_sum[r])
                rO = utils.cvt_f16(acc_O, self.dtype)
                for r in cutlass.range_constexpr(2):
                    if row + 8 * r < rows:
                        out_row = self._out_row(row + 8 * r, first, kv_heads, kv_head)
                        store_row(rO, r, mOut, out_row * self.head_dim_v)

    @cute.jit
    def _key_place(
        self,
        sequence_first: Int32,
        first: Int32,
        own: Int32,
        count: Int32,
        column: Int32,
        rows_before: int,
        i: Int32,
        more: int,
    ) -> tuple[Int32, Int32]:
        """Of a row of the parts. Where there is no key, another of the sequence, for what is
        masked must be finite.
        """
        part_row = rows_before + i + more
        part, row = part_row // self.block_size, part_row % self.block_size
        start = first
        if part == 0:
            start = sequence_first
        if part == 1 and own > 0:
            start = first - self.block_size
        return cutlass.min(start + row, first + count - 1), column

    @cute.jit
    def _load_queries(
        self,
        mQ: cute.Tensor,
        sQ: cute.Tensor,
        stride: Int64,
        first: Int32,
        kv_head: Int32,
        count: Int32,
        tidx: Int32,
        tile: Int32,
    ):
        """Rows past the tokens repeat heads of the last one; they are not stored."""

        def place(i: Int32, more: int) -> tuple[Int32, Int32]:
            pair, head = pair_and_head(tile, i, more, self.group)
            column = (kv_head * self.group + head) * self.head_dim
            return first + cutlass.min(pair, count - 1), column

        load_rows(mQ, sQ, stride, place, tidx, _THREADS)

    @cute.jit
    def _limits(
        self,
        mIndices: cute.Tensor,
        start: Int64,
        slots: Int32,
        own: Int32,
        token: Int32,
        count: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """How many keys of each part the token ``token`` of the block sees; no block counts twice.

        Its list is at ``start``.
        """
        sees_first, sees_before, sees_own = Int32(0), Int32(0), Int32(0)
        for i in cutlass.range(slots, unroll=4):
            listed = mIndices[start + i]
            sees_first = self.block_size if listed == 0 and own > 1 else sees_first
            sees_before = self.block_size if listed >= 0 and listed == own - 1 else sees_before
            sees_own = count if listed == own else sees_own
        if const_expr(self.causal):
            sees_own = cutlass.min(sees_own, token + 1)
        return sees_first, sees_before, sees_own

    @cute.jit
    def _mask(self, acc_S_mn: cute.Tensor, tScS: cute.Tensor, limits: cute.Tensor):
        """-inf for keys that a row does not see."""
        columns = const_expr(cute.size(acc_S_mn, mode=[1]) // _PARTS)
        for part in cutlass.range_constexpr(_PARTS):
            if cutlass.min(limits[part, 0], limits[part, 1]) < self.block_size:
                for r in cutlass.range_constexpr(2):
                    end = limits[part, r] + part * self.block_size
                    for c in cutlass.range_constexpr(part * columns, (part + 1) * columns):
                        visible = tScS[r, c][1] < end
                        acc_S_mn[r, c] = acc_S_mn[r, c] if visible else -Float32.inf

    @cute.jit
    def _out_row(self, row: Int32, first: Int32, kv_heads: Int32, kv_head: Int32) -> Int64:
        token = Int64(first + row // self.group)
        return (token * kv_heads + kv_head) * self.group + row % self.group


@functools.lru_cache(maxsize=None)
def compile_band(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    block_size: int,
    causal: bool,
) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]
    return compile_kernel(
        BandForward(cute_dtype, head_dim, head_dim_v, group, block_size, causal),
        *(fake_flat(cute_dtype) for _ in range(3)),
        *(fake_flat(Int32, alignment=4) for _ in range(4)),
        *(fake_flat(cute_dtype), fake_flat(Float32, alignment=4)),
        *(Int64(1) for _ in range(3)),
        *(Int32(1) for _ in range(3)),
        Float32(1.0),
    )


# Head dimensions of queries and values, and query heads of a KV head, that are compiled as a test.
_SHAPES = (
    *((64, 64, 1), (96, 96, 3), (128, 128, 16)),
    *((256, 128, 16), (64, 128, 3), (128, 256, 6)),
)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        for dim, dim_v, group in _SHAPES:
            size = 32 if group == 3 else 64
            for causal in (True, False) if group == 16 else (True,):
                arguments = (dtype, dim, dim_v, group, size, causal)
                form = f"{dim}-{dim_v}-{group}-{size}{'' if causal else '-all'}"
                name = f"band-forward-{str(dtype).removeprefix('torch.')}-{form}"
                yield name, functools.partial(compile_band, *arguments)
