"""Tensors without data that FlashAttention-4's kernels are compiled with; lengths are symbols.

A symbol in two tensors is a length that they share, which each call is checked for.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from nsa.fused.fa4_call import Call, Semaphores
from nsa.fused.fa4_variants import Variant
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.kernels.vectors import CUTE_DTYPES

_NONE = ((),) * 4


class Fakes:
    """Those of a variant: a method for each argument, or a few."""

    def __init__(self, variant: Variant):
        self.variant, self.element = variant, CUTE_DTYPES[variant.dtype]
        batch, queries, keys, self.heads, key_heads = (cute.sym_int() for _ in range(5))
        # Heads of one CTA lie side by side and count as one.
        self.key_heads = key_heads if variant.adds_keys else self.heads
        self.leading = () if variant.packed else (batch,)
        self.queries, self.keys = queries, keys
        self.rows = cute.sym_int()
        self.bounds = self.starts = None
        if variant.packed:
            self.sequences = cute.sym_int()
            self.bounds = self.of_sequences()
            self.starts = self.of_sequences() if variant.many else None

    def of_sequences(self) -> cute.Tensor:
        return fake(Int32, (self.sequences,), aligned=False)

    def call(self) -> Call:
        variant, mask = self.variant, self.variant.mask
        q, k, v, *_ = variant.repeated or _NONE
        # Keys of blocks have an entry for each segment of queries.
        leading = self.leading if mask.block_stride is None else (cute.sym_int(),)
        keys = (*leading, self.keys, self.key_heads)
        query_shape = (*self.leading, self.queries, self.heads, cute.sym_int())
        return Call(
            q=fake(self.element, query_shape, repeated=q),
            k=fake(self.element, (*keys, cute.sym_int()), repeated=k),
            v=fake(self.element, (*keys, cute.sym_int()), repeated=v),
            scale=Float32(1.0),
            mask=mask,
            window=tuple(Int32(1) if bound else None for bound in (mask.left, mask.right)),
            bounds=(self.bounds, self.of_sequences() if variant.packed else None),
            lists=None if variant.blocks is None else self.lists(),
            limit=fake(Int32, (cute.sym_int(),), aligned=False) if mask.limited else None,
        )

    def out(self, repeated: tuple[int, ...] = ()) -> cute.Tensor:
        shape = (*self.leading, self.queries, self.heads, cute.sym_int())
        return fake(self.element, shape, repeated=repeated)

    def dout(self) -> cute.Tensor:
        *_, repeated = self.variant.repeated or _NONE
        return self.out(repeated)

    def lse(self) -> cute.Tensor:
        shape = (*self.leading, self.heads, self.queries)
        strides = tuple(cute.sym_int64() for _ in shape)
        return cute.runtime.make_fake_tensor(Float32, shape, stride=strides, assumed_align=4)

    def statistics(self) -> RowStatistics:
        rows = (*self.leading, self.heads, self.rows)
        return RowStatistics(fake(Float32, rows), fake(Float32, rows))

    def lists(self) -> tuple[cute.Tensor, ...]:
        shape = (cute.sym_int(), self.heads, cute.sym_int())
        shapes = (shape, (*shape, cute.sym_int()), shape, (*shape, cute.sym_int()))
        return tuple(fake(Int32, shape, aligned=False) for shape in shapes)

    def query_sums(self) -> cute.Tensor:
        return fake(Float32, (*self.leading, self.heads, cute.sym_int()))

    def semaphores(self) -> Semaphores:
        if not self.variant.deterministic:
            return Semaphores()
        count = 3 if self.variant.adds_keys else 1
        shapes = [tuple(cute.sym_int() for _ in range(4)) for _ in range(count)]
        return Semaphores(*(fake(Int32, shape, aligned=False) for shape in shapes))

    def key_sums(self) -> tuple[cute.Tensor, cute.Tensor]:
        leading = self.leading if self.variant.mask.block_stride is None else (cute.sym_int(),)
        return tuple(fake(Float32, (*leading, self.key_heads, cute.sym_int())) for _ in range(2))

    def key_gradients(self) -> tuple[cute.Tensor, cute.Tensor]:
        shape = (*self.leading, self.keys, self.key_heads)
        return tuple(fake(self.element, (*shape, cute.sym_int())) for _ in range(2))


def fake(
    element: type[cutlass.Numeric],
    shape: tuple,
    *,
    repeated: tuple[int, ...] = (),
    aligned: bool = True,
) -> cute.Tensor:
    """Of stride 1 in the last dimension and 0 in the ``repeated`` ones; rows start at multiples of
    16 bytes where ``aligned``."""
    vector = 128 // element.width if aligned else 1
    strides = [cute.sym_int64(divisibility=vector) for _ in shape[:-1]]
    for dim in repeated:
        strides[dim] = 0
    return cute.runtime.make_fake_tensor(
        element, shape, stride=(*strides, 1), assumed_align=vector * element.width // 8
    )
