"""tools/partial_formats.py: formats of partial results, and the table of their errors."""

import pytest
import torch

import nsa
import partial_formats
from lm.model import ModelConfig
from partial_formats import exactly, shared_exponent
from tests.helpers.requirements import import_fused


def drawn(rows: int = 500) -> torch.Tensor:
    """Rows of 16 numbers of many sizes; the first is 0."""
    x = torch.randn(rows, 16, dtype=torch.float64) * torch.exp2(torch.randn(rows, 1) * 20)
    x[0] = 0
    return x


@pytest.mark.parametrize("bits", [9, 11])
def test_numbers_are_whole_multiples_of_a_unit_of_the_largest(bits):
    x = drawn()
    rounded = shared_exponent(bits)(x)
    largest = x.unflatten(-1, (-1, 8)).abs().amax(-1, keepdim=True)
    margin = 1 + 2.0 ** (2 - bits)
    # The power of two above the largest, for one bit less than the integers have.
    unit = torch.exp2(torch.floor(torch.log2(largest.clamp(min=1e-300) * margin)) + 2 - bits)
    integers = rounded.unflatten(-1, (-1, 8)) / unit
    assert torch.equal(integers, integers.round())
    assert (integers.abs() < 2 ** (bits - 1)).all()
    error = ((rounded - x).unflatten(-1, (-1, 8)) / unit).abs().max()
    assert 0.49 < error <= 0.5


def test_twelve_bits_are_those_of_the_kernels():
    rows = import_fused("nsa.fused.kernels.partial_rows")
    x = drawn().clamp(-1e30, 1e30).float()
    vectors = x.unflatten(-1, (-1, 8))
    largest = vectors.abs().amax(-1)
    exponent = ((largest * rows._MARGIN).view(torch.int32) & 0xFF << 23).clamp(min=12 << 23)
    scale = (rows._SCALE - exponent.long() & 0xFFFFFFFF).int().view(torch.float32)[..., None]
    # A product and a sum in one instruction, which rounds once.
    sums = (vectors.double() * scale + torch.tensor(rows.ROUNDERS, dtype=torch.float64)).float()
    integers = sums.double() - torch.tensor(rows.ROUNDERS, dtype=torch.float64)
    expected = (integers / scale).flatten(-2)
    assert torch.equal(shared_exponent(11)(x.double()), expected)


def test_scaled_rows_are_those_of_float16():
    x = drawn()
    rounded = partial_formats.scaled(x)
    _, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))
    values = rounded * torch.exp2((15 - exponent).double())
    assert torch.equal(values, values.half().double())
    error = (rounded - x).abs()
    assert (error <= x.abs() * 2.0**-11 + x.abs().amax(-1, keepdim=True) * 2.0**-39).all()


def test_threads_have_two_of_every_eight_channels():
    order = partial_formats.to_threads(torch.arange(64))
    assert order[:8].tolist() == [0, 1, 8, 9, 16, 17, 24, 25]
    assert torch.equal(partial_formats.from_threads(order), torch.arange(64))


def test_without_rounding_pairs_add_up_to_the_branch():
    case = partial_formats.drawn_cases(200)[0]
    q = case.q[None].requires_grad_()
    blocks, size = case.blocks.int()[None, :, None], partial_formats.CONFIG.select_block_size
    k, v = (x[None, :, None] for x in (case.k, case.v))
    out, _ = nsa.selected_attention(q, k, v, blocks, size, backend="reference")
    (dq,) = torch.autograd.grad(out, q, case.dout[None])
    for adds_p_dp in (False, True):
        actual = partial_formats.attend(case, exactly, exactly, adds_p_dp=adds_p_dp)
        for x, y in zip(actual, (out[0], dq[0]), strict=True):
            torch.testing.assert_close(x, y.detach(), atol=1e-12, rtol=1e-10)


def test_outputs_beyond_the_band_are_rounded_and_all_gradients_in_the_order_of_threads():
    case = partial_formats.drawn_cases(320)[0]
    seen = []

    def nothing(x):
        seen.append(x)
        return 0 * x

    out, dq = partial_formats.attend(case, exactly, nothing)
    exact, _ = partial_formats.attend(case, exactly, exactly)
    # Up to the fourth block all blocks are of the band.
    assert torch.equal(out[:192], exact[:192])
    assert not torch.equal(out[192:], exact[192:])
    assert not dq.any()
    partials = []
    partial_formats.attend(case, exactly, lambda x: partials.append(x) or x)
    slots = case.blocks.shape[1]
    assert len(partials) == 2 * slots
    total = sum(map(partial_formats.from_threads, partials[slots:])) * case.q.shape[-1] ** -0.5
    torch.testing.assert_close(total, partial_formats.attend(case, exactly, exactly)[1])
    results = partial_formats.attend(case, partial_formats.bfloat16, exactly)
    assert all(torch.equal(x, partial_formats.bfloat16(x)) for x in results)


def test_table(monkeypatch, capsys):
    small = ModelConfig(128, 2, 4, 1, partial_formats.CONFIG)
    monkeypatch.setattr(partial_formats, "MODEL", small)
    partial_formats.main(["--length", "320", "--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    for tensors in ("Gaussian", "two channels of k, v 30 x", "layer 1 of a trained model"):
        rows = [line[len(tensors) :].split() for line in lines if line.startswith(f"{tensors} ")]
        assert len(rows) == 2 * 7
        assert all(0 < float(value) < 1 for row in rows for value in row[-2:])
    gaussian = [line.split()[1:] for line in lines if line.startswith("Gaussian ")]
    for result in ("out", "dq"):
        in_norm = {row[1]: float(row[-2]) for row in gaussian if row[0] == result}
        assert in_norm["float32"] <= in_norm["12"] < in_norm["10"]
    assert sum("layer 1 of a trained model: the largest channel" in line for line in lines) == 1
