"""The pipeline over a few KV heads at a time, so that intermediates exist for those alone.

No branch mixes KV heads: a chunk is the same computation on slices of the heads, and its results
are slices of the results.
"""

from typing import NamedTuple

from torch import Tensor

from nsa.fused import pipeline
from nsa.fused.pipeline import Inputs, Saved
from nsa.fused.plan import Plan

# Where heads are in an input; KV heads unless it is one of _QUERY_HEADS.
_HEADS_DIM = Inputs(**dict.fromkeys(Inputs._fields, 2))._replace(
    gate_proj_weight=0, compress_k_weight=0, compress_v_weight=0
)
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
        return Inputs(*map(self._part, Inputs._fields, _HEADS_DIM, inputs))

    def _part(self, name: str, dim: int, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        heads = self.query if name in _QUERY_HEADS else self.kv
        return x[heads] if dim == 0 else x[:, :, heads]


def split_heads(num_heads: int, num_kv_heads: int, chunks: int) -> list[Heads]:
    """At most ``chunks`` equal runs of heads, the last perhaps shorter."""
    group, size = num_heads // num_kv_heads, -(-num_kv_heads // chunks)
    parts = []
    for start in range(0, num_kv_heads, size):
        end = min(start + size, num_kv_heads)
        parts.append(Heads(slice(start, end), slice(start * group, end * group)))
    return parts


def forward(
    inputs: Inputs,
    block_indices: Tensor | None,
    plan: Plan,
    *,
    chunks: int,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, list[Saved]]:
    """Output ``(B, T, H, Dv)`` and, where ``save``, what each chunk leaves for its backward.

    With ``recompute`` that is only what was selected.
    """
    q = inputs.q
    parts = split_heads(q.shape[2], inputs.k.shape[2], chunks)
    if len(parts) == 1:
        out, saved = pipeline.forward(inputs, block_indices, plan)
        return out, [_kept(saved, recompute)] if save else []
    out = q.new_empty(*q.shape[:-1], inputs.v.shape[-1])
    kept = []
    for heads in parts:
        blocks, target = heads.of_indices(block_indices, plan), heads.of_queries(out)
        _, saved = pipeline.forward(heads.of(inputs), blocks, plan, target)
        if save:
            kept.append(_kept(saved, recompute))
        # Before the next chunk allocates.
        del saved
    return out, kept


def _kept(saved: Saved, recompute: bool) -> Saved:
    return saved.selection() if recompute else saved


def backward(
    dout: Tensor,
    inputs: Inputs,
    block_indices: Tensor | None,
    saved: list[Saved],
    plan: Plan,
    *,
    chunks: int,
    recompute: bool,
) -> Inputs:
    """Gradient of each input, None where there is no such input.

    ``block_indices`` are the caller's; where None, ``saved`` holds those that were selected.
    """
    parts = split_heads(inputs.q.shape[2], inputs.k.shape[2], chunks)
    if len(parts) == 1:
        return _backward(dout, inputs, block_indices, saved[0], plan, recompute)
    grads = Inputs(*(None if x is None else x.new_empty(x.shape) for x in inputs))
    for heads, part in zip(parts, saved, strict=True):
        blocks, targets = heads.of_indices(block_indices, plan), heads.of(grads)
        results = _backward(
            heads.of_queries(dout), heads.of(inputs), blocks, part, plan, recompute, targets.q
        )
        for target, result in zip(targets[1:], results[1:], strict=True):
            if target is not None:
                target.copy_(result)
        # Before the next chunk allocates.
        del results, result
    return grads


def _backward(
    dout: Tensor,
    inputs: Inputs,
    block_indices: Tensor | None,
    saved: Saved,
    plan: Plan,
    recompute: bool,
    dq: Tensor | None = None,
) -> Inputs:
    if block_indices is not None:
        saved = saved._replace(block_indices=block_indices)
    if recompute:
        saved = pipeline.attend(inputs, saved.block_indices, saved.groups, plan)
    return pipeline.backward(dout, inputs, saved, plan, dq)
