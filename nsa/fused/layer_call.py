"""The tensors of a layer of plain modules, what its backward needs, and what its calls do."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.blocks import BlockPlaces
from nsa.fused import kernel_calls
from nsa.fused.call_tensors import Inputs
from nsa.fused.entry import widen
from nsa.fused.kernel_inputs import kernel_head_dim
from nsa.fused.plan import Plan
from nsa.fused.schedule import ChunkSchedule


class LayerInputs(NamedTuple):
    """The tensors of a call: hidden states ``(B, N, dim)`` or ``(T, dim)``; parameters; and where
    the compressed blocks of each packed sequence start, then where the last end.

    Parameters are weights of linear layers and their biases; of the gates' MLP, or
    ``gate_proj_weight``; of both compressors, if any, in the order of
    :func:`nsa.fused.compressor_pair.compress_pair`.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None
    last_gate: Tensor | None
    last_gate_bias: Tensor | None
    gate_proj_weight: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    position_k: Tensor | None
    position_v: Tensor | None
    first_k: Tensor | None
    first_v: Tensor | None
    first_bias_k: Tensor | None
    first_bias_v: Tensor | None
    last_k: Tensor | None
    last_v: Tensor | None
    last_bias_k: Tensor | None
    last_bias_v: Tensor | None
    block_bounds: Tensor | None

    @property
    def rows(self) -> Tensor:
        """The hidden states as a batch, whose one entry packed sequences are."""
        return self.x if self.x.ndim == 3 else self.x[None]

    @property
    def projections(self) -> list[Tensor]:
        """What ``x`` is multiplied by, all in one product."""
        return [w for w in (self.q, self.k, self.v, self.gate) if w is not None]

    @property
    def compressors(self) -> list[Tensor]:
        return [x for x in self[_FIRST_OF_COMPRESSORS:-1] if x is not None]


DIFFERENTIABLE = LayerInputs._fields[:-1]
_FIRST_OF_COMPRESSORS = LayerInputs._fields.index("position_k")
OF_COMPRESSORS = DIFFERENTIABLE[_FIRST_OF_COMPRESSORS:]
OF_PRODUCT = ("q", "k", "v", "gate")
OF_HEADS = ("q", "k", "v", "k_slc", "v_slc", "k_win", "v_win")


class LayerSaved(NamedTuple):
    """What backward needs beside the results of attention, whose inputs come last.

    ``rows`` and ``rows_hidden`` are of the compressors; ``hidden``, before the activation, of the
    gates' MLP.
    """

    out: Tensor | None
    rows: Tensor | None
    rows_hidden: Tensor | None
    hidden: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    k_slc: Tensor | None
    v_slc: Tensor | None
    k_win: Tensor | None
    v_win: Tensor | None
    gates: Tensor | None
    k_cmp: Tensor | None
    v_cmp: Tensor | None

    def inputs(self, gate_proj_weight: Tensor | None) -> Inputs:
        """The inputs of attention."""
        given: dict[str, Any] = dict.fromkeys(Inputs._fields)
        given |= {name: x for name, x in self._asdict().items() if name in given}
        return Inputs(**(given | {"gate_proj_weight": gate_proj_weight}))


