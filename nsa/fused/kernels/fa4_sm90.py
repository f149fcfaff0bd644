"""FlashAttention-4's kernels for SM90: their classes, compiled as our own kernels are, and called.

What FA4's ``flash_attn/cute/interface.py`` (4.0.0b36) passes to the classes and to their kernels is
passed here; :mod:`nsa.fused.fa4_variants` has the tiles. Arguments go by the names in a class's
``__call__``, at compile time and at each call alike.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32
from torch import Tensor

from nsa.fused.fa4_call import (
    Call,
    Semaphores,
    Sums,
    in_segments,
    rounded_rows,
    rounded_up,
    side_by_side,
)
from nsa.fused.fa4_variants import (
    BackwardTile,
    Mask,
    Variant,
    backward_tile,
    forward_stages,
    forward_tile,
    tall_tile,
    values_from_registers,
)
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.fa4_blocks import BackwardOfBlocks
from nsa.fused.kernels.fa4_fakes import Fakes, fake
from nsa.fused.kernels.fa4_heads import BackwardThroughHeads
from nsa.fused.kernels.fa4_key_sums import ConvertKeySums
from nsa.fused.kernels.fa4_near_blocks import BackwardWithNearBlocks
from nsa.fused.kernels.fa4_seen_blocks import ForwardOfBlocks
from nsa.fused.kernels.fa4_tall import TallForward
from nsa.fused.kernels.hopper import (
    AuxData,
    BlockSparseTensors,
    CuSeqlensToBlocksKernel,
    FlashAttentionBackwardPostprocess,
    FlashAttentionBackwardSm90,
    FlashAttentionForwardSm90,
    scalar_to_ssa,
)
from nsa.fused.kernels.padded_rows import pad_statistics
from nsa.fused.kernels.vectors import CUTE_DTYPES

_ARCH = 90
_MMA_THREADS = 256  # of two warp groups, in backward
_THREADS = _MMA_THREADS + 128  # with those that load


def launch_forward(call: Call, out: Tensor, lse: Tensor):
    """Write output and log-sum-exp."""
    kernels, starts = forward_kernels(call.variant()), None
    if kernels.tile_starts is not None:
        starts = _tile_starts(kernels.tile_starts, call.bounds[0])
    kernels.main(*_forward_arguments(call, out, lse, starts))


def launch_backward(
    dout: Tensor,
    call: Call,
    statistics: RowStatistics,
    grads: tuple[Tensor | None, Tensor, Tensor],
    query_sums: Tensor | None = None,
):
    """Write the gradients of ``q``, ``k`` and ``v``; with ``query_sums``, add that of ``q``,
    without the scale, to these instead."""
    if call.mask.block_stride is not None:
        call = in_segments(call)
    variant, (bounds_q, bounds_k), (dq, dk, dv) = call.variant(dout), call.bounds, grads
    kernels = backward_kernels(variant)
    sums = Sums.new(call, variant, kernels.tile, query_sums)
    turns = Semaphores.new(call, variant, kernels.tile)
    starts_q = starts_k = None
    if variant.many:
        starts_q = _tile_starts(kernels.query_tile_starts, bounds_q)
        starts_k = _tile_starts(kernels.key_tile_starts, bounds_k)
    padded = _padded(statistics, call, kernels.tile.queries)
    written = (sums.dk, sums.dv) if variant.adds_keys else (dk, dv)
    by_heads = (call, dout, padded, sums.dq)
    if variant.heads_per_cta > 1:
        by_heads = _side_by_side(*by_heads, variant, kernels.tile)
    kernels.main(*_backward_arguments(*by_heads, turns, *written, starts_k))
    if query_sums is None:
        convert = kernels.convert_queries
        convert(*_conversion_arguments(sums.dq, dq, call.scale, bounds_q, starts_q))
    if variant.adds_keys:
        if variant.mask.block_stride is not None and variant.deterministic:
            sums = sums._replace(dk=sums.dk.sum(0, True), dv=sums.dv.sum(0, True))
        arguments = (sums.dk, sums.dv, dk, dv, call.scale, bounds_k, starts_k)
        kernels.convert_keys(*_key_conversion_arguments(*arguments))


def _side_by_side(
    call: Call,
    dout: Tensor,
    statistics: RowStatistics,
    dq: Tensor,
    variant: Variant,
    tile: BackwardTile,
) -> tuple[Call, Tensor, RowStatistics, Tensor]:
    """What is by query head, with the heads of a CTA side by side."""
    view = partial(side_by_side, heads=variant.heads_per_cta)
    q, dout = (view(x, size=variant.head_dim) for x in (call.q, dout))
    rows = tile.queries if variant.near_block is None else statistics.delta.shape[-1]
    statistics = RowStatistics(*(view(x, size=rows) for x in statistics))
    channels = rounded_up(variant.head_dim, tile.channels)
    return call._replace(q=q), dout, statistics, view(dq, size=tile.queries * channels)


def _padded(statistics: RowStatistics, call: Call, tile: int) -> RowStatistics:
    """The statistics in whole tiles, as the kernels load them."""
    if call.near_block is not None:
        return RowStatistics(*(x.flatten(-2) for x in statistics))
    bounds = call.bounds[0]
    _, rows = rounded_rows(call.q, bounds, tile)
    whole = bounds is None and rows == call.q.shape[1]
    if whole and all(_has_aligned_rows(x, tile) for x in statistics):
        return statistics
    return pad_statistics(statistics, rows, tile, bounds)


def _has_aligned_rows(x: Tensor, tile: int) -> bool:
    *strides, last = x.stride()
    aligned = last == 1 and x.data_ptr() % 16 == 0 and not any(stride % 4 for stride in strides)
    return aligned and strides[-1] % tile == 0


def _tile_starts(kernel: Callable, bounds: Tensor) -> Tensor:
    """The number of tiles before each sequence."""
    starts = torch.empty_like(bounds)
    kernel(*_tile_starts_arguments(starts, bounds))
    return starts


class ForwardKernels(NamedTuple):
    """Compiled kernels of a forward; ``tile_starts`` where there are many sequences."""

    main: Callable
    tile_starts: Callable | None


@lru_cache(maxsize=None)
def forward_kernels(variant: Variant) -> ForwardKernels:
    """What a forward of the variant calls, compiled if it is not yet."""
    heads = variant.group if variant.pack_heads else 1
    rows, _ = forward_tile(variant)
    starts = compile_tile_starts(rows, heads) if variant.many else None
    return ForwardKernels(compile_forward(variant), starts)


class BackwardKernels(NamedTuple):
    """Compiled kernels of a backward, and its tile; ``convert_keys`` where heads share a KV head,
    and the last two where there are many sequences."""

    tile: BackwardTile
    main: Callable
    convert_queries: Callable
    convert_keys: Callable | None
    query_tile_starts: Callable | None
    key_tile_starts: Callable | None


@lru_cache(maxsize=None)
def backward_kernels(variant: Variant) -> BackwardKernels:
    """What a backward of the variant calls, compiled if it is not yet."""
    tile, plain = backward_tile(variant), variant.plain()
    threads = 128 if tile.one_group else _MMA_THREADS
    queries = (tile.queries, threads, tile.query_atoms, tile.swap_queries, tile.channels)
    keys = (tile.keys, tile.key_atoms, tile.swap_keys, tile.channels)
    return BackwardKernels(
        tile,
        compile_backward(variant),
        compile_conversion(plain, *queries),
        compile_key_conversion(plain, *keys) if variant.adds_keys else None,
        compile_tile_starts(tile.queries, 1) if variant.many else None,
        compile_tile_starts(tile.keys, 1) if variant.many else None,
    )


def ordered(kernel_class: type, **arguments) -> list:
    """The arguments in the order of the class's ``__call__``; None for those not named."""
    return list(map(arguments.get, _parameters(kernel_class, *arguments)))


