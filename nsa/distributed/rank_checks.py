"""Checks of a call's arguments, on each rank and between them, before ranks wait for each other."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import DTensor

from nsa import backends, validation
from nsa.block_index_checks import check_block_indices
from nsa.boundaries import Boundaries, check_boundaries
from nsa.config import NSAConfig
from nsa.distributed.collectives import agree, process_group
from nsa.distributed.order import check_order
from nsa.distributed.rank_layout import Layout, Whole, make_layout
from nsa.distributed.sharding import describe_bounds, read_lengths
from nsa.host import is_capturing
from nsa.precision import autocast_tensors
from nsa.validation import UnsupportedError

# Their number of rows may differ from rank to rank.
_OWN_ROWS = ("compressed_kv", "block_indices")


class Part(NamedTuple):
    """This rank's checked arguments, as :mod:`nsa.call_checks` has them."""

    q: Tensor
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...] | None
    gate_proj_weight: Tensor | None
    gates: Tensor | None
    compress_k_weight: Tensor | None
    compress_v_weight: Tensor | None
    compressed_kv: tuple[Tensor, Tensor] | None
    block_indices: Tensor | None
    config: NSAConfig
    layout: Layout
    backend: ModuleType


def check_call(
    function: str,
    mesh: DeviceMesh | ProcessGroup,
    order: str,
    arguments: dict[str, Any],
    problem: Exception | None = None,
    *,
    learned: bool = False,
) -> Part:
    """Check the arguments of :func:`nsa.distributed.forward`, and that ranks give equal ones.

    Args:
        function: the name of the public function.
        learned: whether a learned compressor makes the blocks that are not given.
        problem: what is wrong already.

    Raises:
        Exception: on all ranks if on any.
    """
    part, group = None, process_group(mesh)
    facts: dict[str, Any] = {"function": function, "order": order}
    facts |= {"gradients": torch.is_grad_enabled(), "learned compressor": learned}
    try:
        if problem is None:
            # An argument that is not given is one that is None.
            given = {name: x for name, x in arguments.items() if x is not None}
            facts |= {name: _describe(name, x) for name, x in given.items()}
            _check_device(mesh, arguments["q"])
            part = _check(group, order, **arguments)
            facts |= _describe_part(part)
    # Whatever it is, the other ranks must learn of it.
    except Exception as found:
        problem = found
    agree(group, facts, problem)
    assert part is not None
    return part


def _check_device(mesh: DeviceMesh | ProcessGroup, q):
    if not isinstance(mesh, DeviceMesh) or not isinstance(q, Tensor):
        return  # others refuse what is no tensor
    if mesh.device_type != q.device.type:
        raise ValueError(f"q must be on a {mesh.device_type} device as mesh is, got {q.device}")


def _describe(name: str, x) -> Any:
    """What ranks must agree on in an argument."""
    if name == "cu_seqlens":
        return describe_bounds(x)
    if isinstance(x, (tuple, list)):
        return [_describe(name, item) for item in x]
    if not isinstance(x, Tensor):
        return repr(x)
    shape = tuple(x.shape)
    if name in _OWN_ROWS:
        shape = shape[-1:]
    gradient = ", requires a gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    return f"{x.dtype} {shape} on {x.device.type}{gradient}"


def _describe_part(part: Part) -> dict[str, Any]:
    """What ranks must agree on in arguments that are good."""
    facts = {"chosen backend": part.backend.__name__, "computed in": str(part.q.dtype)}
    if part.v is not None:
        # Each tensor is gathered once.
        name = "tensors for k selected, k window, v selected, v window"
        facts[name] = str(distinct(part.k, part.v)[1])
    return facts


