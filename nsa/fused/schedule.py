"""Chooses how many KV heads run at a time, and runs these chunks one after another.

No branch mixes KV heads, so a chunk is the same computation on slices of the heads, and its results
are slices of the results. Intermediates exist only for the heads of one chunk. Backward may compute
the forward of its chunk again, so that only the selection is kept.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import pipeline
from nsa.fused.call_tensors import Inputs, Saved
from nsa.fused.constraints import MAX_PAIRS
from nsa.fused.key_sums import CallSums
from nsa.fused.memory import workspace_bytes
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes
from nsa.host import is_capturing, refuse_recording
from nsa.precision import without_autocast
from nsa.results import Results

ALWAYS_FITS = 1 / 32
"""Part of the GPU's memory that a workspace may take without a query of the free memory. A query
takes some 0.04 ms, and a call that depends on it cannot be recorded."""

DETERMINISTIC_SHARE = 1 / 2
"""Part of the GPU's memory that the workspace may take if gradients have a fixed order. Some sums
have other bits in other numbers of chunks, which must not follow from what is free."""

USABLE = 0.9
"""Fraction of the free memory to use. The rest is lost to fragmentation and rounding."""


_NO_RESULTS = Results()


class ChunkSchedule(NamedTuple):
    """KV heads run in ``chunks``. With ``recompute``, forward saves no branch for backward; with
    ``recompute_window``, it saves the others. ``deterministic`` adds gradients in a fixed order."""

    chunks: int
    recompute: bool
    recompute_window: bool = False
    deterministic: bool = False


def make_schedule(
    inputs: Inputs, sizes: Sizes, *, save: bool, max_workspace_bytes: int | None
) -> ChunkSchedule:
    """The fewest chunks that fit, with recomputation only if no number of chunks fits without it.

    Args:
        inputs: inputs in the layout of the kernels.
        sizes: sizes of the call.
        save: whether there will be a backward.
        max_workspace_bytes: limit of the workspace. None means the free memory minus the results,
            or if gradients have a fixed order ``DETERMINISTIC_SHARE`` of all memory. There is no
            limit then while torch.compile traces, nor in a CUDA graph capture without that order,
            for the free memory is not queried.
    """
    q = inputs.q
    if max_workspace_bytes is not None:
        return choose(sizes, save, max_workspace_bytes)
    if torch.compiler.is_compiling():
        # torch.compile would guard a limit on a length.
        return ChunkSchedule(1, False)
    whole = ChunkSchedule(_fewest(sizes), False)
    if not q.is_cuda:
        return whole
    workspace = _whole_bytes(sizes, save)
    if workspace <= ALWAYS_FITS * _total_bytes(q.device):
        return whole
    if sizes.deterministic:
        # Also in a capture, whose replays then have the bits of other calls.
        return choose(sizes, save, int(DETERMINISTIC_SHARE * _total_bytes(q.device)))
    if is_capturing(q):
        return whole
    refuse_recording("the schedule depends on the free memory")
    # The results are the output; with a backward, also its gradient and those of the inputs.
    results = q.nbytes
    if save:
        results += q.nbytes + sum(x.nbytes for x in inputs if x is not None)
    free, _ = torch.cuda.mem_get_info(q.device)
    if workspace <= int(USABLE * free) - results:
        # The caching allocator's unused memory is not needed, and asking takes some 0.3 ms.
        return whole
    return choose(sizes, save, int(USABLE * (free + _unused_bytes(q.device))) - results)


def choose(sizes: Sizes, save: bool, limit: int) -> ChunkSchedule:
    """The cheapest schedule whose workspace is at most ``limit``, else the one that needs least."""
    num_kv_heads = int(sizes.num_kv_heads)
    for recompute in (False, True) if save else (False,):
        for chunks in range(_fewest(sizes), num_kv_heads + 1):
            size = -(-num_kv_heads // chunks)
            if workspace_bytes(sizes, size, save=save, recompute=recompute) <= limit:
                return ChunkSchedule(chunks, recompute)
    return ChunkSchedule(num_kv_heads, save)


def fewest_chunks(tokens: int, num_kv_heads: int, config: NSAConfig) -> int:
    """Fewest chunks that the kernels can count pairs of tokens and blocks for; 1 in tile mode."""
    if config.selection == "tile":
        return 1
    pairs = tokens * config.num_selected_blocks
    heads = max(1, (MAX_PAIRS - 1) // max(1, pairs))
    return -(-num_kv_heads // heads)


def _fewest(sizes: Sizes) -> int:
    return fewest_chunks(sizes.tokens, sizes.num_kv_heads, sizes.config)


# Cached, because for a small call the sums take longer than they save.
@lru_cache(maxsize=256)
def _whole_bytes(sizes: Sizes, save: bool) -> int:
    """Workspace with all KV heads at a time."""
    return workspace_bytes(sizes, sizes.num_kv_heads, save=save, recompute=False)


@lru_cache
def _total_bytes(device: torch.device) -> int:
    """Memory of the device."""
    return torch.cuda.get_device_properties(device).total_memory


def _unused_bytes(device: torch.device) -> int:
    """Device memory that the caching allocator holds and no tensor uses."""
    stats = torch.cuda.memory_stats(device)
    # Allocators other than PyTorch's may not count these.
    reserved = stats.get("reserved_bytes.all.current", 0)
    return reserved - stats.get("allocated_bytes.all.current", 0)


# Inputs whose heads are the first dimension, not the third. They are KV heads unless the input is
# in _QUERY_HEADS.
_BY_HEAD = ("gate_proj_weight", "compress_k_weight", "compress_v_weight")
_QUERY_HEADS = ("q", "gates", "gate_proj_weight")


class Heads(NamedTuple):
    """A chunk: some KV heads and the query heads that attend them."""

    kv: slice
    query: slice

    def of_queries(self, x: Tensor) -> Tensor:
        """The part of ``x (B, T, H, ...)``."""
        return x[:, :, self.query]

    def of_indices(self, indices: Tensor | None, plan: Plan) -> Tensor | None:
        """The part of the caller's ``block_indices``."""
        if indices is None:
            return None
        return indices[:, :, self.kv if plan.config.selection == "token" else self.query]

    def of(self, inputs: Inputs) -> Inputs:
        """The part of each input, or of each gradient."""
        return Inputs._make(map(self._part, Inputs._fields, inputs))

    def _part(self, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        heads = self.query if name in _QUERY_HEADS else self.kv
        return x[heads] if name in _BY_HEAD else x[:, :, heads]


def split_heads(num_heads: int, num_kv_heads: int, chunks: int) -> list[Heads]:
    """At most ``chunks`` equal runs of heads, the last perhaps shorter."""
    group, size = num_heads // num_kv_heads, -(-num_kv_heads // chunks)
    parts = []
    for start in range(0, num_kv_heads, size):
        end = min(start + size, num_kv_heads)
        parts.append(Heads(slice(start, end), slice(start * group, end * group)))
    return parts


def run_forward(
    inputs: Inputs,
    block_indices: Tensor | None,
    plan: Plan,
    schedule: ChunkSchedule,
    results: Results | None = None,
    *,
    save: bool,
) -> tuple[Tensor, list[Saved]]:
    """Output ``(B, T, H, Dv)`` and, where ``save``, what each chunk leaves for its backward.

    If the schedule recomputes, that is only the selection. ``block_indices`` are the caller's (see
    :func:`nsa.fused.pipeline.attend`), which are not saved; None to select.
    """
    results = results or _NO_RESULTS
    q, out = inputs.q, _kernel_form(results.out)
    parts = split_heads(q.shape[2], inputs.k.shape[2], schedule.chunks)
    kept = []
    if out is None and len(parts) > 1:
        out = q.new_empty(*q.shape[:-1], inputs.v.shape[-1])
    with torch.cuda.device_of(q), without_autocast(q.device):
        for heads in parts:
            # With one chunk, slices would be the whole tensors and cost host time.
            part, blocks, target = inputs, block_indices, out
            if out is not None and len(parts) > 1:
                part, blocks = heads.of(inputs), heads.of_indices(block_indices, plan)
                target = heads.of_queries(out)
            result, branches, selected, groups = pipeline.attend(
                part,
                blocks,
                None,
                plan,
                out=target,
                before_keys=results.before_keys,
                keep=save and not schedule.recompute,
                keep_window=not schedule.recompute_window,
            )
            if save:
                kept.append(Saved(branches, selected if blocks is None else None, groups))
            # Free these before the next chunk allocates.
            del branches, selected, groups
    if out is None:
        out = result
    assert out is not None  # as attend combines
    return out, kept


def run_backward(
    dout: Tensor,
    inputs: Inputs,
    block_indices: Tensor | None,
    saved: list[Saved],
    plan: Plan,
    schedule: ChunkSchedule,
    results: Results | None = None,
) -> Inputs:
    """The gradient of each input, None if there is no such input, or if it is added to ``results``.

    ``block_indices`` are the caller's. If None, ``saved`` holds the selected ones. It is emptied,
    so that what is used up frees its memory.
    """
    results = results or _NO_RESULTS
    q, dq = inputs.q, _kernel_form(results.dq)
    parts = split_heads(q.shape[2], inputs.k.shape[2], schedule.chunks)
    with torch.cuda.device_of(q), without_autocast(q.device):
        if len(parts) == 1:
            return _run_chunk_backward(
                dout, inputs, block_indices, saved, plan, dq=dq, keys=results.keys,
                deterministic=schedule.deterministic,
            )  # fmt: skip
        others = [None if x is None else x.new_empty(x.shape) for x in inputs[1:]]
        grads = Inputs._make([q.new_empty(q.shape) if dq is None else dq, *others])
        for heads in parts:
            targets = heads.of(grads)
            found = _run_chunk_backward(
                heads.of_queries(dout), heads.of(inputs), heads.of_indices(block_indices, plan),
                saved, plan, dq=targets.q, keys=None, deterministic=schedule.deterministic,
            )  # fmt: skip
            for target, result in zip(targets[1:], found[1:], strict=True):
                if target is not None:
                    assert result is not None
                    target.copy_(result)
            # Free these before the next chunk allocates.
            del found, result
    return grads


def _kernel_form(x: Tensor | None) -> Tensor | None:
    """A field of :class:`Results` as ``(B, T, H, D)``. It is detached, because a view would have
    the autograd history of its base."""
    if x is None:
        return None
    return (x if x.ndim == 4 else x[None]).detach()


def _run_chunk_backward(
    dout: Tensor,
    inputs: Inputs,
    block_indices: Tensor | None,
    saved: list[Saved],
    plan: Plan,
    *,
    dq: Tensor | None,
    keys: CallSums | None,
    deterministic: bool,
) -> Inputs:
    """The gradients of the first chunk in ``saved``, from which it is taken."""
    branches, selected, groups = saved.pop(0)
    selected = selected if block_indices is None else block_indices
    assert selected is not None
    if branches is None:
        _, branches, selected, groups = pipeline.attend(
            inputs, selected, groups, plan, combines=False
        )
        assert branches is not None  # as attend keeps them
    elif branches.o_win is None:
        branches = pipeline.attend_window(inputs, branches, plan)
    last = [branches]
    del branches
    return pipeline.backward(
        dout, inputs, last, selected, groups, plan, dq=dq, keys=keys, deterministic=deterministic
    )
