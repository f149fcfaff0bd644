"""On the GPU: the kernels of the mean and its gradient against float64 emulation, rounded once."""

import pytest
import torch

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor):
    """``actual`` is float64 ``exact``, rounded once."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=1e-5)


def assert_nan_around(x: torch.Tensor):
    """Nothing was written beside a :func:`slice_of_heads`."""
    assert x._base[:, :, [0, -1]].isnan().all()


@pytest.mark.parametrize("length", [1, 63, 65, 1000])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (16, 16), (32, 16), (64, 64), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_means_are_float64_rounded(dtype, size, stride, length):
    """Of one tensor and of two, of which one is a slice of heads."""
    x, other = torch.randn(2, 2, length, 3, 96, device="cuda").to(dtype)
    end = max(0, 2 * length - size + 1)
    start = torch.arange(0, end, stride, dtype=torch.int32, device="cuda")
    # As many blocks for each entry, and some that are none.
    start = start[: len(start) // 2 * 2]
    start[torch.rand(len(start), device="cuda") < 0.2] = -1
    for out_dtype in dict.fromkeys((dtype, torch.float32)):
        expected = [
            emulated_kernels.mean_forward(i.double(), start, size, torch.float64)
            for i in (x, other)
        ]
        alone = kernel_calls.mean_forward(slice_of_heads(x), start, size, out_dtype)
        assert alone.dtype == out_dtype
        assert_rounded(alone, expected[0])
        for pair in ((x, slice_of_heads(other)), (slice_of_heads(x), other)):
            means = kernel_calls.mean_forward(pair[0], start, size, out_dtype, other=pair[1])
            assert_rounded(means, torch.stack(expected))


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (16, 16), (32, 16), (64, 64), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_order_means_have_the_bits_of_sums_token_by_token(dtype, size, stride):
    """As a cache adds them where it compresses a block at a time."""
    x, other = torch.randn(2, 1000, 3, 96, device="cuda").to(dtype)
    start = torch.arange(0, 1000 - size + 1, stride, dtype=torch.int32, device="cuda")
    expected = []
    for rows in (x, other):
        total = torch.zeros(len(start), 3, 96, device="cuda")
        for token in range(size):
            total += rows[start + token]
        expected.append((total / size).to(dtype))
    means = kernel_calls.mean_forward(x, start, size, dtype, other, in_order=True)
    assert torch.equal(means, torch.stack(expected))
    assert torch.equal(kernel_calls.mean_forward(x, start, size, dtype, in_order=True), expected[0])


@pytest.mark.parametrize("length", [1, 63, 65, 1000])
@pytest.mark.parametrize(("size", "overlap"), [(16, 1), (32, 1), (32, 2), (64, 1), (128, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_float64_rounded(dtype, size, overlap, length):
    """New and added; of tokens without a block, and block 0, which is none's, is NaN."""
    num_blocks, shape = 7, (2, length, 3, 96)
    blocks = torch.randint(-num_blocks, 2 * num_blocks, (2 * length, overlap), device="cuda")
    blocks = torch.where(blocks > 0, blocks, -1).int()
    for dmean_dtype in dict.fromkeys((dtype, torch.float32)):
        dmeans = torch.randn(2, 2, num_blocks, 3, 96, device="cuda").to(dmean_dtype)
        dmeans[:, 0, 0] = torch.nan
        arguments = (tuple(dmeans), blocks, size, dtype)
        exact = (tuple(dmeans.double()), blocks, size, torch.float64)
        expected = emulated_kernels.mean_backward(*exact)
        new = kernel_calls.mean_backward(*arguments)
        assert {x.shape for x in new} == {shape}
        assert new[0].untyped_storage().data_ptr() != new[1].untyped_storage().data_ptr()
        assert_rounded(torch.stack(new), torch.stack(expected))

        window, selected = torch.randn(2, 2, *shape, device="cuda").to(dtype)
        # The sums are written to the first pair.
        added = (tuple(window.double()), tuple(selected.double()))
        expected = emulated_kernels.mean_backward(*exact, added)
        for written, read in ((0, 1), (1, 0)):
            # One of each pair is a slice of heads.
            targets, others = list(window.clone()), list(selected.clone())
            targets[written] = slice_of_heads(targets[written])
            others[read] = slice_of_heads(others[read])
            dxs = kernel_calls.mean_backward(*arguments, (tuple(targets), tuple(others)))
            assert [x.data_ptr() for x in dxs] == [x.data_ptr() for x in targets]
            assert_rounded(torch.stack(dxs), torch.stack(expected))
            assert_nan_around(targets[written])
        some = max(1, length // 3)
        last = tuple(x[:, -some:] for x in selected)
        exact_last = tuple(x.double() for x in last)
        expected = emulated_kernels.mean_backward(*exact, (tuple(window.double()), exact_last))
        dxs = kernel_calls.mean_backward(*arguments, (tuple(window.clone()), last))
        assert_rounded(torch.stack(dxs), torch.stack(expected))


@pytest.mark.parametrize("last", [0, 10, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_with_one_head_after_another(dtype, last):
    """They are read where they are, and the sum is new."""
    dmeans = torch.randn(2, 1, 7, 3, 96, device="cuda", dtype=dtype)
    blocks = torch.randint(-1, 7, (65, 1), dtype=torch.int32, device="cuda")
    first = torch.randn(2, 1, 3, 65, 96, device="cuda", dtype=dtype).transpose(2, 3)
    rest = torch.randn(2, 1, last, 3, 96, device="cuda", dtype=dtype)
    before = first.clone()
    exact = (tuple(dmeans.double()), blocks, 64, torch.float64)
    addends = (tuple(first.double()), tuple(rest.double()))
    expected = emulated_kernels.mean_backward(*exact, addends)
    addends = (tuple(first), tuple(rest))
    dxs = kernel_calls.mean_backward(tuple(dmeans), blocks, 64, dtype, addends)
    assert_rounded(torch.stack(dxs), torch.stack(expected))
    assert all(x.is_contiguous() for x in dxs)
    assert torch.equal(first, before)


def test_without_blocks():
    """The sum of the rest, and zeros where there is none."""
    shape, kind = (1, 65, 2, 64), dict(dtype=torch.bfloat16, device="cuda")
    dmeans = tuple(torch.zeros(1, 0, 2, 64, **kind) for _ in range(2))
    blocks = torch.full((65, 1), -1, dtype=torch.int32, device="cuda")
    new = kernel_calls.mean_backward(dmeans, blocks, 128, torch.bfloat16)
    assert not torch.stack(new).any()
    window, selected = torch.randn(2, 2, *shape, device="cuda").to(torch.bfloat16)
    expected = window.double() + selected.double()
    addends = (tuple(window), tuple(selected))
    dxs = kernel_calls.mean_backward(dmeans, blocks, 128, torch.bfloat16, addends)
    assert_rounded(torch.stack(dxs), expected)
