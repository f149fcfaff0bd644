"""On the GPU: forward and backward captured in a CUDA graph and replayed on other data."""

import copy

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens
from tests.helpers.cuda_graphs import HEADS, KV_HEADS, PACKS, Call, capture, check_replays
from tests.helpers.gpu_cases import assert_same_step, gpu_test

pytestmark = gpu_test

CONFIGS = {
    "default": nsa.NSAConfig(),
    "forced blocks": nsa.NSAConfig(num_initial_blocks=1, num_local_blocks=2),
    "sparse compressed": nsa.NSAConfig(num_cmp_selected_blocks=2, compress_block_size=32,
                                       select_block_size=64),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [1000, 4096])
@pytest.mark.parametrize("passes", ["forward_only", "forward_and_backward"])
def test_batched(passes, length, head_dim, config):
    call = Call((2, length), head_dim, CONFIGS[config])
    check_replays(call, getattr(call, passes))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("passes", ["forward_only", "forward_and_backward"])
def test_packed_sequences_of_other_lengths(passes, config):
    packs = [make_cu_seqlens(lengths, "cuda") for lengths in PACKS]
    longest = max(map(max, PACKS))
    call = Call((sum(PACKS[0]),), 128, CONFIGS[config], packs[0].clone(), longest)
    check_replays(call, getattr(call, passes), packs)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("passes", ["forward_only", "forward_and_backward"])
def test_a_packing_needs_no_max_seqlen(passes, config):
    packing = nsa.Packing(make_cu_seqlens(PACKS[0], "cuda"))
    call = Call((sum(PACKS[0]),), 128, CONFIGS[config], packing)
    check_replays(call, getattr(call, passes))


@pytest.mark.parametrize("config", CONFIGS)
def test_only_a_bare_tensor_without_a_bound_is_waited_for(config):
    cu_seqlens = make_cu_seqlens(PACKS[0], "cuda")
    call = Call((sum(PACKS[0]),), 128, CONFIGS[config], cu_seqlens)
    call.forward_and_backward()
    for given, longest in ((cu_seqlens, max(PACKS[0])), (nsa.Packing(cu_seqlens), None)):
        call.cu_seqlens, call.settings["max_seqlen"] = given, longest
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.forward_and_backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    call.cu_seqlens, call.settings["max_seqlen"] = cu_seqlens, None
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            call.forward_and_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_chunks():
    call = Call((1, 4096), 128, nsa.NSAConfig())
    call.settings["max_workspace_bytes"] = 1
    check_replays(call, call.forward_and_backward)


def test_packed_sequences_need_max_seqlen():
    call = Call((sum(PACKS[0]),), 128, nsa.NSAConfig(), make_cu_seqlens(PACKS[0], "cuda"))
    with pytest.raises(ValueError, match="max_seqlen must be an int while a CUDA graph"):
        capture(call.forward_only)


def test_a_training_step_of_the_layer():
    """``make_graphed_callables``: forward and backward are graphs of their own."""
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(512, HEADS, KV_HEADS, backend="fused")
    layer = layer.to("cuda", torch.bfloat16)
    graphed = copy.deepcopy(layer)
    sample = torch.randn(2, 1000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(graphed, (sample,))
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn_like(sample)
        assert_same_step(layer, graphed, x)
