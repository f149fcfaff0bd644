"""Plans: that of one sequence, in closed form, equals that of packed sequences with one in them;
and how long plans are kept."""

import gc
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode

import nsa
from nsa.boundaries import boundaries_of
from nsa.fused import compressed_forms
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.plan import Plan
from nsa.fused.planning import make_plan
from nsa.fused.row_layouts import FoldedQueries
from nsa.geometry import Geometry
from nsa.packing import MAX_KEPT
from nsa.testing import make_cu_seqlens

CONFIGS = {
    "default": nsa.NSAConfig(),
    "overlapping": nsa.NSAConfig(selection="token", compress_block_size=32, compress_stride=16),
    "not causal": nsa.NSAConfig(causal=False),
    "started": nsa.NSAConfig(compressed_visibility="started"),
    "first query": nsa.NSAConfig(tile_summary="first"),
    "sparse compressed": nsa.NSAConfig(num_cmp_selected_blocks=2),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [1, 63, 64, 300, 512, 1024])
def test_single_sequence(length, config):
    config, device = CONFIGS[config], torch.device("cpu")
    single = Plan(Geometry.equal(1, length, length, device, config), 1, 64, None, None)
    bounds = torch.tensor([0, length])
    geometry = Geometry.packed(bounds, bounds, length, length, config)
    packed = Plan(geometry, 1, 64, None, None)

    for name in ("keys", "compressed", "selection", "tiles", "groups"):
        actual, expected = getattr(single.geometry, name), getattr(packed.geometry, name)
        assert (actual.total, actual.num_sequences) == (expected.total, expected.num_sequences)
        for values in ("offset", "count", "owner", "local", "real"):
            assert_equal(getattr(actual, values), getattr(expected, values))
    for name in ("first", "visible", "candidates", "own"):
        assert_equal(getattr(single.scoring, name), getattr(packed.scoring, name))
    for name in ("block_start", "blocks_of_token"):
        assert_equal(getattr(single, name), getattr(packed, name))
    for name in ("tile_key_blocks", "tile_cmp_key_blocks", "token_candidates"):
        for actual, expected in zip(getattr(single, name), getattr(packed, name), strict=True):
            if actual is None:
                assert expected is None
            else:
                assert_equal(actual, expected)
    filled = single.scoring.filled
    assert_equal(torch.ones(len(packed.scoring.filled)) if filled is None else filled,
                 packed.scoring.filled)  # fmt: skip


def assert_equal(actual: torch.Tensor, expected: torch.Tensor):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


class TestPackedPlans:
    """Kept with a Packing, and no longer than that; nothing is kept of a bare tensor."""

    q = torch.zeros(1, 300, 2, 64)
    config = nsa.NSAConfig()

    def plan(self, packing, q=None, config=None):
        cu_seqlens = packing.cu_seqlens
        q = self.q if q is None else q
        bounds = boundaries_of(cu_seqlens, packing.max_seqlen)._replace(packing=packing)
        return make_plan(q, config or self.config, bounds)

    def test_of_the_same_packing_is_the_same(self):
        packing = nsa.Packing(make_cu_seqlens([100, 0, 200]))
        plan = self.plan(packing)
        assert self.plan(packing) is plan
        assert self.plan(nsa.Packing(packing.cu_seqlens)) is not plan
        assert self.plan(packing, config=nsa.NSAConfig(causal=False)) is not plan
        assert self.plan(packing, self.q[..., :32]) is not plan
        assert self.plan(packing) is plan

    def test_of_a_bare_tensor_is_new_and_has_a_copy(self):
        cu_seqlens = make_cu_seqlens([100, 0, 200])
        bounds = boundaries_of(cu_seqlens, 200)
        plan = make_plan(self.q, self.config, bounds)
        assert make_plan(self.q, self.config, bounds) is not plan
        assert plan.cu_seqlens.data_ptr() != cu_seqlens.data_ptr()

    @pytest.mark.usefixtures("fused_on_cpu")
    def test_is_forgotten_with_the_packing(self):
        packing = nsa.Packing(make_cu_seqlens([100, 0, 200]))
        plan = self.plan(packing)
        plan.queries.pack(self.q)
        start = weakref.ref(plan.scoring.tile_start)
        rows = weakref.ref(plan.folded._fold_index(2))
        gc.disable()
        try:
            del plan, packing
            assert start() is rows() is None
        finally:
            gc.enable()

    def test_few_are_kept(self):
        packing = nsa.Packing(make_cu_seqlens([100, 0, 200]))
        for window_size in range(1, 3 * MAX_KEPT):
            self.plan(packing, config=nsa.NSAConfig(window_size=window_size))
        assert 1 <= len(packing._kept) <= MAX_KEPT

    def test_none_is_kept_while_a_graph_is_captured(self, monkeypatch):
        monkeypatch.setattr(nsa.packing, "may_keep", lambda _: False)
        packing = nsa.Packing(make_cu_seqlens([100, 0, 200]))
        assert self.plan(packing) is not self.plan(packing)
        assert not packing._kept


def test_none_is_kept_of_tensors_without_data():
    with FakeTensorMode():
        q = torch.zeros(1, 4321, 2, 64)
        fake = make_plan(q, nsa.NSAConfig())
        assert make_plan(q, nsa.NSAConfig()) is not fake
    plan = make_plan(torch.zeros(1, 4321, 2, 64), nsa.NSAConfig())
    assert plan is not fake
    assert type(plan.scoring.own) is torch.Tensor


def test_two_tiles_of_compressed_keys_are_masked_in_short_sequences():
    form = compressed_forms.CompressedForm.BATCH
    token, tile = nsa.NSAConfig.paper(), nsa.NSAConfig()
    for config, count, folded in (
        (token, 128, False),
        (token, 255, False),
        (token, 257, True),
        (tile, 128, False),
        (tile, 129, True),
    ):
        sizes = dict(longest=count * config.compress_stride)
        assert compressed_forms.skips_key_tiles(form, count, config, whole=True, **sizes) == folded
        assert compressed_forms.skips_key_tiles(form, count, config, whole=False, **sizes)


def test_packed_queries_are_folded_over_many_keys():
    form = compressed_forms.CompressedForm.PACKED
    for config, longest, whole, folded in (
        (nsa.NSAConfig.paper(), 8192, True, False),
        (nsa.NSAConfig.paper(), 8192 + 1, True, True),
        (nsa.NSAConfig.paper(), 100, False, True),
        (nsa.NSAConfig(), 100, True, True),
    ):
        sizes = dict(whole=whole, longest=longest)
        assert compressed_forms.skips_key_tiles(form, 10000, config, **sizes) == folded


def test_empty_slots_of_folded_rows_have_no_statistics():
    """A NaN of the first query would else reach the keys of other sequences."""
    heads, kv_heads, bounds = 4, 2, make_cu_seqlens([70, 45])
    geometry = Geometry.packed(bounds, bounds, 115, 115, nsa.NSAConfig.paper())
    folded = FoldedQueries(geometry)
    given = torch.randn(2, heads, 115)
    given[:, :, 0] = torch.nan
    statistics = folded.fold_statistics(RowStatistics(*given), kv_heads)
    real = (folded.query_of_slot >= 0).view(-1, 1, folded.size, 1).expand(-1, 2, -1, 2).flatten(1)
    assert 0 < real.sum() < real.numel()
    for x, empty in zip(statistics, (torch.inf, 0), strict=True):
        assert x.shape == real.mT.shape
        assert x[real.mT].isfinite().all()
        assert (x[~real.mT] == empty).all()
