"""Which strides of queries, keys and gradients kernels read in place."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x (..., T, H, D)``, copied only if its rows are not as kernels read them."""
    return x if are_rows(x) else x.contiguous()


def are_rows(x: Tensor) -> bool:
    """Whether all rows ``(H, D)`` are contiguous, aligned to 16 bytes and at one distance.

    Slices of heads are such rows, and slices of the tokens of one sequence. Of several entries only
    if entries follow each other, because the means and the selected branch read one row of all.
    """
    *_, length, heads, channels = x.shape
    *entry, token, head, channel = x.stride()
    follow = x.ndim == 3 or x.shape[0] == 1 or entry[0] == length * token
    dense = channel == 1 and head == channels and token >= heads * channels
    offsets = (token, x.storage_offset())
    return follow and dense and not any(at * x.element_size() % 16 for at in offsets)


def is_alone(x: Tensor) -> bool:
    """Whether ``x`` is contiguous and has its memory to itself."""
    return x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
