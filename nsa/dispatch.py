"""The public functions: validate, choose a backend, import it, call it."""

import logging
from functools import cache

import torch
from torch import Tensor

from nsa import validation
from nsa.config import NSAConfig
from nsa.validation import UnsupportedError

BACKENDS = ("auto", "reference", "fused")

_logger = logging.getLogger("nsa")


def forward(
    q: Tensor,
    k: Tensor | tuple[Tensor, Tensor, Tensor],
    v: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    config: NSAConfig | None = None,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    max_workspace_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Native Sparse Attention: gated sum of compressed, selected and window attention.

    ``o = g0 * o_cmp + g1 * o_slc + g2 * o_win`` (https://arxiv.org/abs/2502.11089, Eq. 5). A query
    with no key in a branch gets 0 from it. Differentiable in ``q``, ``k``, ``v``, ``gates``,
    ``compressed_kv`` and all weights; no gradient passes through the selection of blocks.

    Query head ``h`` attends KV head ``h // G``, ``G = H / H_kv``. Values must be finite: a masked
    NaN or infinity is multiplied by 0, not skipped, and so reaches other tokens and sequences.

    Args:
        q: ``(B, N, H, D)``, or packed ``(T, H, D)`` with ``cu_seqlens``; float16, bfloat16,
            float32 or float64, which all other float arguments share.
        k: ``(B, N, H_kv, D)`` or ``(T, H_kv, D)``; or three of them, for the (compressed,
            selected, window) branches.
        v: ``(B, N, H_kv, Dv)`` or ``(T, H_kv, Dv)``; or three of them.
        config: block sizes, counts and rules; default ``NSAConfig()``.
        gate_proj_weight: ``(H, 3, D)``; gates are ``sigmoid(q . gate_proj_weight[h, i])`` where
            ``gates`` is not given. With neither, each gate is 1/3.
        gates: ``(B, N, H, 3)`` or ``(T, H, 3)``, used as they are.
        compress_k_weight: ``(H_kv, D, D)``, applied to the mean keys of a block from the right.
        compress_v_weight: ``(H_kv, Dv, Dv)``, likewise.
        compressed_kv: compressed keys and values of a learned compressor instead,
            ``(B, N_cmp, H_kv, D)`` and ``(B, N_cmp, H_kv, Dv)`` with
            ``N_cmp = max(0, (N - l) // d + 1)``; packed, the blocks of one sequence after another,
            ``(sum of N_cmp, H_kv, D)`` and ``(sum of N_cmp, H_kv, Dv)``.
        block_indices: int32 blocks to attend instead of selecting them: token mode
            ``(B, N, H_kv, n)`` or ``(T, H_kv, n)``, tile mode ``(B, H, tiles, n)`` or
            ``(H, sum of tiles, n)``; ascending, -1 in empty slots at the end.
        cu_seqlens: int32 ``(S + 1,)`` boundaries of packed sequences, from 0 to ``T``; sequences
            may have any length, 0 and 1 included. The host reads and checks a tensor's values once,
            and again after PyTorch has changed them; not while torch.compile traces or a CUDA graph
            is captured: padding is a sequence of its own there too. Give a new tensor where
            something else changes the values, and one tensor to all layers: the fused backend
            computes what follows from it once, and keeps that with it, some 100 bytes a token.
        max_seqlen: an upper bound of the sequence lengths; by default they are read. Needed while a
            CUDA graph is captured.
        max_workspace_bytes: how much device memory to use at most beside arguments, output and
            their gradients; by default most of what is free when the call is made, or all that
            there is while torch.compile traces or a CUDA graph is captured. The fused backend runs
            KV heads in chunks to keep to it, and where need be keeps nothing for backward, which
            then computes the forward of each chunk again. It is an estimate, exceeded where one KV
            head needs more, and does not change the result beyond rounding. The reference ignores
            it.
        backend: ``"reference"``, ``"fused"``, or ``"auto"``: fused where it can, else reference,
            with the reason logged once.

    Returns:
        ``(B, N, H, Dv)`` or ``(T, H, Dv)`` in the dtype of ``q``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it
            must be.
        UnsupportedError: ``backend="fused"`` cannot do this; the message names the limit.
    """
    arguments = dict(
        gate_proj_weight=gate_proj_weight,
        gates=gates,
        compress_k_weight=compress_k_weight,
        compress_v_weight=compress_v_weight,
        compressed_kv=compressed_kv,
        block_indices=block_indices,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        max_workspace_bytes=max_workspace_bytes,
    )
    k, v, config, lengths = _validate(q, k, v, config, **arguments)
    arguments["max_seqlen"] = _longest(max_seqlen, lengths)
    module = _backend_module(backend, q, v, config)
    return module.forward(q, k, v, config=config, **arguments)


def select_blocks(
    q: Tensor,
    k: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    config: NSAConfig | None = None,
    compress_k_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that :func:`forward` selects for the same arguments (paper Eq. 8 to 12).

    Of three keys the compressed branch's is used. Arguments as in :func:`forward`.

    Returns:
        int32 indices of blocks in their sequence: token mode ``(B, N, H_kv, n)`` or
        ``(T, H_kv, n)``, tile mode ``(B, H, tiles, n)`` or ``(H, sum of tiles, n)``; ascending, -1
        in empty slots at the end. Fit for ``block_indices`` of :func:`forward`.

    Raises:
        TypeError, ValueError, UnsupportedError: as in :func:`forward`.
    """
    config = validation.check_config(config)
    k = validation.per_branch("k", k)
    problem = validation.check_qkv(q, k, None, config, cu_seqlens)
    if isinstance(compressed_kv, (tuple, list)) and len(compressed_kv) == 2:
        value = compressed_kv[1]
        if isinstance(value, Tensor) and value.ndim == q.ndim:
            problem = problem._replace(value_dim=value.shape[-1])
    lengths = validation.check_cu_seqlens(cu_seqlens, max_seqlen, q)
    validation.check_compression(compress_k_weight, None, compressed_kv, lengths, q, problem)
    module = _backend_module(backend, q, k, config)
    return module.select_blocks(
        q,
        k[0],
        config=config,
        compress_k_weight=compress_k_weight,
        compressed_kv=compressed_kv,
        cu_seqlens=cu_seqlens,
        max_seqlen=_longest(max_seqlen, lengths),
    )


def explain_backend(
    q: Tensor,
    k: Tensor | tuple[Tensor, Tensor, Tensor],
    v: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    config: NSAConfig | None = None,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    max_workspace_bytes: int | None = None,
    backend: str = "auto",
) -> str:
    """Which backend :func:`forward` would use for these arguments, and why not the other.

    Raises:
        TypeError, ValueError: as in :func:`forward`.
    """
    _, v, config, _ = _validate(
        q,
        k,
        v,
        config,
        gate_proj_weight=gate_proj_weight,
        gates=gates,
        compress_k_weight=compress_k_weight,
        compress_v_weight=compress_v_weight,
        compressed_kv=compressed_kv,
        block_indices=block_indices,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        max_workspace_bytes=max_workspace_bytes,
    )
    limit = _fused_limit(q, v, config)
    name = _choose(_check_backend(backend), limit)
    return f"backend: {name or 'none'} ({_describe_limit(limit)})"


def _validate(
    q,
    k,
    v,
    config,
    *,
    gate_proj_weight=None,
    gates=None,
    compress_k_weight=None,
    compress_v_weight=None,
    compressed_kv=None,
    block_indices=None,
    cu_seqlens=None,
    max_seqlen=None,
    max_workspace_bytes=None,
):
    """Check forward's arguments; return k and v with one tensor a branch, the config, and the
    lengths of packed sequences where they can be read."""
    config = validation.check_config(config)
    k, v = validation.per_branch("k", k), validation.per_branch("v", v)
    problem = validation.check_qkv(q, k, v, config, cu_seqlens)
    lengths = validation.check_cu_seqlens(cu_seqlens, max_seqlen, q)
    validation.check_gates(gates, gate_proj_weight, q, problem)
    validation.check_compression(
        compress_k_weight, compress_v_weight, compressed_kv, lengths, q, problem
    )
    validation.check_block_indices(block_indices, lengths, q, problem)
    validation.check_max_workspace_bytes(max_workspace_bytes)
    return k, v, config, lengths


def _longest(max_seqlen: int | None, lengths: list[int] | None) -> int | None:
    """The caller's bound of the lengths, or the longest where they are known."""
    if max_seqlen is not None or lengths is None:
        return max_seqlen
    return max(lengths, default=0)


def _check_backend(backend) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return backend


def _fused_limit(q: Tensor, v: tuple[Tensor, ...], config: NSAConfig) -> str | None:
    """Why the fused backend cannot do this, with the remedy; None where it can."""
    from nsa.fused import constraints

    return constraints.unsupported_reason(q, v[0], config)


def _choose(backend: str, limit: str | None) -> str | None:
    """The backend to use, given what keeps the fused one from it; None if there is none."""
    if backend == "auto":
        return "fused" if limit is None else "reference"
    return None if backend == "fused" and limit is not None else backend


def _describe_limit(limit: str | None) -> str:
    return "fused can do this" if limit is None else f"fused cannot do this: {limit}"


def _backend_module(backend: str, q: Tensor, v: tuple[Tensor, ...], config: NSAConfig):
    limit = _fused_limit(q, v, config) if _check_backend(backend) != "reference" else None
    name = _choose(backend, limit)
    if name is None:
        raise UnsupportedError(f"backend='fused' cannot do this: {limit}")
    if name == "fused":
        from nsa.fused import interface

        return interface
    if backend == "auto" and not torch.compiler.is_compiling():
        _log_once(limit, logging.WARNING if q.is_cuda else logging.INFO)
    from nsa import reference

    return reference


@cache
def _log_once(limit: str, level: int):
    _logger.log(level, "backend='auto' uses the reference: %s", _describe_limit(limit))