class LayerCall(NamedTuple):
    """What a call does, but for the values of its tensors.

    Attributes:
        theta: base of the rotary embedding.
        heads, kv_heads, head_dim: of queries; of keys and of values.
        branches: those with keys of their own; 1 if all share them.
        leading: dimensions of the tokens.
        places: the blocks of the compressors; None without any.
        plan, schedule: of attention.
    """

    theta: float
    heads: int
    kv_heads: int
    head_dim: int
    branches: int
    leading: tuple[int, ...]
    places: BlockPlaces | None
    plan: Plan
    schedule: ChunkSchedule

    @classmethod
    def of(
        cls,
        given: LayerInputs,
        theta: float,
        heads: int,
        kv_heads: int,
        *,
        places: BlockPlaces | None,
        plan: Plan,
        schedule: ChunkSchedule,
    ) -> "LayerCall":
        head_dim = len(given.q) // heads
        return cls(
            theta=theta,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            branches=len(given.k) // (kv_heads * head_dim),
            leading=tuple(given.x.shape[:-1]),
            places=places,
            plan=plan,
            schedule=schedule,
        )

    def split(self, product: Tensor) -> dict[str, Tensor]:
        """Queries, keys and values as attention gets them, rotated, of the product."""
        heads = kernel_calls.split_product(
            product if len(self.leading) == 2 else product[None],
            heads=self.heads,
            kv_heads=self.kv_heads,
            branches=self.branches,
            head_dim=self.head_dim,
            width=self.kernel_dim,
            bounds=self.plan.cu_seqlens,
            theta=self.theta,
        )
        return dict(zip(OF_HEADS, heads, strict=False))

    def join_gradients(self, found: Inputs, dhidden: Tensor | None, drows: Tensor | None) -> Tensor:
        """The gradient of the product, from those of what is split from it, of ``hidden``, and of
        the rows of the compressors."""
        dproduct = kernel_calls.product_gradient(
            [x for name in OF_HEADS if (x := getattr(found, name)) is not None],
            dhidden,
            drows,
            None if drows is None else self.places,
            head_dim=self.head_dim,
            bounds=self.plan.cu_seqlens,
            theta=self.theta,
        )
        return dproduct if len(self.leading) == 2 else dproduct[0]

    def rotate_blocks(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Compressed tokens rotated by the positions of their centres, or back."""
        places = self.places
        assert places is not None
        centre = (places.block_size - 1) / 2
        return kernel_calls.rotate(
            x, None, places.block_bounds, None, centre, places.stride, self.theta, inverse
        )[0]

    def first_branch(self, product: Tensor) -> Tensor:
        """Heads of keys and then of values of the first branch, a view of the product."""
        first, count = self.heads * self.head_dim, 2 * self.kv_heads
        both = product.narrow(-1, first, count * self.head_dim)
        return both.unflatten(-1, (count, self.head_dim))

    def pieces(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Rows of the joint weight of the product, or of its gradient: views of those of each
        projection. Keys and values of a branch lie beside one another."""
        q, k, v, *gate = weights
        pairs = zip(k.chunk(self.branches), v.chunk(self.branches), strict=True)
        return [q, *(x for pair in pairs for x in pair), *gate]

    def joined(
        self, given: LayerInputs, of_compressors: Sequence[Tensor], *, product: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The joint weight of the ``product``, and the elements of some parameters of the
        compressors one after the other.

        One copy makes both, because each copy takes the host as long as an operation.
        """
        pieces = self.pieces(given.projections) if product else []
        parts = [x.flatten() for x in (*of_compressors, *pieces)]
        count = sum(x.numel() for x in of_compressors)
        joined = torch.cat(parts).to(given.x.dtype) if parts else given.x.new_empty(0)
        return joined[count:].view(-1, given.q.shape[1]), joined[:count]

    @property
    def kernel_dim(self) -> int:
        """Channels of heads as attention gets them."""
        return kernel_head_dim(self.head_dim, self.head_dim)

    def kernel_form(self, x: Tensor) -> Tensor:
        """Queries or keys as attention gets them."""
        x = x if len(self.leading) == 2 else x[None]
        return widen(x, self.kernel_dim)

    def layer_form(self, x: Tensor | None) -> Tensor:
        """The reverse, of a tensor that is there."""
        assert x is not None
        return self.channels(x if len(self.leading) == 2 else x[0])

    def channels(self, x: Tensor) -> Tensor:
        """Those of the layer, of heads with as many as attention gets."""
        return x[..., : self.head_dim].contiguous()

    def gate_weight(self, given: LayerInputs) -> Tensor | None:
        """``gate_proj_weight`` as attention gets it."""
        weight = cast(given.gate_proj_weight, given.x.dtype)
        return widen(weight, self.kernel_dim)


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
