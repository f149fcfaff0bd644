"""Checks of shapes, dtypes, devices and values for every backend, before any kernel starts.

Every message names the argument, what it was and what it must be.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import most_completed_blocks, num_compressed_blocks, num_selection_blocks
from nsa.boundaries import Boundaries, has_key_boundaries
from nsa.config import NSAConfig, check_int

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UnsupportedError(NotImplementedError):
    """The chosen backend cannot do this; the message names the limit and the remedy."""


SECOND_DERIVATIVE = (
    "the fused backend can be differentiated once, not twice; for higher derivatives use "
    "backend='reference'"
)


class Problem(NamedTuple):
    """The sizes that the arguments of one call agree on."""

    leading: tuple[int, ...]  # of queries: (B, Nq), or (T,) if packed
    leading_k: tuple[int, ...]  # of keys: (B, Nk), or (Tk,) if packed
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    config: NSAConfig
    cu_seqlens: Tensor | None

    @property
    def batched(self) -> bool:
        return len(self.leading) == 2


# Made once, because checking and encoding it in each call takes time.
_DEFAULT = NSAConfig()


def check_dtype(name: str, dtype):
    """Check that ``dtype`` is one of those of queries, keys and values."""
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {DTYPES}, got {dtype}")


def check_new_tensors(dtype, device):
    """Check the dtype and device of tensors that are to be made; None is torch's default."""
    if dtype is not None:
        check_dtype("dtype", dtype)
    if device is None:
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that PyTorch knows, got {device!r}") from error


def check_config(config) -> NSAConfig:
    """The caller's configuration in plain ints, or the default configuration for None."""
    if config is None:
        config = _DEFAULT
    if not isinstance(config, NSAConfig):
        raise TypeError(f"config must be an nsa.NSAConfig or None, got {type(config).__name__}")
    return config if config.plain is None else config.plain


def per_branch(name: str, x) -> tuple[Tensor, Tensor, Tensor]:
    """One tensor for each of (compressed, selected, window) from one tensor or three."""
    if isinstance(x, Tensor):
        return (x, x, x)
    if not isinstance(x, (tuple, list)):
        raise TypeError(f"{name} must be a tensor or a tuple of three, got {type(x).__name__}")
    if len(x) != 3:
        raise ValueError(
            f"{name} must be one tensor or three (compressed, selected, window), got {len(x)}"
        )
    return tuple(x)


