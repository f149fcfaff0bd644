"""How the compressed branch of a decoding step is split, and when its kernels start."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from nsa.fused.decode_inputs import LEAST_SHARE, TILE_KEYS, DecodeRule
from nsa.fused.hardware import WARP
from nsa.fused.kernels.hopper import warp_prefix_sum

PDL = True
"""Whether a kernel of a step may start before the one before it has ended, to hide the launch."""


@cute.jit
def wait_for_previous():
    """Wait until the kernel before this one has ended, then let the next one start.

    A kernel that runs was let start by all CTAs of the one before it, which had waited by then. So
    what the kernels before that one wrote is there without waiting, and may be read. Nothing is
    written without waiting.
    """
    if const_expr(PDL):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()


@cute.jit
def num_tiles(rule: DecodeRule, start: Int32, new: Int32, limit: Int32) -> Int32:
    """Tiles of a sequence of up to ``limit`` tokens, if all its new tokens have a place."""
    slots = cutlass.min(start + new, limit) // rule.stride
    tiles = cute.ceil_div(slots, TILE_KEYS)
    return tiles if new > 0 and slots > rule.carried else Int32(0)


@cute.jit
def tile_share(tiles: Int32, ctas: Int32, whole_units: Int32) -> Int32:
    """See :func:`nsa.fused.decoding.tile_share`."""
    least = cutlass.min(cute.ceil_div(2 * tiles, ctas), LEAST_SHARE)
    share = cutlass.max(cute.ceil_div(tiles, ctas), cutlass.max(least, 1))
    if whole_units > 0:
        parts = whole_units * cutlass.max(ctas // whole_units, 1)
        whole = tiles // parts
        if whole * parts == tiles and whole >= share and whole * 32 <= share * 33:
            share = whole
    return share


def divide(x: Int32, by: Int32) -> tuple[Int32, Int32]:
    """Quotient and remainder of what is not negative."""
    # Unsigned, because // of signed numbers takes more instructions.
    quotient = Int32(Uint32(x) // Uint32(by))
    return quotient, x - quotient * by


@cute.jit
def unit_parts(
    mTiles: cute.Tensor, sequence: Int32, unit: Int32, sequence_units: Int32
) -> tuple[Int32, Int32]:
    """The slot of the first part of a unit of the sequence, and how many parts it has."""
    share = mTiles[0]
    start = mTiles[sequence + 1]
    tiles = mTiles[sequence + 2] - start
    first = start * sequence_units + unit * tiles
    cta, _ = divide(first, share)
    last, _ = divide(cutlass.max(first + tiles - 1, 0), share)
    count = last - cta + 1 if tiles > 0 else Int32(0)
    return cta + sequence * sequence_units + unit, count


class TileSchedule:
    """Which tiles a CTA of the compressed branch has. ``tensors`` and ``sizes`` are those of it."""

    def __init__(self, rule: DecodeRule):
        self.rule = rule

    @cute.jit
    def find_all(
        self, tensors, sizes, sequence_units: Int32
    ) -> tuple[Int32, Int32, tuple[Int32, Int32, Int32]]:
        """Tiles of a CTA, tiles of all sequences, and the extents of the lane's sequence.

        Where the append is the kernel before, a warp that has a lane for each sequence computes
        them from the lengths, without waiting for it.
        """
        lane = cute.arch.lane_idx()
        is_early = Boolean(False)
        if const_expr(tensors.lengths is not None):
            is_early = sizes.batch <= WARP
        share, total, extents = Int32(0), Int32(0), (Int32(0), Int32(0), Int32(0))
        if is_early:
            seen = cutlass.min(lane, sizes.batch - 1)
            start, new = Int32(0), sizes.tokens
            if const_expr(tensors.lengths is not None):
                start = tensors.lengths[seen]
            if const_expr(tensors.cu_seqlens is not None):
                new = tensors.cu_seqlens[seen + 1] - tensors.cu_seqlens[seen]
            tiles = num_tiles(self.rule, start, new, sizes.limit)
            tiles = tiles if lane < sizes.batch else Int32(0)
            after = warp_prefix_sum(tiles, lane)
            total = cute.arch.shuffle_sync(after, WARP - 1)
            share = tile_share(total * sequence_units, sizes.ctas, sizes.whole_units)
            extents = start, after - tiles, after
        else:
            wait_for_previous()
            # All loads together, of which each trip to memory delays the first tile.
            share, total = tensors.tiles[0], tensors.tiles[sizes.batch + 1]
            extents = self._extents(tensors, sizes, lane)
        return share, total, extents

    @cute.jit
    def _extents(self, tensors, sizes, sequence: Int32) -> tuple[Int32, Int32, Int32]:
        """Start, first tile and the tile after the last one, of a sequence or the last one."""
        seen = cutlass.min(sequence, sizes.batch - 1)
        return tensors.starts[seen], tensors.tiles[seen + 1], tensors.tiles[seen + 2]

    @cute.jit
    def find(
        self, tensors, sizes, sequence_units: Int32, tile: Int32, extents
    ) -> tuple[Int32, Int32, Int32, Int32]:
        """(Sequence, start, first tile, tiles) of the sequence of a tile.

        ``extents`` are those of the lane's sequence among the first ones.
        """
        lane = cute.arch.lane_idx()
        sequence, start, tile0, tiles = Int32(0), Int32(0), Int32(0), Int32(1)
        for begin in cutlass.range(0, sizes.batch, WARP, unroll=1):
            starts, first, after = extents
            if begin > 0:
                starts, first, after = self._extents(tensors, sizes, begin + lane)
            inside = first * sequence_units <= tile and tile < after * sequence_units
            found = cute.arch.vote_ballot_sync(inside and begin + lane < sizes.batch)
            if found != 0:
                source = cute.arch.popc((found & -found) - 1)
                sequence = begin + source
                start = cute.arch.shuffle_sync(starts, source)
                tile0 = cute.arch.shuffle_sync(first, source)
                tiles = cute.arch.shuffle_sync(after - first, source)
        return sequence, start, tile0, tiles
