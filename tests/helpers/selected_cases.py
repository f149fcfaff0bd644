"""Problems for ``nsa.selected_attention``, and what it computes, by dense attention with masks."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import nsa
from nsa.testing import make_cu_seqlens


class SelectedProblem(NamedTuple):
    """Arguments of a call. ``lengths`` are the queries and keys of each sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_indices: Tensor
    block_size: int
    causal: bool
    scale: float | None
    lengths: list[tuple[int, int]]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def boundaries(self) -> dict[str, Tensor]:
        if self.q.ndim == 4:
            return {}
        queries, keys = zip(*self.lengths, strict=True)
        bounds = {"cu_seqlens": make_cu_seqlens(list(queries), self.q.device)}
        if queries != keys:
            bounds["cu_seqlens_k"] = make_cu_seqlens(list(keys), self.q.device)
        return bounds

    def attend(self, **changes) -> tuple[Tensor, Tensor]:
        options = dict(block_size=self.block_size, causal=self.causal, scale=self.scale)
        # Not made where they are given: a CUDA graph cannot capture a copy from the host.
        options |= changes if "cu_seqlens" in changes else self.boundaries() | changes
        return nsa.selected_attention(*self.leaves, self.block_indices, **options)

    def to(self, dtype: torch.dtype) -> "SelectedProblem":
        """The same problem with new leaves in ``dtype``."""
        leaves = (x.detach().to(dtype).requires_grad_() for x in self.leaves)
        return SelectedProblem(*leaves, *self[3:])

    def dense(self) -> tuple[Tensor, Tensor]:
        """The expected output and log-sum-exp, from the definition alone."""
        if self.q.ndim == 4:
            pieces = list(zip(*self[:4], strict=True))
        else:
            queries, keys = (list(x) for x in zip(*self.lengths, strict=True))
            splits = (queries, keys, keys, queries)
            parts = (x.split(n) for x, n in zip(self[:4], splits, strict=True))
            pieces = list(zip(*parts, strict=True))
        out, lse = zip(*(self._dense_sequence(*piece) for piece in pieces), strict=True)
        if self.q.ndim == 4:
            return torch.stack(out), torch.stack(lse)
        return torch.cat(out), torch.cat(lse, dim=-1)

    def _dense_sequence(self, q, k, v, block_indices) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        key = torch.arange(len(k), device=q.device)
        visible = (block_indices[..., None] == key // self.block_size).any(-2)  # (Nq, H_kv, Nk)
        if self.causal:
            position = len(k) - len(q) + torch.arange(len(q), device=q.device)
            visible = visible & (key <= position[:, None])[:, None]
        visible = visible.repeat_interleave(group, dim=1).transpose(0, 1)  # (H, Nq, Nk)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        some = visible.any(-1)
        # Rows with no key are computed over all keys, and then replaced.
        scores = scores.masked_fill(~(visible | ~some[..., None]), -torch.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        lse = torch.where(some, scores.logsumexp(-1), -torch.inf)
        return torch.where(some.T[..., None], out, 0), lse


def results(problem: SelectedProblem, attend) -> list[Tensor]:
    """Output, log-sum-exp, and gradients through both, of ``attend(problem)``."""
    out, lse = attend(problem)
    generator = torch.Generator(device=out.device).manual_seed(1)
    dout, dlse = (
        torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in (out, lse)
    )
    grads = torch.autograd.grad((out, lse), problem.leaves, (dout, dlse))
    return [out.detach(), lse.detach(), *grads]


NAMES = ("out", "lse", "dq", "dk", "dv")
"""What :func:`results` are."""


def make_problem(
    lengths: list[tuple[int, int]],
    *,
    packed: bool,
    kv_heads: int,
    group: int,
    dims: tuple[int, int],
    block_size: int,
    slots: int,
    causal: bool = True,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> SelectedProblem:
    """Random inputs and lists, in which some slots are empty. Not packed, lengths are equal."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(tokens: list[int], heads: int, dim: int) -> Tensor:
        leading = (sum(tokens),) if packed else (len(tokens), tokens[0])
        x = torch.randn(*leading, heads, dim, generator=generator, device=device)
        return x.to(dtype).requires_grad_()

    queries, keys = (list(x) for x in zip(*lengths, strict=True))
    q = draw(queries, kv_heads * group, dims[0])
    k, v = (draw(keys, kv_heads, dim) for dim in dims)
    lists = [draw_lists(nq, -(-nk // block_size), kv_heads, slots, generator) for nq, nk in lengths]
    indices = torch.cat(lists) if packed else torch.stack(lists)
    return SelectedProblem(q, k, v, indices, block_size, causal, scale, lengths)


def draw_lists(
    queries: int, blocks: int, kv_heads: int, slots: int, generator: torch.Generator
) -> Tensor:
    """Any blocks of the sequence, also later ones, int32 ``(queries, kv_heads, slots)``."""
    shape = (queries, kv_heads, blocks)
    chosen = torch.rand(shape, generator=generator, device=generator.device).argsort(-1)
    chosen = torch.nn.functional.pad(chosen, (0, slots), value=blocks)[..., :slots]
    # About one slot of six is empty.
    empty = torch.rand(chosen.shape, generator=generator, device=generator.device) < 1 / 6
    chosen = chosen.masked_fill(empty, blocks).sort(-1).values
    return chosen.masked_fill(chosen == blocks, -1).int()


@st.composite
def selected_problems(draw, same_dims: bool = False) -> SelectedProblem:
    """Small problems in float64: batched and packed, with fewer queries than keys, and empty."""
    packed = draw(st.booleans())
    keys = st.sampled_from([0, 1, 31, 32, 63, 65, 128, 129, 200])

    def of(num_keys: int) -> tuple[int, int]:
        return draw(
            st.sampled_from(sorted({0, min(1, num_keys), num_keys // 2, num_keys}))
        ), num_keys

    if packed:
        lengths = [of(n) for n in draw(st.lists(keys, min_size=1, max_size=4))]
    else:
        lengths = [of(draw(keys))] * draw(st.integers(1, 2))
    dim = draw(st.sampled_from([64, 96, 128]))
    return make_problem(
        lengths,
        packed=packed,
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 3, 4, 6, 16])),
        dims=(dim, dim if same_dims else draw(st.sampled_from([dim, 64, 40]))),
        block_size=draw(st.sampled_from([32, 64, 128])),
        slots=draw(st.sampled_from([1, 2, 3, 8])),
        causal=draw(st.sampled_from([True, True, False])),
        scale=draw(st.sampled_from([None, None, 0.3])),
        seed=draw(st.integers(0, 2**16)),
    )