def check_tensor(name: str, x, like: Tensor | None, shape: tuple[int, ...]):
    """Check that ``x`` has exactly ``shape`` and the dtype and device of the query ``like``."""
    _check_kind(name, x, like)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def check_dense(name: str, x):
    """Check that ``x`` is a tensor with a place for each entry."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(
            f"{name} must be a dense tensor, got {kind}; pack sequences of different lengths as "
            "(T, ...) with cu_seqlens"
        )


def _check_kind(name: str, x, like: Tensor | None):
    check_dense(name, x)
    if like is None:
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must have a dtype of {DTYPES}, got {x.dtype}")
        return
    if x.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of q, {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}, got {x.device}")


def check_qkv(q, k, v, config: NSAConfig, cu_seqlens, cu_seqlens_k=None) -> Problem:
    """Check queries, keys and values (unless None); ``k`` and ``v`` hold a tensor per branch.

    Batched input may have fewer queries than keys, packed input if keys have their own boundaries.
    """
    _check_kind("q", q, None)
    rank = 4 if cu_seqlens is None else 3
    form = "(B, N, H, D)" if cu_seqlens is None else "(T, H, D) with cu_seqlens"
    if q.ndim != rank:
        raise ValueError(f"q must have shape {form}, got {tuple(q.shape)}")
    leading, (num_heads, head_dim) = tuple(q.shape[:-2]), q.shape[-2:]
    if head_dim == 0 or num_heads == 0:
        raise ValueError(f"q must have at least one head and channel, got {tuple(q.shape)}")
    longer = cu_seqlens is None or has_key_boundaries(cu_seqlens, cu_seqlens_k)
    leading_k, num_kv_heads = _check_keys(q, k, longer, form)
    value_dim = head_dim
    if v is not None:
        values = _named_branches("v", v)
        name, first = values[0]
        _check_kind(name, first, q)
        if first.ndim != rank or first.shape[-1] == 0:
            wanted = (*leading_k, num_kv_heads)
            raise ValueError(f"{name} must have shape {wanted} + (Dv,), got {tuple(first.shape)}")
        value_dim = first.shape[-1]
        for name, x in values:
            check_tensor(name, x, q, (*leading_k, num_kv_heads, value_dim))
    return Problem(
        leading, leading_k, num_heads, num_kv_heads, head_dim, value_dim, config, cu_seqlens
    )


def with_value_dim(problem: Problem, compressed_kv) -> Problem:
    """``problem`` of a call without values, with the ``Dv`` of compressed values if given."""
    if isinstance(compressed_kv, (tuple, list)) and len(compressed_kv) == 2:
        value = compressed_kv[1]
        if isinstance(value, Tensor) and value.ndim == len(problem.leading) + 2:
            return problem._replace(value_dim=value.shape[-1])
    return problem


def _check_keys(q: Tensor, k, longer: bool, form: str) -> tuple[tuple[int, ...], int]:
    """Check the keys, of which there may be more than queries if ``longer``.

    Returns:
        Their leading dimensions, and H_kv.
    """
    keys = _named_branches("k", k)
    name, first = keys[0]
    _check_kind(name, first, q)
    if first.ndim != q.ndim:
        form = form.replace("H,", "H_kv,")
        raise ValueError(f"{name} must have shape {form}, got {tuple(first.shape)}")
    num_kv_heads = first.shape[-2]
    if num_kv_heads == 0 or q.shape[-2] % num_kv_heads:
        raise ValueError(
            f"{name} must have a number of heads that divides the {q.shape[-2]} heads of q, "
            f"got {num_kv_heads}"
        )
    leading = tuple(q.shape[:-2])
    if longer:
        leading = (*leading[:-1], first.shape[-3])
    elif first.shape[0] != leading[0]:
        shape = (*leading, num_kv_heads, q.shape[-1])
        raise ValueError(
            f"{name} must have shape {shape}, got {tuple(first.shape)}; if there are fewer queries "
            "than keys, pass the boundaries of the keys as cu_seqlens_k"
        )
    for name, x in keys:
        check_tensor(name, x, q, (*leading, num_kv_heads, q.shape[-1]))
    return leading, num_kv_heads


def check_positions(boundaries: Boundaries | None, problem: Problem):
    """Check where the queries start, as far as the host knows the lengths.

    The queries of a sequence are its last tokens. In tile mode they start at a tile.
    """
    if boundaries is None:
        queries, keys = problem.leading[-1], problem.leading_k[-1]
        if queries > keys:
            raise ValueError(
                f"q must have at most as many tokens as k, {keys}, got {queries}; queries are the "
                "last tokens of their sequence, so pass the keys of all its tokens"
            )
        _check_tile_start(queries, keys, "", problem.config)
    elif boundaries.lengths is not None and boundaries.lengths_k is not None:
        lengths = zip(boundaries.lengths, boundaries.lengths_k, strict=True)
        for at, (queries, keys) in enumerate(lengths):
            _check_tile_start(queries, keys, f" in sequence {at}", problem.config)


def _check_tile_start(queries: int, keys: int, where: str, config: NSAConfig):
    if config.selection == "token" or queries == keys or queries == 0:
        return
    if (keys - queries) % config.q_tile_size:
        raise ValueError(
            "q must start at a multiple of q_tile_size with selection='tile': q_tile_size is "
            f"{config.q_tile_size}, got {queries} queries after {keys - queries} of {keys} keys"
            f"{where}; cut sequences at multiples of q_tile_size, or use selection='token'"
        )


def _named_branches(name: str, x: tuple) -> list[tuple[str, Tensor]]:
    """The tensor of each branch with its name. A tensor that all branches share comes once."""
    if x[0] is x[1] is x[2]:
        return [(name, x[0])]
    return [(f"{name}[{i}]", branch) for i, branch in enumerate(x)]


def check_max_workspace_bytes(value):
    """Check that ``max_workspace_bytes`` is None or a positive int."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_workspace_bytes must be an int or None, got {value!r}")
    check_size("max_workspace_bytes", value)


