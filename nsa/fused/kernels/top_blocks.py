"""The best-scored blocks of each row of scores (paper Eq. 11), in one pass over memory.

A warp reads one row: the scores of a query tile and head against compressed tokens. Only scores
that reach the ``n``-th best so far are looked at twice. Blocks that beat it wait in shared memory
until there are 32 to sort and merge into the best, which lie in registers, the best first
(:mod:`nsa.fused.kernels.best_blocks`).

Where blocks and groups of a row are wanted, two warps of a CTA read it at about the same time, so
that memory is read once.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import WARP
from nsa.fused.kernel_inputs import MAX_BLOCKS
from nsa.fused.kernels.best_blocks import (
    FORCED,
    LOWEST,
    NO_RANK,
    BestBlocks,
    rank_of,
    sorted_lanes,
)
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import check_tensor, fake_flat

_WARPS = 4
# Loads that a thread issues together, before it uses the first.
_LOADS = 16


@mlir_namedtuple
class _Tensors(NamedTuple):
    """What :func:`top_blocks` takes."""

    scores: cute.Tensor
    first: cute.Tensor
    visible: cute.Tensor
    candidates: cute.Tensor
    own: cute.Tensor
    out: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the scores and of ``out``, where the scores start in it, and the forced blocks."""

    sequences: Int32
    heads: Int32
    tiles: Int32
    columns: Int32
    total_tiles: Int32
    tile_offset: Int32
    column_offset: Int32
    num_initial: Int32
    num_local: Int32


