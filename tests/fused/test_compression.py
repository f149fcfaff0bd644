"""Compressed keys and values: as autograd has them, and the kernels of the mean against float64."""

import pytest
import torch

import nsa
from nsa.blocks import num_compressed_blocks
from nsa.fused import kernel_calls
from nsa.fused.compression import compress, compress_pair, compress_pair_backward
from nsa.fused.plan import make_plan
from nsa.testing import make_cu_seqlens
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test, slice_of_heads
from tests.helpers.requirements import import_fused

TILES = nsa.NSAConfig(compress_block_size=16, select_block_size=64, q_tile_size=64)
OVERLAPPING = nsa.NSAConfig(selection="token", compress_block_size=32, compress_stride=16)
HEADS, DIM = 3, 8


def compress_plainly(x, weight, lengths, config, rows):
    """Of sequences ``lengths`` in each entry of ``x (B, T, H, D)``: ``(B, rows, H, D)``."""
    out = x.new_zeros(len(x), rows, *x.shape[2:])
    offset = block = 0
    for length in lengths:
        for j in range(num_compressed_blocks(length, config)):
            start = offset + j * config.compress_stride
            mean = x[:, start : start + config.compress_block_size].mean(dim=1)
            if weight is not None:
                mean = torch.einsum("bhd,hde->bhe", mean, weight)
            out[:, block] = mean
            block += 1
        offset += length
    return out


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("weighted", ["", "k", "v", "kv"])
@pytest.mark.parametrize("lengths", [[1], [65], [100, 0, 1, 63]], ids=str)
@pytest.mark.parametrize("config", [TILES, OVERLAPPING], ids=["tiles", "overlapping"])
def test_equals_autograd(config, lengths, weighted, shared):
    """Also where there are no blocks, and tokens without a block."""
    total, packed, double = sum(lengths), len(lengths) > 1, dict(dtype=torch.float64)
    shape = (1 if packed else 2, total, HEADS, DIM)
    k, v = (torch.randn(shape, **double).requires_grad_() for _ in range(2))
    weights = tuple(
        torch.randn(HEADS, DIM, DIM, **double).requires_grad_() if name in weighted else None
        for name in "kv"
    )
    plan = make_plan(k, make_cu_seqlens(lengths) if packed else None, max(lengths), config)
    rows = plan.geometry.compressed.total
    expected = [
        compress_plainly(x, weight, lengths, config, rows)
        for x, weight in zip((k, v), weights, strict=True)
    ]
    with torch.no_grad():
        actual = compress_pair(slice_of_heads(k), v, weights, plan)
        alone = [compress(x, w, plan) for x, w in zip((k, v), weights, strict=True)]
    torch.testing.assert_close(list(actual), expected)
    torch.testing.assert_close(alone, expected)

    douts = [torch.randn_like(x) for x in expected]
    used = [x for x in weights if x is not None]
    inputs = [k, v, *used]
    # Without blocks nothing depends on them.
    loss = sum((x * dout).sum() for x, dout in zip(expected, douts, strict=True))
    grads = torch.autograd.grad(loss + 0 * sum(x.sum() for x in inputs), inputs)
    addends, dkv = None, list(grads[:2])
    if shared:
        window, selected = torch.randn(2, 2, *shape, **double)
        dkv = [sum(x) for x in zip(dkv, window, selected, strict=True)]
        addends = tuple(map(slice_of_heads, window)), tuple(selected)
    with torch.no_grad():
        dxs, dweights = compress_pair_backward(*douts, k, v, weights, plan, addends)
    if shared:
        assert [x.data_ptr() for x in dxs] == [x.data_ptr() for x in addends[0]]
    assert [x is None for x in dweights] == [x is None for x in weights]
    torch.testing.assert_close([*dxs, *(x for x in dweights if x is not None)], [*dkv, *grads[2:]])


def test_rows_of_tensors():
    """What kernels read and write in place: slices of heads, of entries that lie in a row."""
    vectors = import_fused("nsa.fused.kernels.vectors")
    wide = torch.arange(2.0 * 5 * 4 * 8).view(2, 5, 4, 8)
    x = wide[:, :, 1:3]
    memory, stride = vectors.flat_rows(x)
    assert (memory.data_ptr(), stride) == (x.data_ptr(), 4 * 8)
    assert torch.equal(memory.as_strided((10, 16), (stride, 1)), x.reshape(10, 16))
    vectors.check_output("x", x)
    # Entries do not lie in a row, or heads do not in a token.
    for x in (wide[:, :3], wide.transpose(1, 2), wide[..., ::2]):
        memory, stride = vectors.flat_rows(x)
        assert memory.data_ptr() != x.data_ptr()
        assert torch.equal(memory.view(-1, stride), x.reshape(-1, stride))
        with pytest.raises(ValueError, match="written in place"):
            vectors.check_output("x", x)
    with pytest.raises(ValueError, match="written in place"):
        vectors.check_output("x", wide[:, :1].expand(2, 3, 4, 8))


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor):
    """``actual`` is float64 ``exact``, rounded once."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=1e-5)


def assert_nan_around(x: torch.Tensor):
    """Nothing was written beside a :func:`slice_of_heads`."""
    assert x._base[:, :, [0, -1]].isnan().all()


@pytest.mark.usefixtures("poisoned_memory")
class TestKernels:
    pytestmark = gpu_test

    @pytest.mark.parametrize("length", [1, 63, 65, 1000])
    @pytest.mark.parametrize(("size", "stride"), [(1, 1), (16, 16), (32, 16), (64, 64), (128, 128)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_means_are_float64_rounded(self, dtype, size, stride, length):
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

    @pytest.mark.parametrize("length", [1, 63, 65, 1000])
    @pytest.mark.parametrize(("size", "overlap"), [(16, 1), (32, 1), (32, 2), (64, 1), (128, 1)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_gradients_are_float64_rounded(self, dtype, size, overlap, length):
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

    def test_without_blocks(self):
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
