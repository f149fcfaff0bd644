"""Runs work on a second stream, for kernels that do not fill the GPU.

This happens while a CUDA graph of short inputs is captured. Outside a graph, the kernels of short
inputs end before the host has launched what could run beside them. Long inputs gain nothing,
because their kernels fill the GPU, and their workspace would be split.
"""

from functools import lru_cache

import torch
from torch import Tensor

from nsa.host import is_capturing

SHORT = 1 << 27
"""The most elements of the queries for which a second stream is used: 32K tokens, H=32, D=128."""


class SideStream:
    """Runs a ``with`` block beside the work launched between this object's creation and the block.

    The block's work waits for all launches before the creation, and launches after the block wait
    for both. The block's kernels run first if both are ready. Put the smaller kernels in the block,
    because they would otherwise wait for the others to end.

    Tensors from the block may be used after it. Only a later block reuses their memory, and so only
    after all launches before that block's object was made.

    Args:
        q: the queries.
    """

    def __init__(self, q: Tensor):
        self._inside = None
        if is_capturing(q) and q.numel() <= SHORT:
            self._outside = torch.cuda.current_stream(q.device)
            # Within a block on the second stream, what runs beside needs a third.
            self._stream = next(x for x in _side_streams(q.device) if x != self._outside)
            self._stream.wait_stream(self._outside)
            self._inside = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        if self._inside is not None:
            self._inside.__enter__()

    def __exit__(self, *error) -> None:
        if self._inside is not None:
            self._inside.__exit__(*error)
            self._outside.wait_stream(self._stream)


@lru_cache(maxsize=None)
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    # High priority, because a kernel waits for all CTAs of earlier kernels unless those have a
    # lower priority.
    second, third = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
    return second, third
