"""The seam: what the fused stages ask of the attention kernels, and nothing about how it is done.

``nsa.fused.fa4`` answers these four calls with FlashAttention-4; tests answer them with PyTorch on
a CPU, in any float dtype. Callers write ``fa4.dense_forward(...)``, so that a test can replace the
functions of that module. For all four:

- Query head ``h`` attends KV head ``h // (H / H_kv)``.
- ``scale`` multiplies ``q @ k^T``. Softmax is over the visible keys of a query. A query that sees
  none gets output 0 and ``lse`` -inf, and sends no gradient.
- ``lse`` is float32: the natural logarithm of the sum of ``exp(scale * q . k)`` over visible keys.
- Inputs may be strided (copied unless the last dimension is contiguous). ``out`` and ``lse`` are
  contiguous, a gradient is laid out as its input; all but ``lse`` are in the dtype of ``q``.
  Gradients with respect to ``k`` and ``v`` are summed over the heads of a group.
- Forward gives the same bits each time; backward adds into float32 in any order.
- Values that no query may see must still be finite: they are multiplied by 0, not skipped.
- Backward takes ``dout`` of ``out`` alone; no gradient flows through ``lse``.

``dense_forward(q, k, v, *, scale, causal, window_size, key_times, cu_seqlens_q, cu_seqlens_k,
max_seqlen_q, max_seqlen_k, out, lse) -> (out, lse)`` and
``dense_backward(dout, q, k, v, out, lse, *, ...the same, dq) -> (dq, dk, dv)``

    Batched ``q (B, Sq, H, D)``, ``k (B, Sk, H_kv, D)``, ``v (B, Sk, H_kv, Dv)``,
    ``out (B, Sq, H, Dv)``, ``lse (B, H, Sq)``. Packed, with ``cu_seqlens_*`` int32 ``(S + 1,)``:
    ``q (Tq, H, D)``, ``k (Tk, H_kv, D)``, ``lse (H, Tq)``; ``max_seqlen_*`` bound the lengths.
    Sequences may end before the tensors do: results past them are not written, nor is ``out`` read
    there by backward. Results are written to ``out`` and ``lse``, or ``dq``, where given; these may
    be strided.

    Positions are aligned at the end: query ``i`` of ``Sq`` stands at key ``p = i + Sk - Sq``.
    ``window_size=(left, right)`` shows it keys ``p - left`` to ``p + right`` inclusive, None is no
    bound; ``causal`` sets ``right`` to 0. ``key_times=(stride, first)`` excludes both and aligns
    nothing: query ``i`` sees keys ``j`` with ``j * stride + first <= i``. ``Dv`` may differ from
    ``D``, in backward only where ``H == H_kv``.

``sparse_forward(q, k, v, lists, *, scale, causal, key_limit) -> (out, lse)`` and
``sparse_backward(dout, q, k, v, out, lse, lists, *, scale, causal, key_limit) -> (dq, dk, dv)``

    ``q (1, Tq, H, D)``, ``k (1, Tk, H_kv, D)``, ``v (1, Tk, H_kv, Dv)``, ``lse (1, H, Tq)``.
    A query sees the keys of the blocks listed for its block, if the mask agrees: ``causal`` is
    ``key <= query`` and needs ``Tq == Tk``; ``key_limit`` int32 ``(Tq,)`` is
    ``key < key_limit[query]``; not both. ``lists`` are by query block in forward and transposed,
    by key block, in backward; both must name the same pairs.
"""

from typing import NamedTuple

from torch import Tensor


class BlockLists(NamedTuple):
    """Which key blocks each query block of each head attends, or the transpose of that.

    Forward: a row is a query block and entries are key blocks. Backward: a row is a key block and
    entries are query blocks. The last block of either kind may be short. Entries of a row ascend,
    do not repeat, and appear in at most one of the two lists; entries past the count are not read.

    Attributes:
        partial_count: int32 ``(1, H, rows)``, blocks to which the mask is applied.
        partial_index: int32 ``(1, H, rows, width)``, ``1 <= width <= number of blocks``.
        full_count: the same for blocks whose every pair is visible: the mask is skipped there.
            None if there are none.
        full_index: likewise; its width may differ.
        query_block: queries in a block, a multiple of 64.
        key_block: keys in a block, 64 or 128.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor | None
    full_index: Tensor | None
    query_block: int
    key_block: int