@lru_cache(maxsize=None)
def _parameters(kernel_class: type, *given: str) -> list[str]:
    """The arguments of its ``__call__``, the given ones among them, but the stream at the end."""
    _, *names, stream = inspect.signature(kernel_class.__call__).parameters
    if stream != "stream":
        raise TypeError(f"{kernel_class.__name__} takes {stream} last, not a stream")
    unknown = ", ".join(name for name in given if name not in names)
    if unknown:
        raise TypeError(f"{kernel_class.__name__} takes {', '.join(names)}, and got {unknown} too")
    return names


def _options(call: Call) -> dict[str, object]:
    """Arguments that the kernels of forward and backward name alike."""
    return dict(
        mQ=call.q,
        mK=call.k,
        mV=call.v,
        softmax_scale=call.scale,
        mCuSeqlensQ=call.bounds[0],
        mCuSeqlensK=call.bounds[1],
        window_size_left=call.window[0],
        window_size_right=call.window[1],
        blocksparse_tensors=None if call.lists is None else BlockSparseTensors(*call.lists),
        aux_data=AuxData(None if call.limit is None else [call.limit]),
    )


def _forward_arguments(call: Call, out: Tensor, lse: Tensor, starts: Tensor | None) -> list:
    options = _options(call)
    return ordered(FlashAttentionForwardSm90, mO=out, mLSE=lse, mCuTotalMBlocks=starts, **options)


