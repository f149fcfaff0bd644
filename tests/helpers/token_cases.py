"""Inputs for the kernels of token mode's selected branch: rows, and the blocks of each token."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

import nsa
from nsa.fused.kernel_inputs import TokenBlocks, make_token_blocks
from nsa.geometry import Geometry
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import slice_of_heads

LENGTHS = [300, 0, 1, 63, 65, 33]
KV_HEADS = 2


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

    @property
    def selected(self) -> tuple:
        """The arguments that kernels take after the rows and the forward's results."""
        return self[4:]

    def exact(self) -> "SelectedCase":
        """The same case in float64, on a CPU."""
        return self.to("cpu", torch.float64)

    def to(self, device: str, dtype: torch.dtype) -> "SelectedCase":
        rows = (x.to(device, dtype) for x in self[:4])
        blocks = TokenBlocks(*(x.to(device) for x in self.blocks[:4]), self.blocks.sequences)
        return SelectedCase(*rows, self.block_indices.to(device), blocks, *self[6:])


def make_selected_case(form: TokenForm, *, forced: bool, device: str = "cuda") -> SelectedCase:
    """Packed sequences of odd lengths. With ``forced``, most tokens name the blocks of the band."""
    config = nsa.NSAConfig.paper(select_block_size=form.block_size, causal=form.causal)
    total, heads = sum(LENGTHS), KV_HEADS * form.group
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        shape = (1, total, num_heads, form.head_dim)
        x = torch.randn(shape, generator=generator, device=device).to(form.dtype)
        return slice_of_heads(x)[0]

    q, k, v, dout = (draw(n) for n in (heads, KV_HEADS, KV_HEADS, heads))
    geometry = Geometry.of(q, k, config, make_cu_seqlens(LENGTHS, device))
    blocks = make_token_blocks(geometry, 1)
    indices = draw_block_indices(blocks.limit.tolist(), form, forced).to(device)
    scale = form.head_dim**-0.5
    return SelectedCase(q, k, v, dout, indices, blocks, form.block_size, scale, form.causal)


def draw_block_indices(limits: list[int], form: TokenForm, forced: bool) -> Tensor:
    """Blocks in any order for each token and KV head, int32 ``(T, H_kv, slots)``.

    Some slots are empty. Some name blocks that the token may not attend. The last tokens name none.
    """
    rng = random.Random(0)
    own = [at // form.block_size for length in LENGTHS for at in range(length)]
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
