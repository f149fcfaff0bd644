"""Parts of the layer: rotary embedding, tokens of compressed blocks, gradients of biases, and the
product of all projections."""

from collections.abc import Sequence

from torch import Tensor

from nsa.blocks import BlockPlaces
from nsa.fused import kernels


def rotate(
    x: Tensor,
    other: Tensor | None,
    bounds: Tensor | None,
    origin: Tensor | None,
    start: float,
    step: int,
    theta: float,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotary embedding: channels ``i`` and ``i + D/2`` turn by ``position * theta ** (-2i/D)``.

    The position of a row is ``start + step * index``. Angles are as exact at any position.

    Args:
        x: ``(..., R, H, D)``, bfloat16 or float16; D a multiple of 16 up to 256. Slices of heads
            are read in place.
        other: a second tensor with the same rows and channels, and its own heads; or None.
        bounds: int32 ``(S + 1,)``, where the rows of each packed sequence start, then where the
            last end; ``index`` counts from 0 in each. None: it counts in each entry of a batch.
        origin: int32 ``(S,)``, where ``index`` 0 of each packed sequence would lie; None where its
            rows start.
        start: a multiple of 1/2.
        step: positions from row to row.
        theta: base of the wavelengths, at least 1.
        inverse: turn back.

    Returns:
        ``x`` and ``other`` rotated, contiguous.
    """
    return kernels.load("rotation").rotate(**locals())


def gather_blocks(x: Tensor, position: Tensor, places: BlockPlaces) -> Tensor:
    """``rows[m, h, i] = x[start(m) + i, h] + position[i]``, rounded once.

    Args:
        x: ``(..., T, H_kv, D)``, bfloat16, float16 or float32; D a multiple of 8. Slices of heads
            are read in place.
        position: ``(l, D)`` in the dtype of ``x``; or ``(P, l, D)``, one for each of P equal parts
            of the heads.
        places: the blocks. A row of no block has the positions alone.

    Returns:
        ``(M, H_kv, l, D)`` in the dtype of ``x`` for the M rows of ``places``; with P positions
        ``(P, M, H_kv / P, l, D)``.
    """
    return kernels.load("block_rows").gather_blocks(**locals())


def scatter_blocks(drows: Tensor, shape: tuple[int, ...], places: BlockPlaces) -> Tensor:
    """Gradient of the ``x`` of :func:`gather_blocks`: ``dx[t]`` adds up the rows of its blocks.

    Args:
        drows: ``(M, H_kv, l, D)`` or ``(P, M, H_kv / P, l, D)``. Copied if it is not contiguous.
        shape: that of ``x``.
        places: as in forward.

    Returns:
        ``shape`` in the dtype of ``drows``, summed in float32 and rounded once.
    """
    return kernels.load("block_rows").scatter_blocks(**locals())


def activation_gradient(kind: str, dy: Tensor, x: Tensor, sums: Tensor) -> Tensor | None:
    """The gradient of an activation, and its sums of columns: the gradient of a bias before it.

    Args:
        kind: ``"sigmoid"`` or ``"silu"``.
        dy: the gradient of the output, in whose place that of the input is written. Like ``x``,
            contiguous.
        x: ``(rows, columns)`` or ``(parts, rows, columns)``, bfloat16 or float16: for ``"sigmoid"``
            the output, for ``"silu"`` the input. Copied if it is not contiguous.
        sums: ``(columns,)`` or ``(parts, columns)`` in the dtype of ``x``, contiguous. The sums of
            the gradient over rows are written there. They are of float32 numbers, rounded once, in
            an order that depends on the shape alone.

    Returns:
        For ``"silu"`` the output, else None.
    """
    return kernels.load("column_sums").activation_gradient(**locals())


def column_sums(x: Tensor, sums: Tensor, other: Tensor | None, other_sums: Tensor | None) -> None:
    """``sums = x.sum(-2)``, in float32 and rounded once, in an order that depends on shapes alone.

    Args:
        x: ``(rows, columns)`` or ``(parts, rows, columns)``, bfloat16 or float16. Copied if it is
            not contiguous.
        sums: ``(columns,)`` or ``(parts, columns)`` in the dtype of ``x``, contiguous: written.
        other, other_sums: another such pair, or None.
    """
    return kernels.load("column_sums").column_sums(**locals())


def split_product(
    product: Tensor,
    heads: int,
    kv_heads: int,
    branches: int,
    head_dim: int,
    width: int,
    bounds: Tensor | None,
    theta: float,
) -> tuple[Tensor, ...]:
    """Queries, and keys and values of each branch, of a product that has them side by side.

    Queries and keys are rotated as by :func:`rotate`, each row by its index in its sequence.

    Args:
        product: ``(B, T, C)``, bfloat16 or float16. Columns are those of ``H`` heads of queries,
            then for each branch those of ``H_kv`` heads of keys and as many of values; any others
            come last. Copied if it is not contiguous.
        heads, kv_heads: ``H`` and ``H_kv``.
        branches: those with keys of their own.
        head_dim: channels D of a head, a multiple of 16 up to 256.
        width: channels W of a head in the results, such a multiple too; those past D are 0.
        bounds: int32 ``(S + 1,)``, where each packed sequence starts, then where the last ends.
            None: each entry of a batch is one.
        theta: base of the wavelengths, at least 1.

    Returns:
        Queries ``(B, T, H, W)``, and of each branch keys and values ``(B, T, H_kv, W)``.
    """
    return kernels.load("product").split_product(**locals())


def product_gradient(
    gradients: Sequence[Tensor],
    dhidden: Tensor | None,
    drows: Tensor | None,
    places: BlockPlaces | None,
    head_dim: int,
    bounds: Tensor | None,
    theta: float,
) -> Tensor:
    """The gradient of the ``product`` of :func:`split_product`, of which all columns are used.

    Args:
        gradients: of queries ``(B, T, H, W)``, and of keys and values of each branch
            ``(B, T, H_kv, W)``, in one dtype, bfloat16 or float16. Slices of heads are read in
            place.
        dhidden: of the columns past those of heads, ``(B, T, .)`` or ``(B * T, .)``; None without
            any.
        drows: of the rows of compressed blocks of the first branch's keys and values,
            ``(2, M, H_kv, l, D)``; None without a compressor. Copied if it is not contiguous.
        places: the blocks, with ``drows``.
        head_dim, bounds, theta: as in forward.

    Returns:
        ``(B, T, C)``, each element rounded once.
    """
    return kernels.load("product").product_gradient(**locals())
