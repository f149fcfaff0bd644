"""The public functions: validate, choose a backend, import it, call it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa import recordings, validation
from nsa.backends import (
    check_backend,
    choose_backend,
    choose_module,
    describe_limit,
    limit_without_cache,
)
from nsa.boundaries import check_boundaries
from nsa.cache import Cache
from nsa.cache.calls import cache_config, check_cached_call
from nsa.call_checks import CheckedCall, check_call
from nsa.config import NSAConfig
from nsa.flat_arguments import flatten, unflatten
from nsa.packing import Packing
from nsa.precision import autocast_tensors


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
    cu_seqlens: Tensor | Packing | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    cache: Cache | None = None,
    max_workspace_bytes: int | None = None,
    recompute_window: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Native Sparse Attention: gated sum of compressed, selected and window attention.

    ``o = g0 * o_cmp + g1 * o_slc + g2 * o_win`` (https://arxiv.org/abs/2502.11089, Eq. 5). A query
    with no key in a branch gets 0 from it. Differentiable in ``q``, ``k``, ``v``, ``gates``,
    ``compressed_kv`` and all weights; no gradient passes through the selection of blocks.

    A sequence may have fewer queries than keys, ``Nq <= Nk``. They are its last tokens: query ``i``
    stands at position ``Nk - Nq + i``, and its outputs are those that a call with all ``Nk``
    queries gives it. So a sequence can run in pieces, each with the keys up to its last query,
    unless queries see later keys: with ``causal=False`` or ``compressed_visibility="started"``. In
    tile mode the first query of a sequence must stand at a multiple of ``q_tile_size``.

    Query head ``h`` attends KV head ``h // G``, ``G = H / H_kv``. In the reference, a NaN or
    infinity in ``k`` or ``v`` reaches only the queries that attend it. The fused backend multiplies
    masked values by 0 instead of skipping them, so a NaN or infinity reaches other tokens of its
    sequence and the end of the packed sequence before it.

    Outputs and selected blocks have the same bits each time on a device. Gradients do too if
    ``deterministic``; otherwise they are added in any order, and their last bits differ from run to
    run. The fused backend supports first derivatives only; the reference also supports higher ones.

    PyTorch's float32 matmul precision, which may be TF32, applies to the reference and to the
    compress weights; 16-bit inputs lose nothing by it. Selection in the fused backend ignores it.

    Args:
        q: ``(B, Nq, H, D)``, or packed ``(T, H, D)`` with ``cu_seqlens``; float16, bfloat16,
            float32 or float64. All float arguments have one dtype. Under autocast, arguments that
            mix the first three are cast to the autocast dtype, as ``scaled_dot_product_attention``
            does; otherwise autocast changes nothing.
        k: ``(B, Nk, H_kv, D)`` or ``(Tk, H_kv, D)``; or three of them, for the (compressed,
            selected, window) branches.
        v: ``(B, Nk, H_kv, Dv)`` or ``(Tk, H_kv, Dv)``; or three of them.
        config: block sizes, counts and rules; default ``NSAConfig()``.
        gate_proj_weight: ``(H, 3, D)``; gates are ``sigmoid(q . gate_proj_weight[h, i])`` where
            ``gates`` is not given. With neither, each gate is 1/3.
        gates: ``(B, Nq, H, 3)`` or ``(T, H, 3)``, used as they are.
        compress_k_weight: ``(H_kv, D, D)``; multiplies a block's mean key from the right.
        compress_v_weight: ``(H_kv, Dv, Dv)``; likewise for values.
        compressed_kv: compressed keys and values from the caller's own compressor,
            ``(B, N_cmp, H_kv, D)`` and ``(B, N_cmp, H_kv, Dv)`` with
            ``N_cmp = max(0, (Nk - l) // d + 1)``. For packed input, the blocks of all sequences one
            after another, ``(sum of N_cmp, H_kv, D)`` and ``(sum of N_cmp, H_kv, Dv)``.
        block_indices: int32 blocks to attend instead of selecting: token mode
            ``(B, Nq, H_kv, n)`` or ``(T, H_kv, n)``, tile mode ``(B, H, tiles, n)`` or
            ``(H, sum of tiles, n)`` of the tiles that have queries; ascending, -1 in empty slots at
            the end. A block is numbered by the keys of its sequence. Each call checks the values,
            for which the host waits once. If the lengths are not read, the limit is that of
            the longest possible sequence.
        cu_seqlens: int32 ``(S + 1,)`` boundaries of packed queries, from 0 to ``T``; sequences may
            have any length, 0 and 1 included. Each call reads and checks a tensor, for which the
            host waits for a GPU; with ``max_seqlen`` it does neither on a GPU. Pass a
            :class:`nsa.Packing` to all layers and steps with the same boundaries: it is read once,
            and what follows from it is computed once. While torch.compile traces or a CUDA graph
            is captured, a tensor's values may change from replay to replay.
        cu_seqlens_k: int32 ``(S + 1,)`` boundaries of packed keys, from 0 to ``Tk``; by default
            ``cu_seqlens``. A :class:`nsa.Packing` has both. On a GPU, bare tensors of both are read
            and checked unless both bounds are given. Unread boundaries must be right: each sequence
            with at most as many queries as keys, and in tile mode whole tiles before its queries.
        max_seqlen: an upper bound on the queries of a sequence; by default they are read. Required
            while a CUDA graph is captured, unless ``cu_seqlens`` is a :class:`nsa.Packing`.
        max_seqlen_k: the same for keys, with ``cu_seqlens_k``.
        cache: what earlier calls left, see :class:`nsa.Cache`. ``k`` and ``v`` are then the new
            tokens alone, any number of them, and the queries are theirs. They are appended to the
            cache in place. Outputs are those of one call over the whole sequences. Packed input has
            a sequence for each one of the cache, of 0 or more new tokens. ``config`` may be None,
            for that of the cache. ``compressed_kv`` has ``ceil(new / d)`` entries a sequence: the
            blocks that its new tokens complete, in order; the rest is ignored. ``block_indices``
            are those of the new tokens, in tile mode of the tiles that have some; batched, rows
            that a sequence lacks at its end are ignored. A tile that stays open keeps them, and the
            blocks that are forced at its end. There are no gradients. An error leaves the cache as
            it was. If tokens have no place in the cache and the host does not know it, they are
            dropped, see ``overflowed`` of :class:`nsa.Cache`, and their outputs mean nothing.
        max_workspace_bytes: the most device memory to use beside arguments, output and their
            gradients. By default most of what is free when the call is made, or no limit while
            torch.compile traces or a CUDA graph is captured. To stay within it, the fused backend
            runs KV heads in chunks and, if needed, keeps nothing for backward, which then computes
            the forward of each chunk again. The limit is an estimate and is exceeded if one KV head
            needs more. It changes the result by rounding only. The reference ignores it.
        recompute_window: keep no result of the window branch for backward, which computes it again.
            It is the branch that is computed fastest. The reference ignores this.
        deterministic: give the same bits each time on a device, in every gradient too. Backward
            then takes somewhat longer. None: as ``torch.use_deterministic_algorithms`` says when
            this is called. The reference on a GPU needs that. In tile mode the fused backend needs
            ``D`` and ``Dv`` of at most 128 for it. In both modes its workspace may then take half
            of the GPU's memory, unless ``max_workspace_bytes`` is given: free memory must not
            change bits.
        backend: ``"reference"``, ``"fused"``, or ``"auto"``: fused if it can do this, else
            reference, with the reason logged once.

    Returns:
        ``(B, Nq, H, Dv)`` or ``(T, H, Dv)`` in the dtype of ``q``, contiguous.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it
            must be.
        UnsupportedError: ``backend="fused"`` cannot do this; the message names the limit.
    """
    options: dict[str, Any] = dict(
        config=config,
        max_workspace_bytes=max_workspace_bytes,
        recompute_window=recompute_window,
        deterministic=deterministic,
        backend=backend,
    )
    floats: dict[str, Any] = dict(
        q=q,
        k=k,
        v=v,
        gate_proj_weight=gate_proj_weight,
        gates=gates,
        compress_k_weight=compress_k_weight,
        compress_v_weight=compress_v_weight,
        compressed_kv=compressed_kv,
    )
    others: dict[str, Any] = dict(
        block_indices=block_indices,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen=max_seqlen,
        max_seqlen_k=max_seqlen_k,
        cache=cache,
    )
    if all(x is None for x in others.values()):
        recorded = _run_recorded(floats, options)
        if recorded is not None:
            return recorded
    call = check_call(
        **floats,
        **others,
        config=config,
        max_workspace_bytes=max_workspace_bytes,
        recompute_window=recompute_window,
        deterministic=deterministic,
    )
    limit = partial(_limit_of_forward, call, cache, block_indices is not None)
    module = choose_module(backend, call.q, limit)
    run = module.forward if cache is None else partial(module.forward_cached, cache=cache)
    return run(
        call.q,
        call.k,
        call.v,
        config=call.config,
        gate_proj_weight=call.gate_proj_weight,
        gates=call.gates,
        compress_k_weight=call.compress_k_weight,
        compress_v_weight=call.compress_v_weight,
        compressed_kv=call.compressed_kv,
        block_indices=block_indices,
        boundaries=call.boundaries,
        max_workspace_bytes=max_workspace_bytes,
        recompute_window=recompute_window,
        deterministic=call.deterministic,
    )


