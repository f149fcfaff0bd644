"""What kernels read and write in place: rows of tensors, or a copy of them, or nothing at all."""

import pytest
import torch

from tests.helpers.requirements import import_fused


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


def test_output_that_would_be_lost_is_refused():
    """Rows of the output that are no view of it would be a copy, thrown away."""
    vectors = import_fused("nsa.fused.kernels.vectors")
    vectors.check_output("out", torch.empty(2, 5, 4, 8)[:, :, :3])
    with pytest.raises(ValueError, match=r"out has shape .* written in place"):
        vectors.check_output("out", torch.empty(2, 7, 3, 8)[:, :5])
