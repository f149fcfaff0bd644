"""The arguments of the custom ops, which take tensors, numbers and strings alone."""

from functools import lru_cache
from typing import NamedTuple, get_type_hints

from torch import Tensor

from nsa.boundaries import Boundaries, boundaries_of, with_packing
from nsa.config import NSAConfig
from nsa.fused.plan import Plan
from nsa.fused.planning import make_plan, with_scale
from nsa.fused.schedule import ChunkSchedule


class OpOptions(NamedTuple):
    """The arguments of the ops after :class:`Inputs`.

    Attributes:
        block_indices: as in :func:`nsa.fused.schedule.run_forward`.
        cu_seqlens: boundaries of packed queries, int32 ``(S + 1,)``.
        cu_seqlens_k: boundaries of packed keys; None if those of the queries.
        max_seqlen_k: upper bound on the keys of a packed sequence.
        owned: whether a Packing owns the boundaries. Else the forward returns copies, because the
            caller may change them before the backward.
        config: the caller's configuration, encoded.
        scale: the scale for that configuration.
        chunks, recompute, recompute_window, deterministic: the schedule.
        save: whether there will be a backward.
    """

    block_indices: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_k: int | None
    owned: bool
    config: str
    scale: float
    chunks: int
    recompute: bool
    recompute_window: bool
    deterministic: bool
    save: bool

    @classmethod
    def of(
        cls,
        block_indices: Tensor | None,
        boundaries: Boundaries | None,
        config: NSAConfig,
        scale: float,
        schedule: ChunkSchedule,
        *,
        save: bool,
    ) -> "OpOptions":
        """The options of a call."""
        cu_seqlens, cu_seqlens_k, max_seqlen_k = op_bounds(boundaries)
        return cls(
            block_indices=block_indices,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_k=max_seqlen_k,
            owned=boundaries is not None and boundaries.packing is not None,
            config=config.encoded,
            scale=scale,
            chunks=schedule.chunks,
            recompute=schedule.recompute,
            recompute_window=schedule.recompute_window,
            deterministic=schedule.deterministic,
            save=save,
        )

    @property
    def scaled_config(self) -> NSAConfig:
        return decoded_config(self.config, self.scale)

    @property
    def boundaries(self) -> Boundaries | None:
        return boundaries_of(self.cu_seqlens, self.max_seqlen_k, self.cu_seqlens_k)

    @property
    def schedule(self) -> ChunkSchedule:
        return ChunkSchedule(self.chunks, self.recompute, self.recompute_window, self.deterministic)

    @property
    def returned_bounds(self) -> list[Tensor]:
        """The boundaries of which the forward returns copies."""
        return [] if not self.save or self.owned else self.bounds

    @property
    def bounds(self) -> list[Tensor]:
        """The boundaries that there are."""
        return [x for x in (self.cu_seqlens, self.cu_seqlens_k) if x is not None]

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        """The plan for ``q (B, Nq, H, D)`` and ``k (B, Nk, H_kv, D)``."""
        return make_plan(
            q,
            self.scaled_config,
            with_packing(self.boundaries),
            num_keys=k.shape[1],
            num_kv_heads=k.shape[2],
        )


def op_bounds(
    boundaries: Boundaries | None,
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """``cu_seqlens``, ``cu_seqlens_k`` and ``max_seqlen_k`` of :class:`OpOptions`."""
    if boundaries is None:
        return None, None, None
    same = boundaries.cu_seqlens_k is boundaries.cu_seqlens
    return (
        boundaries.cu_seqlens,
        None if same else boundaries.cu_seqlens_k,
        boundaries.max_seqlen_k,
    )


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
    str: "str",
    float: "float",
}


def schema_of(fields: type) -> str:
    """The arguments of an op, one for each field of a NamedTuple."""
    types = get_type_hints(fields)
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in types.items())


@lru_cache(maxsize=64)
def decoded_config(encoded: str, scale: float) -> NSAConfig:
    return with_scale(NSAConfig.decode(encoded), scale)