def _run_recorded(floats: dict[str, Any], options: dict[str, Any]) -> Tensor | None:
    """The output by :func:`nsa.recordings.run`; None if the call is to run step by step."""
    kinds = {"config": NSAConfig, "max_workspace_bytes": int, "backend": str}
    if (
        not recordings.ENABLED
        or torch.compiler.is_compiling()
        or options["backend"] == "reference"
        # Equal keys must be valid alike, and 1 is no flag.
        or any(x is not None and type(x) is not kinds.get(key, bool) for key, x in options.items())
    ):
        return None
    flat = flatten(floats)
    if flat is None:
        return None
    names, tensors = flat
    function = partial(_forward_of_flat, names, options)
    return recordings.run((names, *options.values()), function, tensors)


def _forward_of_flat(names: tuple[str, ...], options: dict[str, Any], *tensors: Tensor) -> Tensor:
    """:func:`forward` of what :func:`flatten` gives. While it is recorded, it runs step by step."""
    return forward(**unflatten(names, tensors), **options)


def select_blocks(
    q: Tensor,
    k: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    config: NSAConfig | None = None,
    compress_k_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    cache: Cache | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that :func:`forward` selects for the same arguments (paper Eq. 8 to 12).

    Arguments are those of :func:`forward`. Of three tensors ``k`` only the compressed one is used.
    With a cache, they are the blocks of new tokens, in tile mode of the tiles that have some; they
    are not appended.

    Returns:
        int32 indices of blocks in their sequence: token mode ``(B, Nq, H_kv, n)`` or
        ``(T, H_kv, n)``, tile mode ``(B, H, tiles, n)`` or ``(H, sum of tiles, n)`` of the tiles
        that have queries; ascending, -1 in empty slots at the end. :func:`forward` takes them as
        ``block_indices``. The host counts packed tiles, which is a graph break under torch.compile.

    Raises:
        TypeError, ValueError, UnsupportedError: as in :func:`forward`.
        ValueError: ``num_selected_blocks`` is above 65536 and above the blocks of a sequence, so
            that a row would be mostly empty slots.
    """
    config = validation.check_config(config) if cache is None else cache_config(cache, config)
    keys = validation.per_branch("k", k)
    q, keys, compress_k_weight, compressed_kv = autocast_tensors(
        q, keys, compress_k_weight, compressed_kv
    )
    problem = validation.check_qkv(q, keys, None, config, cu_seqlens, cu_seqlens_k)
    problem = validation.with_value_dim(problem, compressed_kv)
    boundaries = check_boundaries(cu_seqlens, max_seqlen, q, keys[0], cu_seqlens_k, max_seqlen_k)
    validation.check_compression(
        compress_k_weight,
        None,
        compressed_kv,
        boundaries,
        q,
        problem,
        cached=cache is not None,
    )
    if cache is None:
        validation.check_positions(boundaries, problem)
        validation.check_selection_width(boundaries, problem)
    else:
        named = {
            "q": q,
            "k": keys,
            "compress_k_weight": compress_k_weight,
            "compressed_kv": compressed_kv,
        }
        check_cached_call(cache, keys, None, named, boundaries, problem)
        longest = problem._replace(leading_k=(cache.max_length,))
        validation.check_selection_width(None, longest)
    module = choose_module(backend, q, partial(_limit_of_selection, q, keys, config, cache))
    return module.select_blocks(
        q,
        keys[0],
        config=config,
        compress_k_weight=compress_k_weight,
        compressed_kv=compressed_kv,
        boundaries=boundaries,
        cache=cache,
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
    cu_seqlens: Tensor | Packing | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    cache: Cache | None = None,
    max_workspace_bytes: int | None = None,
    recompute_window: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> str:
    """Which backend :func:`forward` would use for these arguments, and why not the other.

    Raises:
        TypeError, ValueError: as in :func:`forward`.
    """
    call = check_call(
        q,
        k,
        v,
        config=config,
        gate_proj_weight=gate_proj_weight,
        gates=gates,
        compress_k_weight=compress_k_weight,
        compress_v_weight=compress_v_weight,
        compressed_kv=compressed_kv,
        block_indices=block_indices,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen=max_seqlen,
        max_seqlen_k=max_seqlen_k,
        cache=cache,
        max_workspace_bytes=max_workspace_bytes,
        recompute_window=recompute_window,
        deterministic=deterministic,
    )
    limit = _limit_of_forward(call, cache, block_indices is not None)
    name = choose_backend(check_backend(backend), limit)
    return f"backend: {name or 'none'} ({describe_limit(limit)})"


def _limit_of_forward(call: CheckedCall, cache: Cache | None, given: bool) -> str | None:
    """Why the fused backend cannot do this, with the remedy; None if it can.

    ``given`` is whether the caller gives ``block_indices``.
    """
    from nsa.fused.constraints import cache_limit, deterministic_limit

    if cache is None:
        limit = limit_without_cache(call.q, call.v[0], call.config)
        if limit is None and call.deterministic and call.needs_gradients:
            return deterministic_limit(call.q, call.v[0], call.config)
        return limit
    return cache_limit(call.q, cache, call.boundaries, given)


def _limit_of_selection(
    q: Tensor, k: tuple[Tensor, ...], config: NSAConfig, cache: Cache | None
) -> str | None:
    """Why the fused backend cannot select blocks, with the remedy; None if it can."""
    if cache is None:
        return limit_without_cache(q, k[0], config)
    return "it has no select_blocks with a cache; use backend='reference' or 'auto'"
