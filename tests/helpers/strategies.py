"""Hypothesis strategies: small float64 problems of every form that ``nsa.forward`` takes."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import nsa
from nsa.testing import make_cu_seqlens


class Problem(NamedTuple):
    """The arguments of one call. ``extras`` are keyword arguments other than ``config``."""

    q: Tensor
    k: Tensor | tuple
    v: Tensor | tuple
    config: nsa.NSAConfig
    extras: dict

    def __repr__(self) -> str:
        """Without the values of long tensors."""
        tensors = [tuple(x.shape) for x in leaves(self)]
        bounds = self.extras.get("cu_seqlens")
        bounds = None if bounds is None else bounds.tolist()
        return f"Problem({tensors}, {self.config}, {list(self.extras)}, cu_seqlens={bounds})"

    def forward(self, **changes) -> Tensor:
        return nsa.forward(self.q, self.k, self.v, config=self.config, **(self.extras | changes))

    def select_blocks(self, **changes) -> Tensor:
        names = ("compress_k_weight", "compressed_kv", "cu_seqlens", "cu_seqlens_k")
        names += ("max_seqlen", "max_seqlen_k")
        extras = {name: x for name, x in self.extras.items() if name in names}
        return nsa.select_blocks(self.q, self.k, config=self.config, **(extras | changes))


@st.composite
def configs(draw, **fixed) -> nsa.NSAConfig:
    """Configurations of both selection modes, with blocks of a few tokens."""
    selection = fixed.get("selection") or draw(st.sampled_from(["token", "tile"]))
    stride = draw(st.integers(1, 5))
    token = selection == "token"
    block = stride * (draw(st.integers(1, 3)) if token else 1)
    initial, local = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    settings = {
        "selection": selection,
        "compress_block_size": block,
        "compress_stride": stride,
        "select_block_size": stride * draw(st.integers(1, 4)),
        "num_initial_blocks": initial,
        "num_local_blocks": local,
        "num_selected_blocks": max(1, initial + local + draw(st.integers(0, 3))),
        "window_size": draw(st.sampled_from([1, 2, 5, 16, 200])),
        "q_tile_size": draw(st.sampled_from([1, 5, 8, 16])),
        "tile_summary": draw(st.sampled_from(["mean", "first"])),
        "compressed_visibility": draw(st.sampled_from(["complete", "complete", "started"])),
        "num_cmp_selected_blocks": None if token else draw(st.sampled_from([None, 1, 2])),
        "cmp_group_size": draw(st.integers(1, 4)),
        "causal": draw(st.sampled_from([True, True, False])),
        "scale": draw(st.sampled_from([None, None, 0.7])),
    }
    return nsa.NSAConfig(**(settings | fixed))


@st.composite
def problems(
    draw,
    max_tokens: int = 70,
    packed: bool | None = None,
    min_sequences: int = 0,
    layouts=None,
    **fixed,
) -> Problem:
    """A problem in float64; ``fixed`` sets fields of the configuration.

    ``packed`` is drawn unless given. ``layouts(config)`` may give another strategy of
    ``(lengths, leading, extras)`` than the default.
    """
    config = draw(configs(**fixed))
    heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (6, 2), (4, 1), (6, 1)]))
    dims = draw(st.sampled_from([(3, 3), (4, 2), (2, 5)]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    default = _layouts(max_tokens, packed, min_sequences)
    lengths, leading, extras = draw(default if layouts is None else layouts(config))
    num_heads, num_kv_heads = heads
    dim, value_dim = dims

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def keys(width):
        if draw(st.booleans()):
            return randn(*leading, num_kv_heads, width)
        return tuple(randn(*leading, num_kv_heads, width) for _ in range(3))

    q, k, v = randn(*leading, num_heads, dim), keys(dim), keys(value_dim)
    if draw(st.integers(0, 3)) == 0:
        k = _repeated_keys(config, leading, num_kv_heads, dim, rng)
    form = draw(st.sampled_from(["none", "gates", "projection", "both"]))
    if form in ("gates", "both"):
        extras["gates"] = randn(*leading, num_heads, 3)
    if form in ("projection", "both"):
        extras["gate_proj_weight"] = randn(num_heads, 3, dim)
    compressor = draw(st.sampled_from(["mean", "weights", "k_weight", "v_weight", "learned"]))
    if compressor in ("weights", "k_weight"):
        extras["compress_k_weight"] = randn(num_kv_heads, dim, dim)
    if compressor in ("weights", "v_weight"):
        extras["compress_v_weight"] = randn(num_kv_heads, value_dim, value_dim)
    if compressor == "learned":
        counts = _compressed_leading(lengths, leading, config)
        extras["compressed_kv"] = (
            randn(*counts, num_kv_heads, dim),
            randn(*counts, num_kv_heads, value_dim),
        )
    return Problem(q, k, v, config, extras)


@st.composite
def tile_problems(draw, max_tokens: int = 300, **options) -> Problem:
    """Problems in tile mode, with the block sizes that the kernels support."""
    block = draw(st.sampled_from([1, 4, 16, 64]))
    sizes = [size for size in (64, 128, 192) if size % block == 0]
    return draw(
        problems(
            max_tokens,
            selection="tile",
            compress_block_size=block,
            compress_stride=block,
            select_block_size=draw(st.sampled_from(sizes)),
            q_tile_size=draw(st.sampled_from([64, 128])),
            cmp_group_size=draw(st.sampled_from([64, 128])),
            window_size=draw(st.sampled_from([1, 30, 100, 150])),
            **options,
        )
    )


@st.composite
def token_problems(draw, max_tokens: int = 330, **options) -> Problem:
    """The same in token mode, with and without overlap."""
    size = draw(st.sampled_from([32, 64]))
    stride = draw(st.sampled_from([4, 16, 32]))
    initial, local = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return draw(
        problems(
            max_tokens,
            selection="token",
            compress_block_size=stride * draw(st.integers(1, 3)),
            compress_stride=stride,
            select_block_size=size,
            num_initial_blocks=initial,
            num_local_blocks=local,
            num_selected_blocks=max(1, initial + local + draw(st.integers(0, 2))),
            window_size=draw(st.sampled_from([1, 30, 100, 150])),
            **options,
        )
    )


def leaves(problem: Problem) -> list[Tensor]:
    """The differentiable tensors of a problem."""
    found = []
    for x in (problem.q, problem.k, problem.v, *problem.extras.values()):
        items = x if isinstance(x, tuple) else (x,)
        found += [i for i in items if isinstance(i, Tensor) and i.is_floating_point()]
    return found


@st.composite
def _layouts(draw, max_tokens: int, packed: bool | None, min_sequences: int):
    """``(lengths, leading, extras)`` of batched or packed input; lengths include 0 and 1."""
    if packed is None:
        packed = draw(st.booleans())
    if not packed:
        batch = draw(st.sampled_from([n for n in (1, 2, 1, 0) if n >= min_sequences]))
        length = draw(st.integers(0, max_tokens // max(1, batch)))
        return [length] * batch, (batch, length), {}
    some = st.one_of(st.sampled_from([0, 1]), st.integers(2, max_tokens // 3))
    lengths = draw(st.lists(some, min_size=min_sequences, max_size=4))
    extras = {"cu_seqlens": make_cu_seqlens(lengths)}
    if draw(st.booleans()):
        extras["max_seqlen"] = max(lengths, default=0) + draw(st.integers(0, 3))
    return lengths, (sum(lengths),), extras


def _compressed_leading(lengths, leading, config) -> tuple[int, ...]:
    size, stride = config.compress_block_size, config.compress_stride
    counts = [max(0, (length - size) // stride + 1) for length in lengths]
    if len(leading) == 1:
        return (sum(counts),)
    return leading[0], max(0, (leading[1] - size) // stride + 1)


def _repeated_keys(config, leading, num_kv_heads, dim, rng) -> Tensor:
    """Keys that make compressed keys, and so scores, exactly equal.

    Keys are multiples of 1/4, so that their means are exact. Token mode adds probabilities, and the
    sums tie exactly only if their terms do, so all its keys are equal.
    """
    kinds = 3 if config.selection == "tile" else 1
    pool = torch.randint(-4, 5, (kinds, num_kv_heads, dim), generator=rng).double() / 4
    per_block = torch.randint(kinds, (leading[-1] + 1,), generator=rng)
    kind = per_block[torch.arange(leading[-1]) // config.compress_stride]
    return pool[kind].expand(*leading, num_kv_heads, dim).contiguous()