def _backward_arguments(
    call: Call,
    dout: Tensor,
    statistics: RowStatistics,
    dq: Tensor,
    turns: Semaphores,
    dk: Tensor,
    dv: Tensor,
    starts: Tensor | None,
) -> list:
    rows = dict(mdO=dout, mLSE=statistics.lse_log2, mdPsum=statistics.delta)
    results = dict(mdQaccum=dq, mdK=dk, mdV=dv, mCuTotalMBlocks=starts)
    results |= dict(mdQ_semaphore=turns.dq, mdK_semaphore=turns.dk, mdV_semaphore=turns.dv)
    return ordered(FlashAttentionBackwardSm90, **_options(call), **rows, **results)


def _conversion_arguments(
    total: Tensor, grad: Tensor, scale: float, bounds: Tensor | None, starts: Tensor | None
) -> list:
    return ordered(
        FlashAttentionBackwardPostprocess,
        mdQaccum=total,
        mdQ=grad,
        scale=scale,
        mCuSeqlensQ=bounds,
        mCuTotalMBlocks=starts,
    )


def _key_conversion_arguments(
    dk_sums: Tensor,
    dv_sums: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    bounds: Tensor | None,
    starts: Tensor | None,
) -> list:
    return ordered(
        ConvertKeySums,
        mdKaccum=dk_sums,
        mdVaccum=dv_sums,
        mdK=dk,
        mdV=dv,
        scale=scale,
        mCuSeqlensK=bounds,
        mCuTotalNBlocks=starts,
    )


def _tile_starts_arguments(starts: Tensor, bounds: Tensor) -> list:
    return ordered(CuSeqlensToBlocksKernel, mCuBlocks=starts, mCuSeqlens=bounds)


@kept
def compile_forward(variant: Variant) -> Callable:
    """The compiled forward of a variant."""
    kernel_class = TallForward if tall_tile(variant) else FlashAttentionForwardSm90
    if variant.mask.block_stride is not None:
        kernel_class = partial(ForwardOfBlocks, step=variant.mask.block_stride)
    fakes = Fakes(variant)
    arguments = _forward_arguments(fakes.call(), fakes.out(), fakes.lse(), fakes.starts)
    return compile_kernel(forward_kernel(kernel_class, variant), *arguments)


