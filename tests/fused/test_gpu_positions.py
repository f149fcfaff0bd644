"""On the GPU: queries that are the last ones of longer sequences, against the float64 reference.

Random lengths and options are in the accuracy tests of both modes. Here is each way that keys and
queries may lie.
"""

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.cuda_graphs import Call, check_replays
from tests.helpers.gpu_cases import (
    assert_equal_but_for_rounding,
    check_against_reference,
    check_nothing_is_left_unwritten,
    default_case,
    gpu_test,
    paper_case,
)

pytestmark = gpu_test

NON_CAUSAL = dict(causal=False)
STARTED = dict(compressed_visibility="started")
TOKEN = {
    # Lengths and queries of each sequence, and what differs from the paper's configuration.
    "one query": ([1000], [1], {}),
    "within a row": ([4096], [7], {}),
    "two parts of rows": ([4103], [65], {}),
    "rows": ([4096], [1000], {}),
    "few blocks": ([300], [270], {}),
    "started": ([4096], [1000], STARTED),
    "not causal": ([2000], [300], NON_CAUSAL),
    "packed": ([700, 64, 1, 0, 2000, 300, 31], [7, 0, 1, 0, 65, 300, 3], {}),
    "packed, started": ([700, 64, 1, 2000, 20], [7, 0, 1, 65, 5], STARTED),
    "packed, not causal": ([700, 64, 1, 2000], [7, 0, 1, 65], NON_CAUSAL),
}
SPARSE = dict(num_cmp_selected_blocks=2, cmp_group_size=64, compress_block_size=32,
              select_block_size=64, q_tile_size=64)  # fmt: skip
WIDE = dict(select_block_size=128, q_tile_size=128)
TILE = {
    # The same for NSAConfig(), where queries start at a tile.
    "one query": ([1025], [1], {}),
    "tiles": ([4096], [1024], {}),
    "a short tile": ([1000], [232], {}),
    "many compressed": ([10000], [784], {}),
    "wide key blocks": ([1000], [232], WIDE),
    "not causal": ([1000], [232], NON_CAUSAL),
    "sparse compressed": ([9000], [104], SPARSE),
    "packed": ([1000, 256, 1, 0, 2055, 300], [232, 0, 1, 0, 7, 300], {}),
    "packed, wide key blocks": ([1000, 128, 2055, 300], [104, 0, 7, 300], WIDE),
    "packed, sparse compressed": ([9000, 64, 711, 300], [104, 0, 7, 300], SPARSE),
}


def make_case(mode, name, **changes):
    lengths, queries, settings = (TOKEN if mode == "token" else TILE)[name]
    preset, case = (
        (nsa.NSAConfig.paper, paper_case) if mode == "token" else (nsa.NSAConfig, default_case)
    )
    kind = dict(config=preset(**settings), packed=len(lengths) > 1)
    return case(lengths=tuple(lengths), queries=tuple(queries), **kind, **changes)


@pytest.mark.parametrize("name", TOKEN)
def test_token_mode(name, monkeypatch):
    case = make_case("token", name)
    check_against_reference(case, monkeypatch)
    if not case.packed:
        check_against_reference(case._replace(batch=2, compressor="given"), monkeypatch)


@pytest.mark.parametrize("name", TILE)
def test_tile_mode(name, monkeypatch):
    case = make_case("tile", name)
    check_against_reference(case, monkeypatch)
    if not case.packed:
        check_against_reference(case._replace(batch=2, compressor="given"), monkeypatch)


@pytest.mark.parametrize("visibility", ["complete", "started"])
def test_parts_of_rows(visibility, monkeypatch):
    """In backward, which folds where it does not add to sums of queries."""
    config = nsa.NSAConfig.paper(compressed_visibility=visibility)
    case = paper_case(lengths=(4103,), queries=(1001,), config=config, summed=False)
    check_against_reference(case, monkeypatch)
    check_nothing_is_left_unwritten(case)
    call = LastQueries(config, (2, 1001), (2, 4103))
    check_replays(call, call.forward_and_backward)


@pytest.mark.parametrize("mode", ["token", "tile"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_nothing_is_left_unwritten(packed, mode):
    name = "packed" if packed else {"token": "two parts of rows", "tile": "a short tile"}[mode]
    check_nothing_is_left_unwritten(make_case(mode, name))


@pytest.mark.parametrize("mode", ["token", "tile"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_compiles_once_for_all_offsets(packed, mode):
    torch._dynamo.reset()
    config = nsa.NSAConfig.paper() if mode == "token" else nsa.NSAConfig(q_tile_size=64)

    def loss(q, k, v, extra):
        return nsa.forward(q, k, v, config=config, backend="fused", **extra).float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    kind = dict(dtype=torch.bfloat16, device="cuda", requires_grad=True)
    # More than one tile, because PyTorch compiles for a size of 1.
    forms = [
        ([100, 7, 0], [1060, 71, 64]),
        ([65, 300, 2], [129, 300, 130]),
        ([130, 2, 4], [194, 66, 4]),
    ]
    for index, (queries, keys) in enumerate(forms):
        leading, leading_k = ((sum(x),) if packed else (2, x[0]) for x in (queries, keys))
        q, _, _ = make_inputs(leading, 8, 2, 64, seed=index, **kind)
        _, k, v = make_inputs(leading_k, 8, 2, 64, seed=index, **kind)
        extra = {}
        if packed:
            extra = dict(cu_seqlens=make_cu_seqlens(queries, "cuda"), max_seqlen=max(queries))
            extra |= dict(cu_seqlens_k=make_cu_seqlens(keys, "cuda"), max_seqlen_k=max(keys))
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            expected, actual = (f(q, k, v, extra) for f in (loss, compiled))
            torch.testing.assert_close(actual, expected)
            wanted = torch.autograd.grad(expected, (q, k, v))
            grads = torch.autograd.grad(actual, (q, k, v))
        for grad, want in zip(grads, wanted, strict=True):
            assert_equal_but_for_rounding(grad, want)


class LastQueries(Call):
    """With fewer queries than keys."""

    def __init__(self, config, leading, leading_k, queries=None, keys=None, longest=None):
        self.leading_k = leading_k
        super().__init__(leading, 64, config, queries, longest)
        self.settings |= dict(cu_seqlens_k=keys, max_seqlen_k=longest)

    def draw(self, seed):
        q, *_, weight, dout = super().draw(seed)
        kind = dict(dtype=q.dtype, device="cuda", requires_grad=True)
        _, k, v = make_inputs(self.leading_k, *self.shape[1:], seed=seed, **kind)
        return [q, k, v, weight, dout]

    def set(self, tensors, packs=None):
        super().set(tensors)
        if packs is not None:
            queries, keys = packs
            self.cu_seqlens.copy_(queries)
            self.settings["cu_seqlens_k"].copy_(keys)


@pytest.mark.parametrize("mode", ["token", "tile"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_graphs_of_other_offsets(packed, mode):
    config = nsa.NSAConfig.paper() if mode == "token" else nsa.NSAConfig(q_tile_size=64)
    if not packed:
        call = LastQueries(config, (2, 200), (2, 3400))
        return check_replays(call, call.forward_and_backward)
    packs = [
        tuple(make_cu_seqlens(x, "cuda") for x in pack)
        for pack in (([100, 7, 0, 93], [1060, 71, 64, 2205]), ([1, 199, 0, 0], [65, 711, 0, 2624]))
    ]
    bounds = (x.clone() for x in packs[0])
    call = LastQueries(config, (200,), (3400,), *bounds, longest=3400)
    return check_replays(call, call.forward_and_backward, packs)
