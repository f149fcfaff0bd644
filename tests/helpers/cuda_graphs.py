"""Calls that a CUDA graph captures, and comparisons of its replays with eager calls."""

import torch

import nsa
from nsa.testing import make_inputs
from tests.helpers.gpu_cases import assert_equal_but_for_rounding

HEADS, KV_HEADS = 8, 2
# Both have the same number of sequences and tokens, and so the same shapes.
PACKS = [[700, 0, 1, 65, 3330], [1, 1300, 63, 2000, 732]]


class Call:
    """A function of inputs whose addresses do not change."""

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
    """Capture a call in a graph, after eager calls that compile the kernels."""
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
    """Assert equal bits of outputs, and gradients equal within the rounding of unordered sums."""
    assert torch.equal(replayed[0], eager[0])
    for actual, expected in zip(replayed[1:], eager[1:], strict=True):
        assert_equal_but_for_rounding(actual, expected)


def check_replays(call: Call, function, packs=(None, None)):
    """Compare replays on other data with eager calls."""
    graph, results = capture(function)
    for seed, cu_seqlens in zip((10, 20), packs, strict=True):
        call.set(call.draw(seed), cu_seqlens)
        # A replay must not depend on what the previous call left in the workspace.
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        replayed = [x.clone() for x in results]
        assert_same(replayed, function())
