"""Softmax of the kernels of decoding, relative to integer references.

The exponentials of a row are relative to ``2^m`` with an integer ``m``. With
``y = scale * log2(e) * score`` and ``n = round(y)``, a key's exponential is ``2^(y - n)`` times
``2^(n - m)``. The first factor depends on the score alone, and a product with a power of two is
exact. So equal keys get equal results wherever they lie and however the keys are split.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from nsa.fused.decode_inputs import NO_REFERENCE, SLOT_GROUP
from nsa.fused.hardware import QUAD

# 1.5 * 2^23: a float32 of moderate size added to it is rounded to an integer, which is what its
# bits are above these.
_ROUNDER = 12582912.0
_ROUNDER_BITS = 0x4B400000
# Exponentials that are smaller than by this power of two are as if by this one.
_LEAST_EXPONENT = -125


@cute.jit
def softmax(
    accs, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, low, high,
    lane: Int32, scale_log2: Float32,
):  # fmt: skip
    """Turn products into exponentials relative to ``reference``, which rises with them.

    ``accs[u]`` is for 16 keys, of which row ``r`` of the thread's two sees those from
    ``low[r][u]`` up to but without ``high[r][u]``. ``total`` has this thread's sums.
    """
    first, units = lane % QUAD * 4, const_expr(len(accs))
    hidden = Boolean(False)
    for u in cutlass.range_constexpr(units):
        for r in cutlass.range_constexpr(2):
            hidden = hidden or low[r][u] > 0 or high[r][u] < SLOT_GROUP
    hidden = cute.arch.vote_any_sync(hidden)
    # Rounded exponents, as the bits of a float above those of none.
    bits = [[cute.make_rmem_tensor(4, Int32) for _ in range(units)] for _ in range(2)]
    for r in cutlass.range_constexpr(2):
        for u in cutlass.range_constexpr(units):
            for q in cutlass.range_constexpr(4):
                place = q % 2 + 2 * r + 4 * (q // 2)
                score = accs[u][place]
                rounded = cute.math.fma(score, scale_log2, Float32(_ROUNDER))
                rest = cute.math.fma(score, scale_log2, Float32(_ROUNDER) - rounded)
                accs[u][place] = cute.math.exp2(rest, fastmath=True)
                bits[r][u][q] = rounded.bitcast(Int32)
    if hidden:
        for r in cutlass.range_constexpr(2):
            for u in cutlass.range_constexpr(units):
                for q in cutlass.range_constexpr(4):
                    seen = first + q >= low[r][u] and first + q < high[r][u]
                    n = bits[r][u][q]
                    bits[r][u][q] = n if seen else Int32(NO_REFERENCE + _ROUNDER_BITS)
    for r in cutlass.range_constexpr(2):
        largest = bits[r][0][0]
        for u in cutlass.range_constexpr(units):
            for q in cutlass.range_constexpr(4):
                largest = cutlass.max(largest, bits[r][u][q])
        for offset in cutlass.range_constexpr(2):
            other = cute.arch.shuffle_sync_bfly(largest, offset=1 << offset)
            largest = cutlass.max(largest, other)
        before = reference[r] + Int32(_ROUNDER_BITS)
        largest = cutlass.max(largest, before)
        factor = power_of_two(before - largest)
        changed = cute.arch.vote_any_sync(before != largest)
        reference[r] = largest - Int32(_ROUNDER_BITS)
        if changed:
            total[r] = total[r] * factor
            for i in cutlass.range_constexpr(cute.size(acc_O) // 4):
                for c in cutlass.range_constexpr(2):
                    acc_O[c + 2 * r + 4 * i] = acc_O[c + 2 * r + 4 * i] * factor
        for u in cutlass.range_constexpr(units):
            for q in cutlass.range_constexpr(4):
                place = q % 2 + 2 * r + 4 * (q // 2)
                exponent = cutlass.max(bits[r][u][q] - largest, Int32(_LEAST_EXPONENT))
                shifted = accs[u][place].bitcast(Int32) + (exponent << 23)
                accs[u][place] = shifted.bitcast(Float32)
    if hidden:
        # What lies past the keys may be NaN.
        for r in cutlass.range_constexpr(2):
            for u in cutlass.range_constexpr(units):
                for q in cutlass.range_constexpr(4):
                    place = q % 2 + 2 * r + 4 * (q // 2)
                    seen = bits[r][u][q] != Int32(NO_REFERENCE + _ROUNDER_BITS)
                    power = accs[u][place]
                    accs[u][place] = power if seen else Float32(0.0)
    for r in cutlass.range_constexpr(2):
        for u in cutlass.range_constexpr(units):
            for q in cutlass.range_constexpr(4):
                total[r] = total[r] + accs[u][q % 2 + 2 * r + 4 * (q // 2)]


@cute.jit
def power_of_two(exponent: Int32) -> Float32:
    """``2^exponent`` for an exponent that is not positive, 0 where it is below -126."""
    bits = (exponent + 127) << 23
    bits = bits if exponent > -127 else Int32(0)
    return bits.bitcast(Float32)
