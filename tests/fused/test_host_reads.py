"""Nothing makes the host wait for values, so that CUDA graphs can capture forward and backward."""

from types import SimpleNamespace

import pytest
import torch

import nsa
from nsa import block_index_checks, boundaries, host
from nsa.fused import entry, schedule
from nsa.fused import planning as plans
from nsa.fused.schedule import run_backward, run_forward
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.host_reads import NoHostReads
from tests.helpers.small_configs import tile_config, token_config

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

LENGTHS = [70, 0, 1, 130]


@pytest.fixture
def capturing(monkeypatch):
    """As while a CUDA graph is captured."""
    for module in (schedule, boundaries):
        monkeypatch.setattr(module, "is_capturing", lambda _: True)
    monkeypatch.setattr(plans, "may_keep", lambda _: False)
    for module in (block_index_checks, boundaries):
        monkeypatch.setattr(module, "has_readable_values", lambda _: False)
    # A dispatch mode, which the tests look with, is no reason for custom ops.
    monkeypatch.setattr(entry, "is_traced", lambda *_: False)


@pytest.fixture
def backward_too(monkeypatch):
    """Each call runs forward and backward, within no op, so that dispatch modes see inside."""
    calls = []

    def forward_and_backward(inputs, block_indices, plan, chosen, _, **__):
        out, saved = run_forward(inputs, block_indices, plan, chosen, save=True)
        dout = torch.ones_like(out)
        grads = run_backward(dout, inputs, block_indices, saved, plan, chosen)
        calls.append([x for x in grads if x is not None])
        return out, saved

    monkeypatch.setattr(entry, "run_forward", forward_and_backward)
    return calls


CONFIGS = {
    "default": tile_config(),
    "forced blocks": tile_config(num_initial_blocks=1, num_local_blocks=1),
    "non-causal": tile_config(causal=False),
    "started": tile_config(compressed_visibility="started", tile_summary="first"),
    "sparse compressed": tile_config(
        num_cmp_selected_blocks=1, cmp_group_size=64, compress_block_size=1
    ),
    "token": token_config(),
    "token non-causal": nsa.NSAConfig.paper(num_selected_blocks=4, causal=False),
}


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("limit", [None, 1], ids=["whole", "in chunks"])
@pytest.mark.parametrize("case", CONFIGS)
def test_forward_and_backward(case, limit, packed, backward_too):
    leading = (sum(LENGTHS),) if packed else (2, 130)
    q, k, v = make_inputs(leading, 4, 2, 8)
    weights = [torch.randn(2, 8, 8) for _ in "kv"]
    extras = {}
    if packed:
        extras = dict(cu_seqlens=make_cu_seqlens(LENGTHS), max_seqlen=max(LENGTHS))
    call = dict(
        config=CONFIGS[case], gate_proj_weight=torch.randn(4, 3, 8), compress_k_weight=weights[0],
        compress_v_weight=weights[1], max_workspace_bytes=limit, backend="fused",
    )  # fmt: skip
    expected = nsa.forward(q, k, v, **call, **extras)
    with NoHostReads():
        out = nsa.forward(q, k, v, **call, **extras)
    torch.testing.assert_close(out, expected)
    assert len(backward_too) == 2
    torch.testing.assert_close(*backward_too)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
@pytest.mark.parametrize("case", ["default", "token"])
def test_layer(case, compressor, packed, backward_too):
    layer = nsa.NativeSparseAttention(
        16, 4, 2, config=CONFIGS[case], compressor=compressor, backend="fused"
    )
    x = torch.randn(*(sum(LENGTHS),) if packed else (2, 130), 16)
    extras = (make_cu_seqlens(LENGTHS), max(LENGTHS)) if packed else ()
    with NoHostReads(), torch.no_grad():
        layer(x, *extras)
    assert len(backward_too) == 1


@pytest.mark.usefixtures("capturing")
def test_packed_sequences_need_max_seqlen_to_be_captured():
    q, k, v = make_inputs((sum(LENGTHS),), 2, 1, 8)
    with pytest.raises(ValueError, match=r"max_seqlen must be an int while.*captured, got None"):
        nsa.forward(q, k, v, config=tile_config(), cu_seqlens=make_cu_seqlens(LENGTHS))


def _boundaries(lengths: list[int] | None, longest: int | None) -> boundaries.Boundaries:
    bounds = make_cu_seqlens(LENGTHS)
    return boundaries.Boundaries(bounds, lengths, longest, None, bounds, lengths, longest)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("case", ["default", "forced blocks", "token"])
def test_select_blocks(case, packed):
    q, k, _ = make_inputs((sum(LENGTHS),) if packed else (2, 130), 4, 2, 8)
    extras = {}
    if packed:
        lengths = _boundaries(LENGTHS, max(LENGTHS))
        extras = dict(boundaries=lengths)
    call = dict(config=CONFIGS[case], **extras)
    expected = entry.select_blocks(q, k, **call)
    with NoHostReads():
        assert torch.equal(entry.select_blocks(q, k, **call), expected)


def test_the_mode_sees_reads_of_the_package(monkeypatch):
    monkeypatch.setattr(entry, "is_traced", lambda *_: False)
    q, k, _ = make_inputs((sum(LENGTHS),), 2, 1, 8)
    lengths = _boundaries(None, None)
    with NoHostReads(), pytest.raises(AssertionError, match="makes the host wait"):
        entry.select_blocks(q, k, config=tile_config(), boundaries=lengths)


def test_a_captured_plan_is_not_kept(monkeypatch):
    """Its tensors would hold what no replay outside of its graph computes."""
    q = torch.zeros(1, 77, 2, 8)
    config = tile_config()
    kept = plans.make_plan(q, config)
    assert plans.make_plan(q, config) is kept
    monkeypatch.setattr(plans, "may_keep", lambda _: False)
    assert plans.make_plan(q, config) is not kept
    q = torch.zeros(1, 78, 2, 8)
    captured = plans.make_plan(q, config)
    monkeypatch.setattr(plans, "may_keep", lambda _: True)
    assert plans.make_plan(q, config) is not captured


@pytest.mark.parametrize(("stream", "capturing"), [(1, False), (0, True)], ids=str)
def test_only_the_default_stream_keeps_what_it_computes(monkeypatch, stream, capturing):
    """torch.compile's graphs run a call on a stream of their own before it is captured."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    name = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, name, lambda _: 0, raising=False)
    monkeypatch.setattr(host, "is_capturing", lambda _: False)
    monkeypatch.setattr(host, "is_traced", lambda _: False)
    assert host.may_keep(x)
    monkeypatch.setattr(torch._C, name, lambda _: stream, raising=False)
    monkeypatch.setattr(host, "is_capturing", lambda _: capturing)
    assert not host.may_keep(x)
