"""Memory of the caller that a backend may write its results to."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Results:
    """Where a call may write its output, and its backward the gradient of the queries.

    A backend that does returns the same memory, else another tensor. Rows may be slices of heads.
    Each is set before the pass and cleared after it.

    Attributes:
        out: in the form of the output.
        dq: in the form of the queries.
    """

    out: Tensor | None = None
    dq: Tensor | None = None
