"""The fused pipeline in float64 with emulated kernel calls: equal to the reference, and gradcheck.

Covers layouts, block lists and their transpose, selection, gradients, packed input and the custom
ops; the kernels themselves are covered by the GPU tests.
"""

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.emulation import (
    batched_in_all_ways_and_packed,
    compressed,
    drawn_compressed_calls,
)
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.small_configs import tile_config, token_config
from tests.helpers.strategies import leaves, tile_problems

pytestmark = pytest.mark.usefixtures("fused_on_cpu")
all_compressed_calls = pytest.mark.usefixtures("compressed_calls")


@pytest.mark.unmeasured
@settings(max_examples=examples(150), **WITH_FIXTURES)
@given(problem=tile_problems(), calls=drawn_compressed_calls)
def test_output_and_gradients_equal_reference(problem, calls):
    inputs = [x.requires_grad_() for x in leaves(problem)]
    results = []
    for backend in ("reference", "fused"):
        with compressed(calls):
            out = problem.forward(backend=backend)
            dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            grads = torch.autograd.grad(out, inputs, dout, allow_unused=True)
        results.append((out, *grads))
    for expected, actual in zip(*results, strict=True):
        # An input that is unused has no gradient in one backend and zeros in the other.
        if expected is None or actual is None:
            assert all(x is None or not x.any() for x in (expected, actual))
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@settings(max_examples=examples(60), **WITH_FIXTURES)
@given(problem=tile_problems())
def test_selection_equals_reference(problem):
    expected = problem.select_blocks(backend="reference")
    actual = problem.select_blocks(backend="fused")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("block", [64, 128, 192, 384])
def test_no_block_past_the_end_is_listed(block, tile, causal):
    """Where the sequence ends with a tile, with a block, with both, or with neither."""
    config = nsa.NSAConfig(
        select_block_size=block, q_tile_size=tile, num_initial_blocks=1, num_local_blocks=2,
        num_selected_blocks=4, causal=causal,
    )  # fmt: skip
    for length in (63, 64, 65, 128, 192, 256, 384, 385, 512):
        q, k, _ = make_inputs((1, length), 1, 1, 8, dtype=torch.float64)
        expected = nsa.select_blocks(q, k, config=config, backend="reference")
        assert torch.equal(nsa.select_blocks(q, k, config=config, backend="fused"), expected)