def forward_kernel(kernel_class: Callable, variant: Variant) -> FlashAttentionForwardSm90:
    """A forward of a variant, to be compiled."""
    queries, keys = forward_tile(variant)
    return kernel_class(
        CUTE_DTYPES[variant.dtype],
        variant.head_dim,
        variant.value_dim,
        variant.group,
        is_causal=variant.mask.causal,
        is_local=variant.mask.local,
        pack_gqa=variant.pack_heads,
        tile_m=queries,
        tile_n=keys,
        num_stages=forward_stages(variant),
        num_threads=_THREADS,
        Q_in_regs=False,
        # A tall tile has no registers left for two products at a time.
        intra_wg_overlap=not tall_tile(variant),
        mma_pv_is_rs=values_from_registers(variant),
        mask_mod=_mask_function(variant.mask),
        has_aux_tensors=variant.mask.limited,
        q_subtile_factor=1 if variant.blocks is None else variant.blocks[0] // queries,
    )


@kept
def compile_backward(variant: Variant) -> Callable:
    """The compiled main kernel of the backward of a variant."""
    tile = backward_tile(variant)
    in_one_row = variant.deterministic and variant.packed
    kernel_class = _SemaphoresInOneRow if in_one_row else FlashAttentionBackwardSm90
    if variant.mask.block_stride is not None:
        kernel_class = partial(BackwardOfBlocks, step=variant.mask.block_stride)
    elif variant.heads_per_cta > 1 or variant.near_block is not None:
        kernel_class = BackwardThroughHeads
        if variant.near_block is not None:
            kernel_class = partial(BackwardWithNearBlocks, block_size=variant.near_block)
        kernel_class = partial(kernel_class, heads=variant.heads_per_cta, by_head=variant.mask.left)
    kernel = kernel_class(
        CUTE_DTYPES[variant.dtype],
        variant.head_dim,
        variant.value_dim,
        variant.group // variant.heads_per_cta,
        variant.mask.causal,
        is_local=variant.mask.local,
        deterministic=variant.deterministic,
        tile_m=tile.queries,
        tile_n=tile.keys,
        Q_stage=tile.stages,
        dO_stage=tile.dout_stages,
        PdS_stage=tile.sums_stages,
        SdP_swapAB=tile.swap_scores,
        dKV_swapAB=tile.swap_keys,
        dQ_swapAB=tile.swap_queries,
        AtomLayoutMSdP=1,
        AtomLayoutNdKV=tile.key_atoms,
        AtomLayoutMdQ=tile.query_atoms,
        num_threads=_THREADS,
        V_in_regs=False,
        mask_mod=_mask_function(variant.mask),
        has_aux_tensors=variant.mask.limited,
        q_subtile_factor=1 if variant.blocks is None else variant.blocks[0] // tile.queries,
        dQ_single_wg=tile.one_group,
    )
    fakes = Fakes(variant)
    dk_dv = fakes.key_sums() if variant.adds_keys else fakes.key_gradients()
    arguments = (
        fakes.call(),
        fakes.dout(),
        fakes.statistics(),
        fakes.query_sums(),
        fakes.semaphores(),
        *dk_dv,
    )
    return compile_kernel(kernel, *_backward_arguments(*arguments, fakes.starts))


class _SemaphoresInOneRow(FlashAttentionBackwardSm90):
    """Finds the semaphores of a packed sequence by where the rows of its sums start.

    FA4 gives each sequence as many as the longest needs, which may be too many for memory.
    """

    def dQaccum_store(self, mdQ, sdQ, block_info, scheduler, seqlen_info, lists, semaphores):
        turns = _InOneRow(
            semaphores, lambda sequence: seqlen_info(sequence).padded_offset_q // self.tile_m
        )
        super().dQaccum_store(mdQ, sdQ, block_info, scheduler, seqlen_info, lists, turns)

    def epilogue_dKV(self, acc_dV, mdV, sV, acc_dK, mdK, sK, seqlen, *others):
        *others, dk, dv = others
        if self.qhead_per_kvhead > 1:
            first = seqlen.padded_offset_k // self.tile_n
            dk, dv = (_InOneRow(x, lambda _: first) for x in (dk, dv))
        super().epilogue_dKV(acc_dV, mdV, sV, acc_dK, mdK, sK, seqlen, *others, dk, dv)


