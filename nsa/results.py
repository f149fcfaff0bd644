"""What a caller and a backend agree on beside arguments and results: where results are written, and
when keys may be read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Results:
    """Where a call may write its output, and its backward gradients; and when it may read.

    A backend that writes ``out`` or ``dq`` returns the same memory, else another tensor. Rows may
    be slices of heads. One that adds to ``keys`` returns no gradient of ``k`` and ``v``. Each is
    set before the pass and cleared after it.

    Attributes:
        out: in the shape of the output.
        dq: in the shape of the queries.
        keys: the backend's :class:`nsa.fused.key_sums.CallSums`.
        before_keys: to be called before the forward reads ``k`` or ``v``.
    """

    out: Tensor | None = None
    dq: Tensor | None = None
    keys: Any = None
    before_keys: Callable[[], None] | None = None

    def may_read_keys(self):
        if self.before_keys is not None:
            self.before_keys()
