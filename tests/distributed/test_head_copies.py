"""Copies of slices of heads, in elements as wide as they can be."""

import pytest
import torch

from nsa.distributed import head_copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("channels", [1, 4, 64])
def test_copies_are_equal(dtype, channels):
    x = torch.randn(5, 6, channels, dtype=torch.float64).to(dtype)
    for part in (x[:, 2:4], x[1:, :1], x[:0], x.transpose(0, 1), x[..., :1]):
        copied = torch.empty_like(part, memory_format=torch.contiguous_format)
        head_copies.copy_rows(copied, part)
        assert torch.equal(copied, part)
    target = torch.zeros(5, 9, channels, dtype=dtype)
    head_copies.copy_rows(target[:, 3:], x)
    assert torch.equal(target[:, 3:], x)
    assert not target[:, :3].any()
    head_copies.copy_rows(target[:, 3:], x.real.double())  # another dtype
    assert torch.equal(target[:, 3:], x.real.to(dtype))


def test_slices_of_heads_are_copied_in_wide_elements():
    x = torch.randn(5, 6, 64).bfloat16()
    assert head_copies._is_wide(x[:, 2:4])
    assert not head_copies._is_wide(x[..., 1:9])
    assert not head_copies._is_wide(x[..., :4])
