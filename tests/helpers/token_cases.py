"""Inputs for the kernels of token mode's selected branch: rows, and the blocks of each token."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

import nsa
from nsa.fused.token_inputs import TokenBlocks, make_token_blocks
from nsa.geometry import Geometry
from nsa.segments import QuerySegments, Segments, prefix_sum
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import slice_of_heads

LENGTHS = [300, 0, 1, 63, 65, 33]
KV_HEADS = 2

Segment = tuple[int, int, int]
"""The sequence of a segment, the position of its first query, and the number of queries."""

SEGMENTS: dict[str, list[Segment]] = {
    "whole": [(i, 0, length) for i, length in enumerate(LENGTHS)],
    "last queries": [(0, 195, 105), (1, 0, 0), (2, 0, 1), (3, 56, 7), (4, 0, 65), (5, 33, 0)],
    # Of several segments over the same keys, none needs to end where they do.
    "pieces": [
        *((0, 40, 30), (0, 170, 64), (1, 0, 0), (1, 0, 0), (2, 0, 0), (2, 0, 1)),
        *((3, 0, 10), (3, 33, 29), (4, 1, 3), (4, 64, 1), (5, 0, 0), (5, 5, 20)),
    ],
}
"""Queries of sequences of ``LENGTHS`` keys. The first form is all of them."""


def make_geometry(form: str, config: nsa.NSAConfig, device: str = "cpu") -> Geometry:
    """That of ``SEGMENTS[form]``."""
    sequence, first, count = (
        torch.tensor(x, device=device) for x in zip(*SEGMENTS[form], strict=True)
    )
    keys = Segments(make_cu_seqlens(LENGTHS, device).long(), sum(LENGTHS))
    if form == "whole":
        return Geometry(QuerySegments(keys), keys, config)
    rows = Segments(prefix_sum(count), int(count.sum()))
    queries = QuerySegments(rows, first, sequence if form == "pieces" else None)
    return Geometry(queries, keys, config)


class TokenForm(NamedTuple):
    """Options that kernels are compiled for. Tests use a covering set: each costs seconds."""

    head_dim: int
    group: int
    block_size: int
    slots: int
    causal: bool
    dtype: torch.dtype


_BF16, _FP16 = torch.bfloat16, torch.float16
FORMS = [
    TokenForm(64, 1, 64, 7, True, _BF16),
    TokenForm(96, 3, 32, 3, True, _FP16),
    TokenForm(128, 16, 64, 16, True, _BF16),
    TokenForm(128, 4, 32, 5, False, _FP16),
    TokenForm(256, 6, 64, 4, True, _BF16),
]


class SelectedCase(NamedTuple):
    """Rows of ``q``, ``k``, ``v``, ``dout`` as slices of heads among NaN, and what they attend."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    block_indices: Tensor
    blocks: TokenBlocks
    block_size: int
    scale: float
    causal: bool
    own: list[int]  # each token's own block in its sequence

    @property
    def selected(self) -> tuple:
        """The arguments that kernels take after the rows and the forward's results."""
        return self[4:-1]

    def exact(self) -> "SelectedCase":
        """The same case in float64, on a CPU."""
        return self.to("cpu", torch.float64)

    def to(self, device: str, dtype: torch.dtype) -> "SelectedCase":
        rows = (x.to(device, dtype) for x in self[:4])
        blocks = TokenBlocks(*(x.to(device) for x in self.blocks[:7]), *self.blocks[7:])
        return SelectedCase(*rows, self.block_indices.to(device), blocks, *self[6:])


def make_selected_case(
    form: TokenForm, *, forced: bool, device: str = "cuda", segments: str = "whole"
) -> SelectedCase:
    """Packed sequences of odd lengths. With ``forced``, most tokens name the blocks of the band."""
    config = nsa.NSAConfig.paper(select_block_size=form.block_size, causal=form.causal)
    geometry, heads = make_geometry(segments, config, device), KV_HEADS * form.group
    total, num_keys = geometry.queries.rows.total, geometry.keys.total
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(tokens: int, num_heads: int) -> Tensor:
        shape = (1, tokens, num_heads, form.head_dim)
        x = torch.randn(shape, generator=generator, device=device).to(form.dtype)
        return slice_of_heads(x)[0]

    q, dout = (draw(total, heads) for _ in range(2))
    k, v = (draw(num_keys, KV_HEADS) for _ in range(2))
    blocks = make_token_blocks(geometry, 1)
    size = form.block_size
    own = [at // size for _, first, n in SEGMENTS[segments] for at in range(first, first + n)]
    indices = draw_block_indices(blocks.limit.tolist(), own, form, forced).to(device)
    scale = form.head_dim**-0.5
    return SelectedCase(q, k, v, dout, indices, blocks, size, scale, form.causal, own)


def draw_block_indices(limits: list[int], own: list[int], form: TokenForm, forced: bool) -> Tensor:
    """Blocks in any order for each token and KV head, int32 ``(T, H_kv, slots)``.

    Some slots are empty. Some name blocks that the token may not attend. The last tokens name none.
    """
    rng = random.Random(0)
    rows = []
    for token, limit in enumerate(limits):
        for _ in range(KV_HEADS):
            band = {0, own[token] - 1, own[token]} - {-1} if forced else set()
            others = [block for block in range(limit + 2) if block not in band]
            chosen = [*band, *rng.sample(others, len(others))][: form.slots]
            row = [block if rng.random() < 0.9 else -1 for block in chosen]
            row += [-1] * (form.slots - len(row))
            rows.append(
                rng.sample(row, form.slots) if token < len(limits) - 3 else [-1] * form.slots
            )
    return torch.tensor(rows, dtype=torch.int32).view(len(limits), KV_HEADS, form.slots)


def form_id(form: TokenForm) -> str:
    dtype = str(form.dtype).removeprefix("torch.")
    seen = "" if form.causal else "-all"
    return f"D{form.head_dim}-G{form.group}-{form.block_size}x{form.slots}{seen}-{dtype}"
