"""On the GPU: forward and backward captured in a CUDA graph and replayed on other data."""

import copy

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.gpu_cases import assert_equal_but_for_rounding, assert_same_step, gpu_test

pytestmark = gpu_test

HEADS, KV_HEADS = 8, 2
# The same number of sequences and tokens, and so the same shapes.
PACKS = [[700, 0, 1, 65, 3330], [1, 1300, 63, 2000, 732]]
CONFIGS = {
    "default": nsa.NSAConfig(),
    "forced blocks": nsa.NSAConfig(num_initial_blocks=1, num_local_blocks=2),
    "sparse compressed": nsa.NSAConfig(num_cmp_selected_blocks=2, compress_block_size=32,
                                       select_block_size=64),
}  # fmt: skip


class Call:
    """A function of inputs that stay where they are."""

    def __init__(self, leading, head_dim, config, cu_seqlens=None, max_seqlen=None):
        self.settings = dict(config=config, max_seqlen=max_seqlen, backend="fused")
        self.shape = (leading, HEADS, KV_HEADS, head_dim)
        self.cu_seqlens = cu_seqlens
        self.tensors = self.draw(0)

    def draw(self, seed: int) -> list[torch.Tensor]:
        """``q``, ``k``, ``v``, the gates' weight and the gradient of the output."""
        kind = dict(dtype=torch.bfloat16, device="cuda", requires_grad=True)
        q, k, v = make_inputs(*self.shape, seed=seed, **kind)
        head_dim = self.shape[-1]
        weight, _, _ = make_inputs((3,), HEADS, HEADS, head_dim, seed=seed + 1, **kind)
        weight = weight.detach().transpose(0, 1).mul(head_dim**-0.5)
        dout = make_inputs(*self.shape, seed=seed + 2, **kind)[0].detach()
        return [q, k, v, weight.contiguous().requires_grad_(), dout]

    def set(self, tensors: list[torch.Tensor], cu_seqlens: torch.Tensor | None = None):
        with torch.no_grad():
            for old, new in zip(self.tensors, tensors, strict=True):
                old.copy_(new)
        if cu_seqlens is not None:
            self.cu_seqlens.copy_(cu_seqlens)

    def forward(self) -> torch.Tensor:
        *inputs, weight, _ = self.tensors
        return nsa.forward(
            *inputs, gate_proj_weight=weight, cu_seqlens=self.cu_seqlens, **self.settings
        )

    @torch.no_grad()
    def forward_only(self) -> list[torch.Tensor]:
        return [self.forward()]

    def forward_and_backward(self) -> list[torch.Tensor]:
        out = self.forward()
        *inputs, dout = self.tensors
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def capture(function):
    """The graph of a call, after the calls outside of it that compile the kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def assert_same(replayed, eager):
    """Outputs bit for bit; gradients within the rounding of sums in any order."""
    assert torch.equal(replayed[0], eager[0])
    for actual, expected in zip(replayed[1:], eager[1:], strict=True):
        assert_equal_but_for_rounding(actual, expected)


def check(call: Call, function, packs=(None, None)):
    graph, results = capture(function)
    for seed, cu_seqlens in zip((10, 20), packs, strict=True):
        call.set(call.draw(seed), cu_seqlens)
        # A replay must not depend on what the call before it left in the workspace.
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        replayed = [x.clone() for x in results]
        assert_same(replayed, function())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [1000, 4096])
@pytest.mark.parametrize("passes", ["forward_only", "forward_and_backward"])
def test_batched(passes, length, head_dim, config):
    call = Call((2, length), head_dim, CONFIGS[config])
    check(call, getattr(call, passes))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("passes", ["forward_only", "forward_and_backward"])
def test_packed_sequences_of_other_lengths(passes, config):
    packs = [make_cu_seqlens(lengths, "cuda") for lengths in PACKS]
    longest = max(map(max, PACKS))
    call = Call((sum(PACKS[0]),), 128, CONFIGS[config], packs[0].clone(), longest)
    check(call, getattr(call, passes), packs)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("passes", ["forward_only", "forward_and_backward"])
def test_a_packing_needs_no_max_seqlen(passes, config):
    packing = nsa.Packing(make_cu_seqlens(PACKS[0], "cuda"))
    check(call := Call((sum(PACKS[0]),), 128, CONFIGS[config], packing), getattr(call, passes))


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
    check(call, call.forward_and_backward)


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
