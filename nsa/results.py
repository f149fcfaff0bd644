"""Memory of the caller that a backend may write its results to."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Results:
    """Where a call may write its output, and its backward gradients.

    A backend that writes ``out`` or ``dq`` returns the same memory, else another tensor. Rows may
    be slices of heads. One that adds to ``keys`` returns no gradient of ``k`` and ``v``. Each is
    set before the pass and cleared after it.

    Attributes:
        out: in the form of the output.
        dq: in the form of the queries.
        keys: the backend's :class:`nsa.fused.key_sums.CallSums`.
    """

    out: Tensor | None = None
    dq: Tensor | None = None
    keys: Any = None
