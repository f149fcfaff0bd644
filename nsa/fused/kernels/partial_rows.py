"""Rows of partial outputs, as the selected branch of token mode keeps them between two kernels.

A quad of threads has a row, each thread the columns that it has in a wgmma accumulator: a vector of
8 neighbours in every 32. Vectors of float16 are stored as they are. bfloat16 has 8 bits; in its
place a vector can be packed, as eight integers of 11 bits and the exponent of the largest, in three
words. A row then has 3/4 of the bytes, and errs less: by at most 2^-10 of the vector's largest
number, where bfloat16 errs by up to 2^-8 of each. Numbers from 2^125 on become NaN, as infinity.

Rows are packed only beside a band. A token that sees one key has that key's value as its output,
which bfloat16 holds exactly and a packed vector does not: its ``dP - delta`` would not be 0. Beside
a band such keys are in the band.

In every 8 rows, the first four words of all threads are together, then the next four, and so on: a
warp stores, and loads, 512 neighbouring bytes at once.
"""

import functools

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from nsa.fused.hardware import QUAD
from nsa.fused.kernels.forward_tiles import GROUP_COLUMNS, row_words
from nsa.fused.kernels.hopper import store, store_v2, store_v4
from nsa.fused.kernels.vectors import VECTOR
from nsa.fused.waves import partial_words

# Rows whose words lie together.
_LOG2_ROWS = 3
_ROWS = 1 << _LOG2_ROWS
# Words of a 16-byte access.
_WIDTH = 4
_MANTISSA, _BIAS = 23, 127
_EXPONENT = 0xFF << _MANTISSA
# Bits of an integer; a number has one less and a sign.
_BITS = 11
_OFFSET = 1 << (_BITS - 1)
# A sum with 2^23 and the offset has the rounded number, plus the offset, in its lowest bits, and
# the bits of 2^23 above. Most numbers of a vector are shifted so far that these leave their word.
# Those of numbers 1, 6 and 7 would stay. So what is added to number 0, 2 or 4, which comes above it
# in the same word, is more by so much that the sum of both has none of them.
_ABOVE = (_BIAS + _MANTISSA) << _MANTISSA
_FIRST, _LATER = -(_ABOVE >> 11) % (1 << 20), -(_ABOVE >> 22) % (1 << _BITS)
ROUNDERS = [
    float((1 << _MANTISSA) + _OFFSET + more) for more in (_FIRST, 0, _LATER, 0, _LATER, 0, 0, 0)
]
# With this the largest number, rounded, does not have a bit more.
_MARGIN = 1 + 2.0**-9
# Exponents from here on have a scale that is a normal number.
_LEAST_EXPONENT = 12 << _MANTISSA
_SCALE = (2 * _BIAS + _BITS - 2 << _MANTISSA) - (1 << 32)
# An integer as the highest bits of a mantissa: of 1 + integer / 2048.
_ONE, _PLACE = _BIAS << _MANTISSA, _MANTISSA - _BITS
_INTEGER = ((1 << _BITS) - 1) << _PLACE


def join_integers(x: list[Int32], exponent: Int32) -> list[Int32]:
    """The words of a vector, from the bits of its numbers after rounding.

    Two integers have their lowest bit in the first word, the others in the other words. An exponent
    of infinity stays, whatever the bits."""
    return [
        (x[0] * (1 << 12) + x[1] * 2) | exponent | (x[6] & 1) | x[7] << 31,
        (x[6] >> 1) + x[3] * (1 << 10) + x[2] * (1 << 21),
        (x[7] >> 1) + x[5] * (1 << 10) + x[4] * (1 << 21),
    ]