def check_size(name: str, value, maximum: int | None = None) -> int:
    """Check that ``value`` is a positive int, and return it."""
    check_int(name, value, 1, maximum)
    return value


def check_flag(name: str, value) -> bool:
    """Check that ``value`` is a bool, and return it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_deterministic(value) -> bool:
    """``deterministic`` of a public function: None is what PyTorch is set to."""
    if value is None:
        return torch.are_deterministic_algorithms_enabled()
    if not isinstance(value, bool):
        raise TypeError(f"deterministic must be a bool or None, got {value!r}")
    return value


WIDE_SELECTION = 1 << 16
"""Slots that a row of selected blocks may have even if all of them stay empty."""


def check_selection_width(boundaries: Boundaries | None, problem: Problem):
    """Check that rows of ``num_selected_blocks`` slots are not far longer than a sequence."""
    longest = problem.leading_k[-1] if boundaries is None else boundaries.max_seqlen_k
    if longest is None or torch.compiler.is_compiling():
        longest = problem.leading_k[-1]
    count, most = problem.config.num_selected_blocks, num_selection_blocks(longest, problem.config)
    if count > max(WIDE_SELECTION, most):
        raise ValueError(
            f"num_selected_blocks must be at most {max(WIDE_SELECTION, most)} to select rows of so "
            f"many slots, got {count}: a sequence has at most {most} blocks"
        )


def check_gates(gates, gate_proj_weight, q: Tensor, problem: Problem):
    """Check ``gates (B, N, H, 3)`` and ``gate_proj_weight (H, 3, D)``."""
    if gates is not None:
        check_tensor("gates", gates, q, (*problem.leading, problem.num_heads, 3))
    if gate_proj_weight is not None:
        shape = (problem.num_heads, 3, problem.head_dim)
        check_tensor("gate_proj_weight", gate_proj_weight, q, shape)


def check_compression(
    k_weight,
    v_weight,
    compressed_kv,
    boundaries: Boundaries | None,
    q: Tensor,
    problem: Problem,
    *,
    cached: bool = False,
):
    """Check the compress weights ``(H_kv, D, D)``, or the caller's compressed keys and values.

    With a cache, these have ``ceil(new / d)`` entries a sequence.
    """
    weights = (
        ("compress_k_weight", k_weight, problem.head_dim),
        ("compress_v_weight", v_weight, problem.value_dim),
    )
    for name, weight, dim in weights:
        if weight is None:
            continue
        if compressed_kv is not None:
            raise ValueError(f"{name} must be None with compressed_kv, got {type(weight).__name__}")
        check_tensor(name, weight, q, (problem.num_kv_heads, dim, dim))
    if compressed_kv is None:
        return
    if not isinstance(compressed_kv, (tuple, list)):
        raise TypeError(
            f"compressed_kv must be a tuple (k_cmp, v_cmp), got {type(compressed_kv).__name__}"
        )
    if len(compressed_kv) != 2:
        raise ValueError(f"compressed_kv must be (k_cmp, v_cmp), got {len(compressed_kv)} entries")
    count_blocks = most_completed_blocks if cached else num_compressed_blocks
    dims = (problem.head_dim, problem.value_dim)
    for i, (x, dim) in enumerate(zip(compressed_kv, dims, strict=True)):
        name = f"compressed_kv[{i}]"
        if boundaries is None:
            batch, length = problem.leading_k
            counts: tuple[int, ...] = (batch, count_blocks(length, problem.config))
        elif boundaries.lengths_k is not None:
            counts = (sum(count_blocks(n, problem.config) for n in boundaries.lengths_k),)
        else:
            _check_kind(name, x, q)
            counts = tuple(x.shape[:1])
        check_tensor(name, x, q, (*counts, problem.num_kv_heads, dim))
    if boundaries is not None and not torch.compiler.is_compiling():
        (blocks, *_), (others, *_) = (x.shape for x in compressed_kv)
        most = problem.leading_k[0] // problem.config.compress_stride
        most += boundaries.cu_seqlens.shape[0] - 1 if cached else 0
        if blocks != others or blocks > most:
            raise ValueError(
                f"compressed_kv must have as many blocks of keys as of values, at most {most}, got "
                f"{blocks} and {others}"
            )
