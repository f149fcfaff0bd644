"""How many KV heads ranks attend at a time."""

from types import SimpleNamespace

import pytest
import torch

from nsa.distributed import call
from nsa.distributed.call import RankInputs


@pytest.mark.parametrize(
    ("heads", "megabytes", "sizes"),
    [
        (8, 4, [8]),
        (8, 8, [8]),  # half of a chunk's bytes: few launches
        (8, 16, [4, 4]),  # the second half is gathered beside the work of the first
        (8, 64, [2, 2, 2, 2]),
        (8, 256, [1] * 8),
        (5, 50, [2, 2, 1]),
        (1, 100, [1]),
        (1, 256, [1]),
    ],
)
def test_chunks_follow_from_the_bytes_of_a_head(heads, megabytes, sizes):
    rows = megabytes << 11  # of 128 channels of 2 bytes, keys and values, on both of two ranks
    meta = dict(dtype=torch.bfloat16, device="meta")
    q, k = (torch.empty(rows // 2, n, 128, **meta) for n in (2 * heads, heads))
    inputs = RankInputs(q, None, None, k, k, (k, k))
    layout = SimpleNamespace(ranks=2, rows=rows // 2)
    chunks = call.chunks(SimpleNamespace(layout=layout), inputs)
    assert [x.kv.stop - x.kv.start for x in chunks] == sizes
    assert [x.query.stop - x.query.start for x in chunks] == [2 * n for n in sizes]
