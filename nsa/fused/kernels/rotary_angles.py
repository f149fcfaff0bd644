"""Angles of the rotary position embedding, exact at any position and without a table.

The angle of a pair of channels is a fraction of a turn in 64-bit fixed point: ``2 * position`` is
an integer, half of the frequency is a fraction of ``2**64``, and their product modulo ``2**64``
drops whole turns without rounding. Its upper 32 bits are the angle to 1.5e-9, at any position. A
float32 angle would be wrong by some hundredths at a million tokens. A table would be as long as the
sequence.
"""

import functools
import math

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Float64, Int32, Int64

from nsa.fused.kernels.vectors import VECTOR

ROTATED_DTYPES = (torch.bfloat16, torch.float16)
_RADIANS = 2 * math.pi / 2**32  # of one unit of the upper 32 bits of an angle
_BITS = 4  # of the index of a vector of VECTOR channels in half a head, which has at most 16
MAX_HEAD_DIM = 2 * VECTOR * 2**_BITS


@cute.jit
def cos_sin(twice: Int64, vector: Int32, powers: tuple) -> tuple:
    """Cosines and sines of VECTOR pairs of channels, at half of the position ``twice``.

    The pairs are those of a vector of the first half of a head. ``powers`` are those of
    :func:`frequency_powers`.
    """
    scale = Float64(1.0)
    for b in cutlass.range_constexpr(_BITS):
        if (vector >> b) % 2 == 1:
            scale = scale * powers[VECTOR + b]
    cos, sin = (cute.make_rmem_tensor(VECTOR, Float32) for _ in range(2))
    for i in cutlass.range_constexpr(VECTOR):
        frequency = (powers[i] * scale).to(Int64)
        turn = Int32((frequency * twice) >> 32)
        angle = turn.to(Float32) * _RADIANS
        cos[i] = cute.math.cos(angle, approx=True)
        sin[i] = cute.math.sin(angle, approx=True)
    return cos.load(), sin.load()


@functools.lru_cache(maxsize=64)
def frequency_powers(theta: float, head_dim: int) -> tuple[float, ...]:
    """``2**63 / (2 * pi)`` times frequencies: of the first VECTOR channels, then those of channels
    ``VECTOR * 2**b`` over that of channel 0."""
    first = tuple(2**63 / (2 * math.pi) * theta ** (-2 * i / head_dim) for i in range(VECTOR))
    return first + tuple(theta ** (-2 * VECTOR * 2**b / head_dim) for b in range(_BITS))


def fake_powers() -> tuple:
    """Stand-ins for :func:`frequency_powers`, to compile with."""
    return (Float64(1.0),) * (VECTOR + _BITS)


def rotates_head_dim(head_dim: int) -> bool:
    """Whether heads of so many channels have halves of vectors, and not too many."""
    return head_dim % (2 * VECTOR) == 0 and head_dim <= MAX_HEAD_DIM
