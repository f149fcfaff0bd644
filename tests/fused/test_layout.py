"""Plans: that of one sequence, in closed form, equals that of packed sequences with one in them;
and how long those of packed sequences are kept."""

import gc
import weakref

import pytest
import torch

import nsa
from nsa.blocks import Geometry, Segments
from nsa.fused import layout
from nsa.fused.layout import Plan, make_plan
from nsa.testing import make_cu_seqlens, make_inputs

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
    single = Plan(Geometry.single(length, device, config), 64, None, None)
    tokens = Segments(torch.tensor([0, length]), length)
    packed = Plan(Geometry(tokens, config), 64, None, None)

    for name in ("tokens", "compressed", "selection", "tiles", "groups"):
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
            assert_equal(actual, expected)
    filled = single.scoring.filled
    assert_equal(torch.ones(len(packed.scoring.filled)) if filled is None else filled,
                 packed.scoring.filled)  # fmt: skip


def assert_equal(actual: torch.Tensor, expected: torch.Tensor):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


class TestPackedPlans:
    """Kept with the tensor of boundaries, and no longer than this or its values."""

    q = torch.zeros(1, 300, 2, 64)
    config = nsa.NSAConfig()

    def plan(self, cu_seqlens, q=None, config=None, longest=200):
        return make_plan(self.q if q is None else q, cu_seqlens, longest, config or self.config)

    def test_of_the_same_tensor_is_the_same(self):
        cu_seqlens = make_cu_seqlens([100, 0, 200])
        plan = self.plan(cu_seqlens)
        assert self.plan(cu_seqlens) is plan
        assert self.plan(cu_seqlens.clone()) is not plan
        assert self.plan(cu_seqlens, longest=250) is not plan
        assert self.plan(cu_seqlens, config=nsa.NSAConfig(causal=False)) is not plan
        assert self.plan(cu_seqlens, self.q[..., :32]) is not plan
        assert self.plan(cu_seqlens) is plan

    @pytest.mark.usefixtures("fused_on_cpu")
    def test_changes_are_noticed(self):
        q, k, v = make_inputs((300,), 2, 1, 64, requires_grad=True)
        cu_seqlens, other = make_cu_seqlens([100, 0, 200]), make_cu_seqlens([30, 170, 100])
        results = []
        for _ in range(2):
            call = dict(config=self.config, cu_seqlens=cu_seqlens, max_seqlen=200, backend="fused")
            out = nsa.forward(q, k, v, **call)
            results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
            cu_seqlens.copy_(other)
        out = nsa.forward(q, k, v, **(call | dict(cu_seqlens=other)))
        expected = (out, *torch.autograd.grad(out.sum(), (q, k, v)))
        torch.testing.assert_close(results[1], expected, rtol=0, atol=0)
        assert not torch.equal(results[0][0], out)

    @pytest.mark.usefixtures("fused_on_cpu")
    def test_is_forgotten_with_the_tensor(self):
        cu_seqlens = make_cu_seqlens([100, 0, 200])
        plan = self.plan(cu_seqlens)
        plan.tokens.pack(self.q)
        start = weakref.ref(plan.scoring.tile_start(1))
        rows = weakref.ref(plan.folded.fold_index(2))
        gc.disable()
        try:
            del plan, cu_seqlens
            assert start() is rows() is None
        finally:
            gc.enable()

    def test_few_are_kept(self):
        cu_seqlens = make_cu_seqlens([100, 0, 200])
        for longest in range(200, 220):
            self.plan(cu_seqlens, longest=longest)
        plans = layout._packed_plans[cu_seqlens]
        assert 1 <= len(plans) <= layout.MAX_PLANS

    def test_none_is_kept_while_a_graph_is_captured_or_where_changes_are_not_seen(
        self, monkeypatch
    ):
        with torch.inference_mode():
            cu_seqlens = make_cu_seqlens([100, 0, 200])
        assert self.plan(cu_seqlens) is not self.plan(cu_seqlens)
        cu_seqlens = make_cu_seqlens([100, 0, 200])
        monkeypatch.setattr(layout, "may_keep", lambda _: False)
        assert self.plan(cu_seqlens) is not self.plan(cu_seqlens)
