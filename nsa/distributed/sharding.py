"""Cut a tensor among ranks and put it together, and where a rank's tokens stand."""

import torch
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup

from nsa.distributed.collectives import Gathering, agree, process_group
from nsa.distributed.order import Pieces, check_order, make_pieces
from nsa.packing import Packing
from nsa.validation import check_new_tensors

Mesh = DeviceMesh | ProcessGroup
Bounds = Tensor | Packing | None


def shard(
    x: Tensor, mesh: Mesh, dim: int, order: str = "head-tail", *, cu_seqlens: Bounds = None
) -> Tensor:
    """This rank's part of ``x``, which every rank has whole; a copy, differentiable.

    Args:
        x: any tensor.
        mesh, order: as in :func:`nsa.distributed.forward`.
        dim: the sequence dimension of ``x``, of ``N`` tokens.
        cu_seqlens: boundaries of packed sequences, which ``"head-tail-each"`` needs if ``x`` has
            more than one.

    Returns:
        ``x`` with ``N / P`` tokens in ``dim``: no rank sends anything.

    Raises:
        TypeError, ValueError: an argument is wrong, or ``N`` (with ``"head-tail-each"`` the length
            of a sequence) is not a multiple of the number of pieces.
    """
    group = process_group(mesh)
    pieces = _pieces(_tokens(x, dim), group, order, cu_seqlens)
    return x.index_select(dim, pieces.tokens(group.rank()).to(x.device))


def unshard(
    x: Tensor, mesh: Mesh, dim: int, order: str = "head-tail", *, cu_seqlens: Bounds = None
) -> Tensor:
    """The whole tensor on every rank, from the parts that :func:`shard` gives.

    It has no gradient: summing the gradients of all ranks would be wrong if each computes the same
    loss, and taking one's own part would be wrong if not. Compute a loss of own tokens instead.

    Args:
        x: this rank's part, of one shape and dtype on all ranks.

    Raises:
        TypeError, ValueError: an argument is wrong, or ranks differ; or ``x`` requires a gradient
            in grad mode.
    """
    group = process_group(mesh)
    facts, problem = {"function": "unshard", "dim": dim, "order": order}, None
    try:
        _tokens(x, dim)
        check_order(order)
        _check_no_gradient(x)
        facts |= {"shape of x": tuple(x.shape), "dtype of x": str(x.dtype)}
        facts["cu_seqlens"] = describe_bounds(cu_seqlens)
    # Whatever it is, the other ranks must learn of it.
    except Exception as found:
        problem = found
    agree(group, facts, problem)
    pieces = _pieces(x.shape[dim] * group.size(), group, order, cu_seqlens)
    rows = Gathering(x.detach().movedim(dim, 0), group).wait()
    return rows.index_select(0, pieces.place().to(x.device)).movedim(0, dim).contiguous()


def positions(
    length: int,
    mesh: Mesh,
    order: str = "head-tail",
    *,
    cu_seqlens: Bounds = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The position of each of this rank's tokens in its sequence, for position embeddings.

    Args:
        length: tokens ``N`` of all ranks.
        mesh, order: as in :func:`nsa.distributed.forward`.
        cu_seqlens: boundaries of packed sequences.
        device: of the result; by default that of ``cu_seqlens``, or torch's default.

    Returns:
        int64 ``(N / P,)``.

    Raises:
        TypeError, ValueError: as in :func:`shard`.
    """
    group = process_group(mesh)
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int, got {type(length).__name__}")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    check_new_tensors(None, device)
    tokens = _pieces(length, group, order, cu_seqlens).tokens(group.rank())
    if device is None:
        device = torch.get_default_device() if cu_seqlens is None else _bounds(cu_seqlens).device
    if cu_seqlens is not None:
        bounds = _bounds(cu_seqlens).to("cpu", torch.int64)
        tokens = tokens - bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
    return tokens.to(device)


def read_lengths(cu_seqlens: Bounds) -> tuple[int, ...] | None:
    """Tokens of each sequence, read on the host."""
    if cu_seqlens is None:
        return None
    packing = cu_seqlens if isinstance(cu_seqlens, Packing) else Packing(cu_seqlens)
    if packing.lengths is None:
        raise ValueError("cu_seqlens must have values that the host can read, got a traced tensor")
    if packing.lengths_k != packing.lengths:
        raise ValueError(
            "cu_seqlens must have as many queries as keys in each sequence, got a Packing with "
            "other boundaries of keys"
        )
    return tuple(packing.lengths)


def describe_bounds(cu_seqlens) -> str | None:
    """Text that differs if the boundaries do; short enough for a message if there are few."""
    if cu_seqlens is None:
        return None
    try:
        lengths = read_lengths(cu_seqlens)
    except (TypeError, ValueError) as problem:
        return str(problem)
    return f"lengths {list(lengths or ())}"


def _tokens(x, dim) -> int:
    """The size of ``x`` in its sequence dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be one of the {x.ndim} dimensions of x, got {dim}")
    return x.shape[dim]


def _check_no_gradient(x: Tensor):
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x must not require a gradient, because unshard has none: a sum over ranks would be "
            "wrong if each computes the same loss, its own part if not; use x.detach()"
        )


def _bounds(cu_seqlens: Tensor | Packing) -> Tensor:
    return cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens


def _pieces(length: int, group: ProcessGroup, order: str, cu_seqlens: Bounds) -> Pieces:
    lengths = read_lengths(cu_seqlens)
    if lengths is not None and sum(lengths) != length:
        raise ValueError(f"cu_seqlens must end at the {length} tokens, got {sum(lengths)}")
    return make_pieces(length, group.size(), check_order(order), lengths)