class _InOneRow:
    """Semaphores ``(tiles, 1, heads, 1)``, to be indexed ``(tile, 0, head, sequence)`` as FA4 does.

    ``first_tile`` says where the tiles of a sequence start.
    """

    def __init__(self, semaphores: cute.Tensor, first_tile: Callable):
        self.semaphores = semaphores
        self.first_tile = first_tile

    def __getitem__(self, index: tuple) -> cute.Tensor:
        tile, part, head, sequence = index
        tiles = self.semaphores[None, part, head, 0]
        tiles = cute.domain_offset((self.first_tile(sequence), 0), tiles)
        return tiles if tile is None else tiles[tile, None]


@kept
def compile_conversion(
    plain: Variant, rows: int, threads: int, atoms: int, swap: bool, channels: int
) -> Callable:
    """The compiled kernel that scales float32 sums of queries and rounds them to a gradient."""
    kernel = _conversion(
        FlashAttentionBackwardPostprocess, plain, rows, threads, atoms, swap, channels
    )
    fakes = Fakes(plain)
    arguments = (fakes.query_sums(), fakes.out(), Float32(1.0), fakes.bounds, fakes.starts)
    return compile_kernel(kernel, *_conversion_arguments(*arguments))


@kept
def compile_key_conversion(
    plain: Variant, rows: int, atoms: int, swap: bool, channels: int
) -> Callable:
    """The compiled kernel that does so with sums of keys and of values."""
    kernel = _conversion(ConvertKeySums, plain, rows, _MMA_THREADS, atoms, swap, channels)
    fakes = Fakes(plain)
    # They have the shapes of those of queries.
    sums, grads = ([make() for _ in range(2)] for make in (fakes.query_sums, fakes.out))
    arguments = (*sums, *grads, Float32(1.0), fakes.bounds, fakes.starts)
    return compile_kernel(kernel, *_key_conversion_arguments(*arguments))


def _conversion(
    kernel_class: Callable,
    plain: Variant,
    rows: int,
    threads: int,
    atoms: int,
    swap: bool,
    channels: int,
) -> FlashAttentionBackwardPostprocess:
    """A kernel for tiles of ``rows`` rows, to be compiled."""
    return kernel_class(
        CUTE_DTYPES[plain.dtype],
        plain.head_dim,
        _ARCH,
        tile_m=rows,
        num_threads=threads,
        AtomLayoutMdQ=atoms,
        dQ_swapAB=swap,
        hdim_multiple_of=channels,
    )


@kept
def compile_tile_starts(tile: int, heads: int) -> Callable:
    """The compiled kernel that counts tiles of ``tile`` rows, with ``heads`` rows a query."""
    bounds, starts = (fake(Int32, (cute.sym_int(),), aligned=False) for _ in range(2))
    kernel = CuSeqlensToBlocksKernel(tile=tile, seqlen_q_multiplier=heads)
    return compile_kernel(kernel, *_tile_starts_arguments(starts, bounds))


def _mask_function(mask: Mask) -> Callable | None:
    """The mask in the form that FA4 compiles into its kernels; None where it has it itself."""
    if mask.limited:
        return _limit_mask
    return None if mask.block_ends is None else _block_ends_mask(*mask.block_ends)


@cute.jit
def _limit_mask(batch, head, query, key, seqlen_info, aux_tensors):
    """Keys before ``aux_tensors[0][query]``."""
    return key < scalar_to_ssa(aux_tensors[0][query[0]], cutlass.Int32)


def _block_ends_mask(stride: int, first: int) -> Callable:
    """Keys with ``key * stride + first <= query``."""

    @cute.jit
    def block_ends_mask(batch, head, query, key, seqlen_info, aux_tensors):
        ends = key * scalar_to_ssa(stride, cutlass.Int32) + scalar_to_ssa(first, cutlass.Int32)
        return ends <= query

    return block_ends_mask
