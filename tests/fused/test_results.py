"""Results in memory of the caller: outputs, gradients of queries, and sums over calls."""

import pytest
import torch

import nsa
from nsa.fused import entry, key_sums
from nsa.results import Results
from nsa.testing import make_inputs
from tests.helpers.small_configs import tile_config, token_config

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

LENGTH, FIRST = 512, 256


@pytest.mark.parametrize("config", [token_config(), tile_config()], ids=["token", "tile"])
@pytest.mark.parametrize("workspace", [None, 1], ids=["all heads", "a head at a time"])
def test_pieces_write_and_add_where_they_are_told(config, workspace):
    """Two calls share keys. The results are those of one call over the whole."""
    q, k, v = make_inputs((1, LENGTH), 4, 2, 64, dtype=torch.float64)
    k_cmp, v_cmp = (
        x.unfold(1, config.compress_block_size, config.compress_stride).mean(-1) for x in (k, v)
    )
    leaves = [x.requires_grad_() for x in (q, k, v, k_cmp, v_cmp)]
    dout = torch.randn_like(q)
    options = dict(config=config, max_workspace_bytes=workspace)

    def attend(q, k, v, k_cmp, v_cmp, results=None):
        return entry.forward(
            q, (k, k, k), (v, v, v), compressed_kv=(k_cmp, v_cmp), results=results, **options
        )

    out = attend(*leaves)
    expected = torch.autograd.grad(out, leaves, dout)

    # Slices of heads, as of a rank that computes some at a time.
    memory = torch.full((2, LENGTH, 6, 64), torch.nan, dtype=torch.float64)
    own_out, own_dq = memory[:, :, 1:5]
    sums = key_sums.make_key_sums(k[0], v[0], config, deterministic=False)
    assert sums is not None
    late = torch.zeros(2, LENGTH, 2, 64, dtype=torch.float64)
    compressed = [torch.zeros_like(x) for x in (k_cmp, v_cmp)]
    for rows in (slice(0, FIRST), slice(FIRST, LENGTH)):
        blocks = nsa.blocks.num_compressed_blocks(rows.stop, config)
        results = Results(out=own_out[rows])
        part = attend(
            q[:, rows], k[:, : rows.stop], v[:, : rows.stop],
            k_cmp[:, :blocks], v_cmp[:, :blocks], results=results,
        )  # fmt: skip
        assert part.data_ptr() == own_out[rows].data_ptr()
        results.dq = own_dq[rows]
        results.keys = sums.of_call(slice(0, rows.stop))
        dq, dk, dv, *given = torch.autograd.grad(part, leaves, dout[:, rows], allow_unused=True)
        for total, grad in zip(compressed, given, strict=True):
            total += grad
        assert (dk is None) == (dv is None) == (workspace is None)
        if dk is not None:
            late[0] += dk[0]
            late[1] += dv[0]
        assert torch.equal(dq[0, rows], own_dq[rows])
    for which, total in enumerate(late):
        rounded = torch.empty_like(total)
        sums.round_into(which, slice(None), rounded)
        total += rounded
        for first, grad in sums.windows(which):
            total[first : first + len(grad)] += grad
    found = (own_out, own_dq, *late, *(x[0] for x in compressed))
    for x, wanted in zip(found, (out, *expected), strict=True):
        torch.testing.assert_close(x, wanted[0].detach(), rtol=0, atol=1e-10)
    assert memory[:, :, [0, 5]].isnan().all()