@settings(max_examples=examples(60), **WITH_FIXTURES)
@given(problem=tile_problems(), calls=drawn_compressed_calls)
def test_block_indices_of_the_caller(problem, calls):
    indices = problem.select_blocks(backend="reference")
    expected = problem.forward(backend="reference", block_indices=indices)
    with compressed(calls):
        actual = problem.forward(backend="fused", block_indices=indices)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"compressed_visibility": "started"},
        {"num_cmp_selected_blocks": 1, "cmp_group_size": 64, "compress_block_size": 1},
    ],
    ids=["default", "non-causal", "started", "sparse compressed"],
)
@batched_in_all_ways_and_packed
def test_gradcheck(packed, changes):
    config = tile_config(**changes)
    lengths = [3, 0, 70, 1]
    leading = (sum(lengths),) if packed else (1, 67)
    q, k, v = make_inputs(leading, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    square = [torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    extras = {"cu_seqlens": make_cu_seqlens(lengths)} if packed else {}
    # Given, so that finite differences do not change the selection.
    indices = nsa.select_blocks(q, k, config=config, compress_k_weight=square[0], **extras)

    def function(q, k, v, weight, k_weight, v_weight):
        return nsa.forward(
            q, k, v, config=config, gate_proj_weight=weight, compress_k_weight=k_weight,
            compress_v_weight=v_weight, block_indices=indices, backend="fused", **extras,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, weight, *square), fast_mode=True)


@all_compressed_calls
def test_gradcheck_of_separate_inputs():
    """Three keys and values, gates and compressed keys and values of the caller."""
    config = tile_config()
    q, *_ = make_inputs((1, 67), 2, 1, 2, dtype=torch.float64, requires_grad=True)
    kv = [torch.randn(1, 67, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    compressed = [torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True) for _ in "kv"]
    gates = torch.randn(1, 67, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = nsa.select_blocks(q, kv[0], config=config, compressed_kv=tuple(compressed))

    def function(q, gates, k_cmp, v_cmp, *kv):
        return nsa.forward(
            q, kv[:3], kv[3:], config=config, gates=gates, compressed_kv=(k_cmp, v_cmp),
            block_indices=indices, backend="fused",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, gates, *compressed, *kv), fast_mode=True)


def test_double_backward_is_refused():
    q, k, v = make_inputs((1, 70), 2, 1, 4, dtype=torch.float64, requires_grad=True)
    out = nsa.forward(q, k, v, config=tile_config(), backend="fused")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    message = "once, not twice; for higher derivatives use backend='reference'"
    with pytest.raises(nsa.UnsupportedError, match=message):
        torch.autograd.grad(grad.sum(), k)


def keep_attention():
    """What selective checkpointing keeps instead of computing it again."""
    return create_selective_checkpoint_contexts([torch.ops.nsa.attention.default])


@all_compressed_calls
@pytest.mark.parametrize("form", ["again", "kept", "moved to the host"])
def test_what_is_saved_may_be_computed_again_or_moved(form):
    q, k, v = make_inputs((1, 70), 2, 1, 64, dtype=torch.float64, requires_grad=True)

    def function(q, k, v):
        return nsa.forward(q, k, v, config=tile_config(), backend="fused").sin()

    expected = torch.autograd.grad(function(q, k, v).sum(), (q, k, v))
    if form == "moved to the host":
        with torch.autograd.graph.save_on_cpu():
            out = function(q, k, v)
    else:
        options = dict(context_fn=keep_attention) if form == "kept" else {}
        out = checkpoint(function, q, k, v, use_reentrant=False, **options)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


def test_a_changed_input_is_noticed():
    q, k, v = make_inputs((1, 70), 2, 1, 64, dtype=torch.float64, requires_grad=True)
    changed = q * 1
    out = nsa.forward(changed, k, v, config=tile_config(), backend="fused")
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Names(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_what_traces_sees_the_whole_as_one_operation():
    q, k, v = make_inputs((1, 70), 2, 1, 4, dtype=torch.float64, requires_grad=True)

    def loss(q):
        return nsa.forward(q, k, v, config=tile_config(), backend="fused").sin().sum()

    expected = torch.autograd.grad(loss(q), q)[0]
    with Names() as names:
        grad = torch.autograd.grad(loss(q), q)[0]
    assert {"nsa::attention", "nsa::attention_backward"} < set(names.seen)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(q.detach())
        assert nsa.forward(fake, fake[:, :, :1], fake[:, :, :1], backend="fused").shape == q.shape


# Dynamo sees one op; the way decides what that saves.
@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("mode", "compressed_calls", "packed"),
    [
        ("tile", "masked", False),
        ("token", "folded", False),
        ("tile", "sums of queries", False),
        ("tile", "folded", True),
        ("token", "folded", True),
    ],
    indirect=["compressed_calls"],
)
def test_compiles_once_for_all_lengths(mode, compressed_calls, packed):
    torch._dynamo.reset()
    config = tile_config() if mode == "tile" else token_config()
    weight = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, cu_seqlens, max_seqlen):
        return nsa.forward(
            q, k, v, config=config, gate_proj_weight=weight, cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen, backend="fused",
        ).sin()  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, lengths in enumerate(([200, 5, 0], [17, 100, 140], [300, 1, 2])):
        leading = (sum(lengths),) if packed else (2, sum(lengths))
        q, k, v = make_inputs(leading, 4, 2, 8, dtype=torch.float64, requires_grad=True)
        extra = (make_cu_seqlens(lengths), max(lengths)) if packed else (None, None)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            results = [f(q, k, v, *extra) for f in (function, compiled)]
        grads = [torch.autograd.grad(out.sum(), (q, k, v, weight)) for out in results]
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
