"""What a call of several ranks consists of, and its chunks of KV heads."""

import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from nsa.config import NSAConfig
from nsa.distributed.backend_calls import BackendCall
from nsa.distributed.rank_layout import Layout

CHUNK_BYTES = 1 << 27
"""Gathered keys and values of a chunk, unless one KV head has more. With more than half as many
bytes in all there are at least two chunks, so that one is gathered while another is computed."""

NO_LIMIT = sys.maxsize
"""The workspace of a chunk unless the caller limits it. Not the free memory as on one GPU: what
ranks compute again must not depend on what else lies on their devices."""


class RankCall(NamedTuple):
    """The settings of a call of a rank.

    Attributes:
        layout: this rank's part.
        group: the ranks.
        backend: the package that attends.
        config: block sizes and rules.
        branches: for ``(k_slc, k_win, v_slc, v_win)``, which of the given keys and values it is.
        max_workspace_bytes: the limit of each chunk's workspace.
        recompute_window, deterministic: as in :func:`nsa.forward`.
        heads_apart: whether gradients of ``kv`` have the rows of one head after those of another.
    """

    layout: Layout
    group: ProcessGroup
    backend: ModuleType
    config: NSAConfig
    branches: tuple[int, ...]
    max_workspace_bytes: int
    recompute_window: bool
    deterministic: bool
    heads_apart: bool


class RankInputs(NamedTuple):
    """The differentiable tensors of a call: flat rows of this rank, all compressed blocks.

    Attributes:
        q: ``(T, H, D)``.
        gates: ``(T, H, 3)`` or None.
        gate_proj_weight: ``(H, 3, D)`` or None.
        k_cmp, v_cmp: of the sequences of keys of the layout, ``(M, H_kv, D)`` and
            ``(M, H_kv, Dv)``.
        kv: this rank's keys and values, each once, ``(T, H_kv, ...)``.
    """

    q: Tensor
    gates: Tensor | None
    gate_proj_weight: Tensor | None
    k_cmp: Tensor
    v_cmp: Tensor
    kv: tuple[Tensor, ...]

    @classmethod
    def of(cls, flat: Sequence) -> "RankInputs":
        """From all tensors in one row."""
        q, gates, gate_proj_weight, k_cmp, v_cmp, *kv = flat
        return cls(q, gates, gate_proj_weight, k_cmp, v_cmp, tuple(kv))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but :attr:`kv`."""
        return self[:-1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cmp.shape[1]


class Chunk(NamedTuple):
    """Some KV heads and the query heads that attend them."""

    kv: slice
    query: slice

    def of(self, name: str, x: Tensor | None) -> Tensor | None:
        """The part of a field of :class:`RankInputs`."""
        if x is None:
            return None
        if name == "gate_proj_weight":
            return x[self.query]
        return x[:, self.query] if name in ("q", "gates") else x[:, self.kv]

    def of_call(self, name: str, x: Tensor | None, one: BackendCall) -> Tensor | None:
        """The part of a field that a call of the backend takes."""
        x = self.of(name, x)
        if x is None or name == "gate_proj_weight":
            return x
        return x[one.rows] if name in ("q", "gates") else x[one.blocks]

    def of_indices(
        self, indices: Tensor | None, one: BackendCall, config: NSAConfig
    ) -> Tensor | None:
        """The part of ``block_indices``, ``(T, H_kv, n)`` or ``(H, tiles, n)``."""
        if indices is None:
            return None
        if config.selection == "token":
            return indices[one.rows, self.kv]
        return indices[self.query, one.tiles]


def chunks(call: RankCall, inputs: RankInputs) -> list[Chunk]:
    """The chunks, equal on all ranks: they follow from shapes and never from free memory."""
    heads = inputs.num_kv_heads
    rows = call.layout.ranks * call.layout.rows
    one = sum(rows * x.shape[-1] * x.element_size() for x in inputs.kv)
    count = math.ceil(heads / max(1, CHUNK_BYTES // max(1, one)))
    if heads * one > CHUNK_BYTES // 2:
        count = min(heads, max(2, count))
    size = math.ceil(heads / count)
    group = inputs.q.shape[1] // heads
    starts = range(0, heads, size)
    return [
        Chunk(slice(at, min(at + size, heads)), slice(at * group, min(at + size, heads) * group))
        for at in starts
    ]
