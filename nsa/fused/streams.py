"""Work that runs side by side, where no kernel of it fills the GPU for long.

Only while a graph of short inputs is captured: launched one by one, their kernels end before the
host has launched what could run beside them. Long inputs gain nothing where kernels fill the GPU,
and their workspace would be split.
"""

from functools import lru_cache

import torch
from torch import Tensor

from nsa.host import is_capturing

SHORT = 1 << 27
"""Elements of the queries up to which work is captured side by side: 32K tokens, H=32, D=128."""


class SideStream:
    """Work beside what is launched after this is made and before its ``with`` block.

    The block's work waits for what was launched before, and what is launched after it waits for
    both. It goes first where both are ready: it should be the one with the small kernels, which
    would else wait for the other's last.

    What the block allocates may be used after it. Its memory is given out again in a later block
    alone, and so only after all that was launched before that was made.
    """

    def __init__(self, q: Tensor):
        self._inside = None
        if is_capturing(q) and q.numel() <= SHORT:
            self._outside = torch.cuda.current_stream(q.device)
            self._stream = _side_stream(q.device)
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
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Of high priority: kernels that come later wait for all blocks of those before, if these are
    # not of less.
    return torch.cuda.Stream(device, priority=-1)
