"""Problems for the product of all projections, and comparisons with plain PyTorch in float64."""

from itertools import pairwise
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from nsa.blocks import BlockPlaces
from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import kernel_head_dim
from nsa.rope import apply_rope
from nsa.testing import make_cu_seqlens

THETA = 10000.0


class ProductCase(NamedTuple):
    """``lengths`` are of packed sequences, or of entries of a batch, and then equal.

    ``blocks`` are tokens of a compressed block and from block to block; None without a compressor.
    ``hidden`` are columns of the gates' MLP, 0 without. ``spare`` are rows past the last packed
    sequence.
    """

    lengths: tuple[int, ...]
    packed: bool
    kv_heads: int
    group: int
    head_dim: int
    branches: int
    blocks: tuple[int, int] | None
    hidden: int
    spare: int = 0

    @property
    def leading(self) -> tuple[int, int]:
        if self.packed:
            return 1, sum(self.lengths) + self.spare
        return len(self.lengths), self.lengths[0]

    @property
    def counts(self) -> list[int]:
        """Heads of each tensor."""
        return [self.kv_heads * self.group, *[self.kv_heads] * (2 * self.branches)]

    @property
    def columns(self) -> int:
        """Of heads."""
        return sum(self.counts) * self.head_dim

    @property
    def width(self) -> int:
        return kernel_head_dim(self.head_dim, self.head_dim)

    @property
    def block_counts(self) -> list[int]:
        """Of each sequence."""
        size, stride = self.blocks or (1, 1)
        return [max(0, (length - size) // stride + 1) for length in self.lengths]

    def bounds(self, device: str) -> Tensor | None:
        return make_cu_seqlens(list(self.lengths), device) if self.packed else None

    def places(self, device: str) -> BlockPlaces | None:
        """The compressed blocks; of packed ones, three rows are none."""
        if self.blocks is None:
            return None
        counts, tokens = self.block_counts, self.leading[1]
        if not self.packed:
            return BlockPlaces(*self.blocks, sum(counts), tokens, counts[0], None, None)
        rows, block_bounds = sum(counts) + 3, make_cu_seqlens(counts, device)
        return BlockPlaces(*self.blocks, rows, tokens, rows, self.bounds(device), block_bounds)


@st.composite
def product_cases(draw) -> ProductCase:
    packed = draw(st.booleans())
    lengths = [draw(st.sampled_from([1, 63, 65, 1000]))] * (
        1 if packed else draw(st.integers(1, 2))
    )
    if packed:
        others = st.lists(st.sampled_from([0, 1, 31, 70, 200]), max_size=5)
        lengths = draw(others.map(lambda more: [*more, *lengths]).flatmap(st.permutations))
    return ProductCase(
        lengths=tuple(lengths),
        packed=packed,
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.sampled_from([1, 3, 4, 16])),
        head_dim=draw(st.sampled_from([16, 64, 80, 96, 128])),
        branches=draw(st.sampled_from([1, 3])),
        blocks=draw(st.sampled_from([None, (32, 16), (64, 16), (64, 64)])),
        hidden=draw(st.sampled_from([0, 13, 48, 200])),
        spare=draw(st.sampled_from([0, 1, 70])) if packed else 0,
    )


def draw_like(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def split_product(case: ProductCase, product: Tensor) -> list[Tensor]:
    """What :func:`nsa.fused.kernel_calls.split_product` gives, but for channels of zeros."""
    index = torch.arange(case.leading[1], device=product.device)
    if case.packed:
        # Rows past the end count as the last sequence's.
        *lengths, last = case.lengths
        indices = map(torch.arange, (*lengths, last + case.spare))
        index = torch.cat(list(indices)).to(product.device)
    heads = product[..., : case.columns].unflatten(-1, (-1, case.head_dim)).split(case.counts, -2)
    return [x if i and i % 2 == 0 else apply_rope(x, index, THETA) for i, x in enumerate(heads)]


def block_rows(case: ProductCase, product: Tensor) -> Tensor:
    """Rows ``(2, M, H_kv, l, D)`` of the compressed blocks of the first branch."""
    first = case.counts[0]
    heads = product[..., : case.columns].unflatten(-1, (-1, case.head_dim))
    both = heads[..., first : first + 2 * case.kv_heads, :].flatten(0, 1)
    ends = torch.tensor([0, *case.lengths]).cumsum(0).tolist()
    size, stride = case.blocks or (1, 1)
    rows = [
        both[start:end].unfold(0, size, stride)
        for start, end in pairwise(ends)
        if end - start >= size
    ]
    joined = torch.cat(rows) if rows else both[:0, ..., None].expand(-1, -1, -1, size)
    return joined.transpose(-1, -2).unflatten(1, (2, -1)).transpose(0, 1)


def assert_rounded_once(found: Tensor, wanted: Tensor):
    """But for errors of the sines."""
    assert found.shape == wanted.shape
    atol = 1e-11 if found.dtype == torch.float64 else 1e-5
    rtol = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol)


def check_split(case: ProductCase, dtype: torch.dtype, device: str):
    """Results are contiguous, each in memory of its own."""
    product = draw_like(dtype, device, *case.leading, case.columns + case.hidden)
    found = kernel_calls.split_product(
        product, case.counts[0], case.kv_heads, case.branches, case.head_dim, case.width,
        case.bounds(device), THETA,
    )  # fmt: skip
    for x, wanted in zip(found, split_product(case, product.double()), strict=True):
        assert x.is_contiguous()
        assert x.untyped_storage().nbytes() == x.nbytes
        assert_rounded_once(x[..., : case.head_dim], wanted)
        assert not x[..., case.head_dim :].any()


def check_gradient(case: ProductCase, dtype: torch.dtype, device: str, slices=lambda x: x):
    """``slices`` puts a tensor of heads into another. Channels past those of the layer are NaN."""
    product = torch.zeros(*case.leading, case.columns + case.hidden, device=device).double()
    product.requires_grad_()
    outputs = split_product(case, product)
    gradients = [draw_like(dtype, device, *x.shape) for x in outputs]
    wide = [x.new_full((*x.shape[:-1], case.width), torch.nan) for x in gradients]
    for x, gradient in zip(wide, gradients, strict=True):
        x[..., : case.head_dim] = gradient
    dhidden, drows, places = None, None, case.places(device)
    if case.hidden:
        outputs.append(product[..., case.columns :])
        dhidden = draw_like(dtype, device, *case.leading, case.hidden)
        gradients.append(dhidden)
    if places is not None:
        outputs.append(block_rows(case, product))
        shape = (2, places.blocks, case.kv_heads, case.blocks[0], case.head_dim)
        drows = draw_like(dtype, device, *shape)
        gradients.append(drows[:, : sum(case.block_counts)])
    (wanted,) = torch.autograd.grad(outputs, product, [x.double() for x in gradients])
    found = kernel_calls.product_gradient(
        [slices(x) for x in wide], dhidden, drows, places, case.head_dim, case.bounds(device), THETA
    )
    assert_rounded_once(found, wanted)