def distinct(
    k: tuple[Tensor, ...], v: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Each tensor of the selected and window branches once, as flat rows; and for ``(k_slc, k_win,
    v_slc, v_win)`` which of them it is."""
    tensors = (*k[1:], *v[1:])
    once = list({id(x): x for x in tensors}.values())
    which = tuple(next(i for i, y in enumerate(once) if y is x) for x in tensors)
    return tuple(flat(x) for x in once), which


def _check(
    group: ProcessGroup,
    order: str,
    *,
    q,
    k,
    v=None,
    config=None,
    gate_proj_weight=None,
    gates=None,
    compress_k_weight=None,
    compress_v_weight=None,
    compressed_kv=None,
    block_indices=None,
    cu_seqlens=None,
    max_seqlen=None,
    max_workspace_bytes=None,
    recompute_window=False,
    deterministic=None,
    backend="auto",
) -> Part:
    check_order(order)
    config = validation.check_config(config)
    k = validation.per_branch("k", k)
    v = None if v is None else validation.per_branch("v", v)
    floats = (gate_proj_weight, gates, compress_k_weight, compress_v_weight, compressed_kv)
    q, k, v, *floats = autocast_tensors(q, k, v, *floats)
    gate_proj_weight, gates, compress_k_weight, compress_v_weight, compressed_kv = floats
    _refuse_dtensors(q, k, v, floats)
    problem = validation.check_qkv(q, k, v, config, cu_seqlens)
    if v is None:
        problem = validation.with_value_dim(problem, compressed_kv)
    check_equal_tokens(q, k)
    if is_capturing(q):
        raise ValueError(
            "q must not be captured in a CUDA graph: nsa.distributed compares ranks on the host"
        )
    layout = part_layout(group, order, config, q, cu_seqlens, max_seqlen)
    validation.check_gates(gates, gate_proj_weight, q, problem)
    _check_compression(compress_k_weight, compress_v_weight, compressed_kv, layout, q, problem)
    _check_block_indices(block_indices, layout, q, problem)
    validation.check_max_workspace_bytes(max_workspace_bytes)
    validation.check_flag("recompute_window", recompute_window)
    validation.check_deterministic(deterministic)
    module = _choose_backend(backend, q, k if v is None else v, layout)
    return Part(
        q, k, v, gate_proj_weight, gates, compress_k_weight, compress_v_weight, compressed_kv,
        block_indices, config, layout, module,
    )  # fmt: skip


def check_equal_tokens(q, k):
    """Refuse more keys than queries, which :func:`nsa.forward` takes; other checks do the rest."""
    first = validation.per_branch("k", k)[0]
    if isinstance(q, Tensor) and isinstance(first, Tensor) and q.ndim == first.ndim >= 3:
        tokens, keys = q.shape[-3], first.shape[-3]
        if tokens != keys:
            raise ValueError(f"k must have as many tokens as q, {tokens}, got {keys}")


def flat(x: Tensor) -> Tensor:
    """Batched ``(B, T, H, ...)`` to ``(B * T, H, ...)``; packed ``(T, H, ...)`` stays."""
    return x.flatten(0, 1) if x.ndim == 4 else x


def _refuse_dtensors(q, k, v, floats):
    for x in (q, *k, *(v or ()), *floats):
        for item in x if isinstance(x, (tuple, list)) else (x,):
            if isinstance(item, DTensor):
                raise TypeError(
                    "arguments must be this rank's tensors, got a DTensor: pass x.to_local()"
                )


def part_layout(
    group: ProcessGroup, order: str, config: NSAConfig, x: Tensor, cu_seqlens, max_seqlen
) -> Layout:
    """The layout of own tokens ``x (B, T, ...)`` or packed ``(T, ...)``."""
    return make_layout(_whole(group, x, cu_seqlens, max_seqlen), group, order, config, x)


def _whole(group: ProcessGroup, q: Tensor, cu_seqlens, max_seqlen) -> Whole:
    if cu_seqlens is None:
        check_boundaries(None, max_seqlen, q, q)
        batch, own = q.shape[:2]
        return Whole(batch, own * group.size(), None)
    # It has as many rows as the whole and no bytes.
    rows = q.new_empty(q.shape[0] * group.size(), 0)
    lengths = read_lengths(cu_seqlens)
    if sum(lengths or ()) != rows.shape[0]:
        raise ValueError(
            f"cu_seqlens must end at the {rows.shape[0]} tokens of all {group.size()} ranks, got "
            f"{sum(lengths or ())}"
        )
    check_boundaries(cu_seqlens, max_seqlen, rows, rows)
    return Whole(1, rows.shape[0], lengths)


def _check_compression(
    k_weight, v_weight, compressed_kv, layout: Layout, q: Tensor, problem: validation.Problem
):
    """Compressed blocks of the caller are those that own tokens complete."""
    blocks, boundaries = layout.num_own_blocks, None
    config = problem.config
    batch = problem.leading[0] if problem.batched else 1
    each = blocks // max(1, batch)
    if batch == 0 and isinstance(compressed_kv, tuple) and compressed_kv:
        # There is nothing to count them by, and they have no elements.
        first = compressed_kv[0]
        each = first.shape[1] if isinstance(first, Tensor) and first.ndim == 4 else 0
    tokens = (each - 1) * config.compress_stride + config.compress_block_size if each else 0
    if problem.batched:
        problem = problem._replace(leading_k=(batch, tokens))
    else:
        bounds = torch.zeros(2, dtype=torch.int32, device="cpu")
        boundaries = Boundaries(bounds, [0], 0, None, bounds, [tokens], tokens)
        problem = problem._replace(leading_k=(tokens,))
    validation.check_compression(k_weight, v_weight, compressed_kv, boundaries, q, problem)


def _check_block_indices(indices, layout: Layout, q: Tensor, problem: validation.Problem):
    """Blocks may be any of the sequence, of which own queries see a part."""
    boundaries = None
    if problem.batched:
        problem = problem._replace(leading_k=(problem.leading[0], layout.whole.length))
    else:
        boundaries = layout.boundaries._replace(lengths_k=layout.sequence_lengths)
    check_block_indices(indices, boundaries, q, problem)


def _choose_backend(backend: str, q: Tensor, v: tuple[Tensor, ...], layout: Layout) -> ModuleType:
    if layout.segments is not None:
        # Only the reference takes queries that are not the last of their keys.
        if backend == "fused":
            raise UnsupportedError(
                "backend='fused' cannot do this: on several ranks it needs causal=True and "
                f"compressed_visibility='complete', got {layout.config.causal} and "
                f"{layout.config.compressed_visibility!r}; use backend='reference'"
            )
        backend = "reference"
    rows = v[0].new_empty((), device="meta").expand(layout.num_keys, *v[0].shape[-2:])
    return backends.backend_module(backend, flat(q), (rows,), layout.config)
