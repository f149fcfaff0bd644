"""Where a row of packed sequences lies, for kernels: no index as long as the rows is needed."""

import cutlass.cute as cute
from cutlass import Int32, const_expr


@cute.jit
def find_sequence(mBounds: cute.Tensor, row: Int32, sequences: Int32) -> Int32:
    """The sequence that holds ``row``: the last one that starts at or before it.

    ``mBounds (sequences + 1,)`` has the start of each sequence, then the end of the last. A row
    past the end counts as the last sequence's.
    """
    low, high = Int32(0), sequences
    while high - low > 1:
        middle = (low + high) // 2
        if mBounds[middle] <= row:
            low = middle
        else:
            high = middle
    return low


@cute.jit
def find_token(
    mBounds: cute.Tensor | None, token: Int32, sequences: Int32, entry_tokens: Int32
) -> tuple[Int32, Int32]:
    """The sequence that holds a token, and the token's index there.

    Without ``mBounds`` a sequence is an entry of a batch, which has ``entry_tokens``.
    """
    sequence = token // entry_tokens
    index = token % entry_tokens
    if const_expr(mBounds is not None):
        sequence = find_sequence(mBounds, token, sequences)
        index = token - mBounds[sequence]
    return sequence, index