class TopBlocks:
    """``count`` best of blocks of ``per_block`` scores.

    ``lanes_per_block`` neighbouring lanes share a block, so that a warp's loads are neighbours. In
    a round each lane has one block (or a part), in a step ``rounds`` of them.
    """

    def __init__(self, count: int, per_block: int):
        self.count = count
        self.per_block = per_block
        self.lanes_per_block = math.gcd(per_block, WARP)
        self.loads = per_block // self.lanes_per_block
        self.rounds = max(1, _LOADS // self.loads)
        self.blocks_per_round = WARP // self.lanes_per_block
        self.blocks_per_step = self.blocks_per_round * self.rounds
        self.best = BestBlocks(count)

    @cute.jit
    def __call__(self, tensors: _Tensors, sizes: _Sizes, scale: Float32, stream):
        rows = sizes.sequences * sizes.heads * sizes.tiles
        self.kernel(tensors, sizes, scale).launch(
            grid=[cute.ceil_div(rows, _WARPS), 1, 1],
            block=[_WARPS * WARP, 1, 1],
            stream=stream,
            # Without it the compiler saves registers and waits after every few loads.
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, sizes: _Sizes, scale: Float32):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        self.take(tensors, sizes, scale, bidx * _WARPS + warp, _waiting(warp), lane)

    @cute.jit
    def take(
        self,
        tensors: _Tensors,
        sizes: _Sizes,
        scale: Float32,
        row: Int32,
        sWaiting: cute.Tensor,
        lane: Int32,
    ):
        """Write the best blocks of a row, by a warp."""
        sequences, heads, tiles, columns, total_tiles, *rest = sizes
        tile_offset, column_offset, num_initial, num_local = rest
        # Past the end, the last row is done again. Late tiles see most and start first; the heads
        # of a tile are neighbours in the output.
        sequence_heads = sequences * heads
        row = cutlass.min(row, sequence_heads * tiles - 1)
        sequence_head, tile = row % sequence_heads, tiles - 1 - row // sequence_heads
        index = tile_offset + tile
        start = tensors.first[index] - column_offset
        candidates, own = tensors.candidates[index], tensors.own[index]
        # Whatever the tensors say, nothing is read outside of the row.
        visible = cutlass.min(tensors.visible[index], columns - start) if start >= 0 else Int32(0)
        offset = (Int64(sequence_head) * tiles + tile) * columns + start
        mRow = cute.make_tensor(tensors.scores.iterator + offset, cute.make_layout(columns))

        # Forced blocks: 0 .. initial_end - 1 and local_begin .. local_end - 1.
        local_end = cutlass.min(own + 1, candidates)
        initial_end = cutlass.max(cutlass.min(num_initial, local_end), 0)
        local_begin = cutlass.max(own + 1 - num_local, initial_end)
        num_forced = initial_end + cutlass.max(local_end - local_begin, 0)
        num_blocks = (cutlass.max(visible, 0) + (self.per_block - 1)) // self.per_block
        num_blocks = cutlass.min(num_blocks, candidates) if num_forced < self.count else Int32(0)
        limit = cutlass.min(visible, num_blocks * self.per_block)

        rBest = cute.make_rmem_tensor(self.best.registers, Int64)
        for r in cutlass.range_constexpr(self.best.registers):
            slot = r * WARP + lane
            block = slot if slot < initial_end else local_begin + slot - initial_end
            rBest[r] = Int64(FORCED) - block if slot < num_forced else Int64(NO_RANK)

        # What a block has to reach: rank and score of the last of the ``count`` best.
        bar, bar_score = Int64(NO_RANK), Float32(LOWEST)
        num_waiting = Int32(0)
        num_steps = (num_blocks + (self.blocks_per_step - 1)) // self.blocks_per_step
        for i in cutlass.range(num_steps, unroll=1):
            # The last step first: it alone may be short, and late blocks often score best.
            step = num_steps - 1 if i == 0 else i - 1
            block = step * self.blocks_per_step + lane // self.lanes_per_block
            flags = Int32(0)
            if i == 0:
                flags, bar_score = self._promising(mRow, block, lane, limit, scale, bar_score)
            else:
                flags, bar_score = self._promising(mRow, block, lane, None, scale, bar_score)
            # Of all lanes that share the block.
            for bit in cutlass.range_constexpr(self.lanes_per_block.bit_length() - 1):
                flags = flags | cute.arch.shuffle_sync_bfly(flags, offset=1 << bit)
            # Each block has its own next round, so that few times serve all rounds.
            while cute.arch.vote_any_sync(flags != 0):
                # The lowest bit that is set, then cleared.
                round_index, promising = cute.arch.popc((flags & -flags) - 1), flags != 0
                flags = flags & (flags - 1)
                seen = block + round_index * self.blocks_per_round
                score = scale * self._block_maximum(mRow, seen, lane, limit)
                score = self._over_lanes(score)
                rank = rank_of(score, seen)
                free = seen >= initial_end and (seen < local_begin or seen >= local_end)
                # Not true of NaN.
                wanted = score >= bar_score and rank > bar and free and promising
                if const_expr(self.lanes_per_block > 1):
                    wanted = wanted and lane % self.lanes_per_block == 0
                ballot = cute.arch.vote_ballot_sync(wanted)
                if wanted:
                    before = ballot & ((Int32(1) << lane) - 1)
                    sWaiting[num_waiting + cute.arch.popc(before)] = rank
                num_waiting += cute.arch.popc(ballot)
                cute.arch.sync_warp()
                if num_waiting >= WARP:
                    waiting, rest = sWaiting[lane], sWaiting[lane + WARP]
                    cute.arch.sync_warp()
                    num_waiting -= WARP
                    if lane < num_waiting:
                        sWaiting[lane] = rest
                    self.best.merge(rBest, waiting, lane)
                    bar, bar_score = self.best.bar(rBest)
        waiting = sWaiting[lane] if lane < num_waiting else Int64(NO_RANK)
        self.best.merge(rBest, waiting, lane)

        out_row = Int64(sequence_head // heads) * total_tiles + index
        out_offset = (out_row * heads + sequence_head % heads) * self.count
        self.best.write(rBest, tensors.out, out_offset, lane)

    @cute.jit
    def _promising(
        self,
        mRow: cute.Tensor,
        block: Int32,
        lane: Int32,
        limit: Int32 | None,
        scale: Float32,
        bar_score: Float32,
    ) -> tuple[Int32, Float32]:
        """Rounds of a step, as bits, in which this lane's part of a block reaches ``bar_score``.

        And ``bar_score``, raised to what ``count`` blocks of the step reach. ``block`` is that of
        the first round. Without a ``limit`` all of the step lies in the row.
        """
        stride = const_expr(self.blocks_per_round * self.per_block)
        loaded = []
        if const_expr(limit is None):
            first = block * self.per_block + lane % self.lanes_per_block
            mStep = cute.make_tensor(mRow.iterator + first, cute.make_layout(stride * self.rounds))
            for u in cutlass.range_constexpr(self.rounds):
                loads = range(self.loads)
                loaded.append([mStep[u * stride + i * self.lanes_per_block] for i in loads])
        else:
            for u in cutlass.range_constexpr(self.rounds):
                seen = block + u * self.blocks_per_round
                loaded.append(self._load_block(mRow, seen, lane, limit))
        scores = [scale * functools.reduce(cute.arch.fmax, loads) for loads in loaded]
        best = functools.reduce(cute.arch.fmax, scores, Float32(-math.inf))  # for NaN
        # In most steps of a long row no lane, or few, have such a block.
        reaching = cute.arch.vote_ballot_sync(best >= bar_score)
        if const_expr(self.lanes_per_block == 1 and self.count <= WARP):  # noqa: SIM102
            if cute.arch.popc(reaching) >= self.count:
                # As many lanes as there are blocks to take have one that is as good.
                bar_score = cute.arch.shuffle_sync(sorted_lanes(best, lane), self.count - 1)
        flags = Int32(0)
        if reaching != 0:
            for u in cutlass.range_constexpr(self.rounds):
                flags = flags | (Int32(1 << u) if scores[u] >= bar_score else Int32(0))
        return flags, bar_score

    def _load_block(self, mRow, block, lane, limit) -> list[Float32]:
        """This lane's scores of ``block``, -inf past the ``limit``."""
        first = block * self.per_block + lane % self.lanes_per_block
        columns = [first + i * self.lanes_per_block for i in range(self.loads)]
        # Loads without a condition go out together; what is not wanted is replaced.
        loaded = [mRow[cutlass.min(column, limit - 1)] for column in columns]
        return [_where(c < limit, x, -math.inf) for c, x in zip(columns, loaded, strict=True)]

    def _block_maximum(self, mRow, block, lane, limit) -> Float32:
        loaded = self._load_block(mRow, block, lane, limit)
        return functools.reduce(cute.arch.fmax, loaded)

    def _over_lanes(self, score: Float32) -> Float32:
        """The largest of the lanes that share a block."""
        stride = self.lanes_per_block // 2
        while stride:
            score = cute.arch.fmax(score, cute.arch.shuffle_sync_bfly(score, offset=stride))
            stride //= 2
        return score


class TopBlocksAndGroups:
    """Both of each row, for the same sequences."""

    def __init__(self, count: int, per_block: int, group_count: int, per_group: int):
        self.blocks = TopBlocks(count, per_block)
        self.groups = TopBlocks(group_count, per_group)

    @cute.jit
    def __call__(self, blocks: _Tensors, groups: _Tensors, sizes: _Sizes, scale: Float32, stream):
        rows = sizes.sequences * sizes.heads * sizes.tiles
        self.kernel(blocks, groups, sizes, scale).launch(
            grid=[cute.ceil_div(rows, _WARPS // 2), 1, 1],
            block=[_WARPS * WARP, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, blocks: _Tensors, groups: _Tensors, sizes: _Sizes, scale: Float32):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        sWaiting, row = _waiting(warp), bidx * (_WARPS // 2) + warp // 2
        if warp % 2 == 0:
            self.blocks.take(blocks, sizes, scale, row, sWaiting, lane)
        else:
            forced_none = sizes._replace(num_initial=Int32(0), num_local=Int32(0))
            self.groups.take(groups, forced_none, scale, row, sWaiting, lane)


@cute.jit
def _waiting(warp: Int32) -> cute.Tensor:
    """Shared memory of a warp for blocks that wait."""
    smem = cutlass.memory.SmemAllocator()
    layout = cute.make_layout((_WARPS, 2 * WARP), stride=(2 * WARP, 1))
    return smem.allocate_tensor(Int64, layout, byte_alignment=16)[warp, None]


@cute.jit
def _where(condition: Boolean, x: Float32, y: float) -> Float32:
    return x if condition else Float32(y)


@kept
def compile_top_blocks(count: int, per_block: int) -> Callable:
    """The compiled kernel of a number of blocks and a block size."""
    integers = [fake_flat(Int32, alignment=4) for _ in range(5)]
    return compile_kernel(
        TopBlocks(count, per_block),
        _Tensors(fake_flat(Float32, alignment=4), *integers),
        _Sizes(*(Int32(1) for _ in range(9))),
        Float32(1.0),
    )


@kept
def compile_both(count: int, per_block: int, group_count: int, per_group: int) -> Callable:
    """The compiled kernel for blocks and groups."""
    both = [
        _Tensors(
            fake_flat(Float32, alignment=4), *(fake_flat(Int32, alignment=4) for _ in range(5))
        )
        for _ in range(2)
    ]
    sizes = _Sizes(*(Int32(1) for _ in range(9)))
    kernel = TopBlocksAndGroups(count, per_block, group_count, per_group)
    return compile_kernel(kernel, *both, sizes, Float32(1.0))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for count in (1, 16, 64, MAX_BLOCKS):
        for per_block in (1, 3, 4, 128):
            name = f"top-blocks-{count}-{per_block}"
            yield name, functools.partial(compile_top_blocks, count, per_block)
    for forms in ((16, 1, 16, 32), (16, 4, 40, 128), (3, 2, 2, 6)):
        name = f"top-blocks-and-groups-{'-'.join(map(str, forms))}"
        yield name, functools.partial(compile_both, *forms)


def top_blocks(
    scores: Tensor,
    first: Tensor,
    visible: Tensor,
    candidates: Tensor,
    own: Tensor,
    out: Tensor,
    *,
    tile_offset: int,
    column_offset: int,
    scale: float,
    per_block: int,
    num_initial: int,
    num_local: int,
) -> None:
    """See :func:`nsa.fused.kernel_calls.top_blocks`."""
    vectors = (first, visible, candidates, own)
    _check(scores, *vectors, out, tile_offset, num_initial, num_local)
    batch, heads, tiles, columns = scores.shape
    if batch * heads * tiles == 0:
        return
    sizes = (batch, heads, tiles, columns, out.shape[1], tile_offset, column_offset)
    compile_top_blocks(out.shape[-1], per_block)(
        _Tensors(_flat_scores(scores), *vectors, out.view(-1)),
        _Sizes(*sizes, num_initial, num_local),
        scale,
    )


def top_blocks_and_groups(
    scores: Tensor,
    first: Tensor,
    visible: Tensor,
    candidates: Tensor,
    own: Tensor,
    blocks: Tensor,
    groups: Tensor,
    *,
    tile_offset: int,
    column_offset: int,
    scale: float,
    per_block: int,
    per_group: int,
    num_initial: int,
    num_local: int,
) -> None:
    """See :func:`nsa.fused.kernel_calls.top_blocks_and_groups`."""
    _check(scores, first, visible, candidates, own, blocks, tile_offset, num_initial, num_local)
    _check(scores, first, visible, visible, own, groups, tile_offset, 0, 0)
    batch, heads, tiles, columns = scores.shape
    if batch * heads * tiles == 0:
        return
    flat_scores = _flat_scores(scores)
    sizes = (batch, heads, tiles, columns, blocks.shape[1], tile_offset, column_offset)
    compile_both(blocks.shape[-1], per_block, groups.shape[-1], per_group)(
        _Tensors(flat_scores, first, visible, candidates, own, blocks.view(-1)),
        _Tensors(flat_scores, first, visible, visible, own, groups.view(-1)),
        _Sizes(*sizes, num_initial, num_local),
        scale,
    )


def _flat_scores(scores: Tensor) -> Tensor:
    # A kernel takes no empty tensor; of this one nothing is read.
    return scores.view(-1) if scores.shape[-1] else scores.new_empty(1)


def _check(
    scores: Tensor,
    first: Tensor,
    visible: Tensor,
    candidates: Tensor,
    own: Tensor,
    out: Tensor,
    tile_offset: int,
    num_initial: int,
    num_local: int,
) -> None:
    """Raise on what the kernels cannot take."""
    batch, heads, tiles, _ = scores.shape
    total_tiles, count = out.shape[1], out.shape[-1]
    device = scores.device
    check_tensor("scores", scores, scores.shape, torch.float32, device)
    check_tensor("out", out, (batch, total_tiles, heads, count), torch.int32, device)
    tensors = dict(first=first, visible=visible, candidates=candidates, own=own)
    for name, x in tensors.items():
        check_tensor(name, x, (total_tiles,), torch.int32, device)
    tensors.update(scores=scores, out=out)
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}; it must be contiguous")
    if not 1 <= count <= MAX_BLOCKS:
        raise ValueError(f"out has room for {count} blocks; it must be for 1 to {MAX_BLOCKS}")
    if num_initial + num_local > count:
        raise ValueError(
            f"num_initial + num_local is {num_initial} + {num_local}; it must be at most {count}"
        )
    if not 0 <= tile_offset <= total_tiles - tiles:
        raise ValueError(
            f"tile_offset is {tile_offset}; it must be 0 to {total_tiles - tiles}, so that {tiles} "
            f"tiles fit the {total_tiles} of out"
        )