class PartialRows:
    """How rows of ``head_dim_v`` numbers of ``dtype`` are kept, ``packed`` or not, in a tensor of
    Int32. Of rows in ``parts``, those of the same part of 8 rows lie together.

    A thread has ``words`` words of a row, which it loads to ``vectors`` places of 16 bytes.
    """

    def __init__(self, dtype: type[cutlass.Numeric], head_dim_v: int, packed: bool, parts: int = 1):
        self.dtype = dtype
        self.parts = parts
        self.groups = head_dim_v // GROUP_COLUMNS
        self.is_packed = packed
        self.words = partial_words(head_dim_v, self.is_packed) // QUAD
        self.vectors = -(-self.words // _WIDTH)
        # First word and number of words of each access.
        whole = self.words // _WIDTH * _WIDTH
        self.pieces = [(first, _WIDTH) for first in range(0, whole, _WIDTH)]
        for width in (2, 1):
            if self.words & width:
                self.pieces.append((whole, width))
                whole += width

    def place(self, row: Int32, lane: Int32) -> tuple[Int64, Int32]:
        """Where the words of the rows about ``row`` begin, and those of ``lane`` of its quad among
        them, in words a thread. The row that is 8 further begins ``8 * QUAD * words`` words later.
        """
        # Shifts of signed numbers take fewer instructions than // and %.
        rows = Int64(row >> _LOG2_ROWS) * (_ROWS * QUAD * self.words * self.parts)
        return rows, (row & (_ROWS - 1)) * QUAD + lane

    def _offset(
        self, place: tuple[Int64, Int32], part: Int32 | int, first: int, width: int
    ) -> Int64:
        """Of ``width`` words of a thread from ``first`` on."""
        rows, thread = place
        return rows + thread * width + _ROWS * QUAD * (part * self.words + first)

    def of_accumulator(self, acc: cute.Tensor, r: int) -> list[Int32]:
        """The words of row ``r`` of the two that a thread has in an accumulator."""
        sums = cute.make_tensor(acc.iterator, cute.size(acc))
        words = []
        for group in range(cute.size(acc) // (2 * VECTOR)):
            words += self._pack(
                [sums[2 * word + e] for word in row_words(r, group) for e in (0, 1)]
            )
        return words

    @cute.jit
    def store(
        self,
        words: list[Int32],
        mPartial: cute.Tensor,
        place: tuple[Int64, Int32],
        more: Int32,
        part: Int32 | int = 0,
    ):
        """Store the words of a row that is ``more`` rows, a multiple of 8, after ``place``.

        The stores are marked to leave L2 first: partial results are larger than L2.
        """
        further = Int64(more * (QUAD * self.words * self.parts))
        for first, width in self.pieces:
            offset = cute.assume(self._offset(place, part, first, width) + further, divby=width)
            chosen, pointer = words[first : first + width], mPartial.iterator + offset
            if const_expr(width == _WIDTH):
                store_v4(pointer, *chosen, cop="cs")
            elif const_expr(width == 2):
                store_v2(pointer, *chosen, cop="cs")
            else:
                store(pointer, *chosen, cop="cs")

    @cute.jit
    def load(
        self,
        mPartial: cute.Tensor,
        place: tuple[Int64, Int32],
        sWords: cute.Tensor,
        wanted: Boolean,
        part: Int32 | int = 0,
    ):
        """Start to copy a thread's words to ``sWords (vectors, 4)``, or zeros."""
        predicate = cute.make_rmem_tensor(1, Boolean)
        predicate[0] = wanted
        for first, width in self.pieces:
            # Through L2 only, where cp.async can.
            mode = cpasync.LoadCacheMode.GLOBAL if width == _WIDTH else cpasync.LoadCacheMode.ALWAYS
            atom = cute.make_copy_atom(
                cpasync.CopyG2SOp(cache_mode=mode), Int32, num_bits_per_copy=32 * width
            )
            offset = cute.assume(self._offset(place, part, first, width), divby=width)
            layout = cute.make_layout(((width, 1),))
            source = cute.make_tensor(mPartial.iterator + offset, layout)
            sPiece = sWords[first // _WIDTH, None]
            start = sPiece.iterator + first % _WIDTH
            cute.copy(atom, source, cute.make_tensor(start, layout), pred=predicate)

    def new_bias(self, positive: Int32) -> tuple[cute.Tensor, Int32]:
        """What :meth:`add` and :meth:`subtract` take: the bias, and 1.0 as an integer.

        ``positive`` is any argument of the kernel that is.
        """
        bias = cute.make_rmem_tensor((2, self.groups), Float32)
        bias.fill(0.0)
        # An instruction takes one constant, so two are needed if the compiler knows this one too.
        return bias, Int32(_ONE) + cutlass.min(positive, 0)

    @cute.jit
    def add(
        self,
        sums: cute.Tensor,
        bias: cute.Tensor,
        one: Int32,
        r: cutlass.Constexpr[int],
        sWords: cute.Tensor,
        share: Float32,
    ):
        """Add ``share`` times what :meth:`load` copied to row ``r`` of an accumulator's ``sums``.

        ``bias (2, groups)`` is then to be subtracted from each sum of a row and group.
        """
        words = cute.make_rmem_tensor((_WIDTH, self.vectors), Int32)
        for i in cutlass.range_constexpr(self.vectors):
            cute.autovec_copy(sWords[i, None], words[None, i])
        each = const_expr(self.words // self.groups)
        for group in cutlass.range_constexpr(self.groups):
            chosen = [words[group * each + i] for i in range(each)]
            if const_expr(self.is_packed):
                # Of 2^11 times the unit, because an integer is a fraction of that.
                scale = (chosen[0] & _EXPONENT).bitcast(Float32) * (share * 4.0)
                values = self._unpack(chosen, one)
                bias[r, group] += scale * 1.5
            else:
                scale, values = share, self._as_floats(chosen)
            for j, word in enumerate(row_words(r, group)):
                for e in cutlass.range_constexpr(2):
                    sums[2 * word + e] += values[2 * j + e] * scale

    @cute.jit
    def subtract(self, sums: cute.Tensor, bias: cute.Tensor):
        """The last step after :meth:`add`."""
        if const_expr(self.is_packed):
            for r in cutlass.range_constexpr(2):
                for group in cutlass.range_constexpr(self.groups):
                    for word in row_words(r, group):
                        for e in cutlass.range_constexpr(2):
                            sums[2 * word + e] -= bias[r, group]

    def _pack(self, values: list[Float32]) -> list[Int32]:
        """The words of a vector."""
        if not self.is_packed:
            vector = cute.make_rmem_tensor(VECTOR, Float32)
            for i, value in enumerate(values):
                vector[i] = value
            rounded = cute.make_rmem_tensor(VECTOR, self.dtype)
            rounded.store(vector.load().to(self.dtype))
            words = cute.recast_tensor(rounded, Int32)
            return [words[i] for i in range(VECTOR // 2)]
        # NaN is the largest.
        largest = functools.reduce(functools.partial(cute.arch.fmax, abs=True, nan=True), values)
        exponent = (largest * _MARGIN).bitcast(Int32) & _EXPONENT
        exponent = cutlass.max(exponent, _LEAST_EXPONENT)
        # 2^(9 - exponent)
        scale = (Int32(_SCALE) - exponent).bitcast(Float32)
        x = [
            (value * scale + rounder).bitcast(Int32)
            for value, rounder in zip(values, ROUNDERS, strict=True)
        ]
        return join_integers(x, exponent)

    def _unpack(self, words: list[Int32], one: Int32) -> list[Float32]:
        """1.5 + number / 2048 for the numbers of a vector, in units of its scale."""
        a, b, c = words
        low = 1 << _PLACE
        high = _INTEGER - low
        bits = [
            *(a & _INTEGER | one, (a << 11) & _INTEGER | one),
            *((b >> 9) & _INTEGER | one, (b << 2) & _INTEGER | one),
            *((c >> 9) & _INTEGER | one, (c << 2) & _INTEGER | one),
            *((b << 13) & high | one | (a << 12) & low, (c << 13) & high | one | (a >> 19) & low),
        ]
        return [x.bitcast(Float32) for x in bits]

    def _as_floats(self, words: list[Int32]) -> list[Float32]:
        vector = cute.make_rmem_tensor(VECTOR // 2, Int32)
        for i, word in enumerate(words):
            vector[i] = word
        values = cute.recast_tensor(vector, self.dtype).load().to(Float32)
        return [values[i] for i in range(VECTOR)]
