"""Recorded calls that fork: the order of streams keeps uses of each memory apart."""

import pytest
import torch

import nsa
from nsa import recorded_parts, recorded_streams, recordings
from nsa.fused import compressed_forms, pipeline, selection, streams
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.noted_kernels import note_kernels
from tests.helpers.recorded_layers import run
from tests.helpers.small_configs import tile_config
from tests.helpers.stream_order import OrderError, StreamOrder

FORKED = ["second waits for first", "enter", "first waits for second"]


@pytest.fixture
def order(monkeypatch):
    """Streams that recordings fork to, and what they do."""
    order = StreamOrder()
    monkeypatch.setattr(streams, "_gains", lambda _: True)
    monkeypatch.setattr(streams, "_marks", lambda _: order.marks())
    return order


@pytest.fixture
def tile_mode(fused_on_cpu, monkeypatch):
    """Tile mode as in long calls: the window comes last, and scores come in steps."""
    note_kernels(monkeypatch.setattr, allocate=True)
    monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)
    monkeypatch.setattr(pipeline, "SHORT_TOKENS", 0)
    monkeypatch.setattr(selection, "FEW_SCORES", 0)


def run_again(order, tensors, packing=None) -> torch.Tensor:
    """The recording that there is, with tensors that nothing else holds."""
    (recording,) = recordings._recordings.values()
    order.log.clear()
    given = [x.detach().clone() for x in tensors]
    with torch.no_grad(), order:
        plan = recording.plan(packing)
        out, _ = recording.run_forward(given + plan)
    assert order.current == "first"
    return out


CALLS = {
    "default": {},
    "forced": dict(num_initial_blocks=1, num_local_blocks=1),
    "first": dict(tile_summary="first"),
    "whole": dict(causal=False),
}


@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_tile_mode(call, dtype, batch, length, order, tile_mode):
    """Also where operations move the outputs of several sequences that end within a tile."""
    config = tile_config(**CALLS[call])
    tensors = make_inputs((batch, length), 4, 2, 16, dtype=dtype)
    for _ in range(3):
        wanted = nsa.forward(*tensors, config=config, backend="fused")
    assert torch.equal(run_again(order, tensors), wanted)
    assert order.log == FORKED


def test_with_gradients(order, tile_mode):
    config = tile_config()
    tensors = make_inputs((1, 256), 4, 2, 16, dtype=torch.float64)

    def step():
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = nsa.forward(*leaves, config=config, backend="fused")
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    wanted = step()
    for _ in range(2):
        assert all(map(torch.equal, step(), wanted))
    assert torch.equal(run_again(order, tensors), wanted[0])
    assert order.log == FORKED


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("mode", ["tile", "token"])
def test_which_calls_fork(mode, groups, order, tile_mode):
    """Tile mode, where groups are not selected before the compressed branch attends them."""
    if mode == "tile":
        config = tile_config(num_cmp_selected_blocks=groups)
    else:
        config = nsa.NSAConfig.paper(num_selected_blocks=4)
    tensors = make_inputs((1, 300), 4, 2, 16, dtype=torch.float64)
    for _ in range(2):
        nsa.forward(*tensors, config=config, backend="fused")
    run_again(order, tensors)
    assert order.log == (FORKED if (mode, groups) == ("tile", None) else [])


def two_parts(x, y, *, leak=False, give=False, depend=False):
    """A call with a fork: a sum beside, and a product in a block."""
    doubled = x + x
    beside = streams.SideStream(x, recorded=True)
    total, zeros = x.new_empty(x.shape), x.new_zeros(x.shape)
    torch.add(x * 3, zeros.add_(y), out=total)
    with beside:
        product = torch.zeros_like(x)
        product.copy_(doubled).mul_(total if depend else y)
        rest = (product * 2).neg()
    if give:
        return rest
    if leak:
        total = total + rest
    return total.add_(product)


def two_recorded_parts(order, **options):
    x, y = torch.randn(2, 3, 16, dtype=torch.float64)
    for _ in range(3):
        wanted = run(str(options), lambda a, b: two_parts(a, b, **options), [x, y])
    return wanted, run_again(order, [x, y])


def test_a_fork(order):
    wanted, got = two_recorded_parts(order)
    assert torch.equal(got, wanted)
    assert order.log == FORKED


@pytest.mark.parametrize("option", ["leak", "give"])
def test_what_a_block_makes_may_leave_it(option, order):
    wanted, got = two_recorded_parts(order, **{option: True})
    assert torch.equal(got, wanted)
    assert order.log == FORKED


def test_a_block_that_needs_what_is_beside_it_does_not_fork(order):
    wanted, got = two_recorded_parts(order, depend=True)
    assert torch.equal(got, wanted)
    assert order.log == []


def test_it_would_be_unsafe(order, monkeypatch):
    monkeypatch.setattr(recorded_streams.Fork, "is_safe", lambda *_: True)
    with pytest.raises(OrderError):
        two_recorded_parts(order, depend=True)


def test_zeros_of_the_block_must_be_filled_before_it(order, monkeypatch):
    monkeypatch.setattr(recorded_parts, "fork_where_safe", list)
    with pytest.raises(OrderError, match="second does not wait for what first did"):
        two_recorded_parts(order)


def test_memory_of_the_block_must_be_kept_from_the_fork_to_the_join(order, monkeypatch):
    monkeypatch.setattr(recorded_parts, "find_forks", lambda _: iter(()))
    with pytest.raises(OrderError, match="second does not wait for what first did"):
        two_recorded_parts(order)


def test_a_plan_is_made_before_the_fork(order):
    """Though the block makes it step by step; so it may outlive the block."""

    def function(x, bounds):
        beside = streams.SideStream(x, recorded=True)
        total = x + x
        with beside:
            table = bounds.diff() * 2
            product = torch.empty_like(x)
            product.copy_(x).mul_(table)
        return total.add_(product).add_(table)

    x = torch.randn(3)
    for lengths in [1, 2, 0], [3, 0, 1], [0, 0, 2], [0, 2, 5]:
        packing = nsa.Packing(make_cu_seqlens(lengths))
        recordings.run("plan", function, [x], packing=packing)
        if recordings._recordings:
            got = run_again(order, [x, packing.cu_seqlens], nsa.Packing(packing.cu_seqlens))
            assert torch.equal(got, function(x, packing.cu_seqlens))
            assert order.log == FORKED


def test_joins_after_an_error(order):
    fails = []

    def fail(x):
        if fails:
            raise ValueError("inside")
        return x

    def function(x):
        with streams.SideStream(x, recorded=True):
            mode = recordings.RecordingMode.current()
            if mode is not None:
                mode.note(fail, (x,), {}, None)
            y = torch.empty_like(x)
            y.copy_(x)
        return y

    x = torch.randn(3, 16)
    for _ in range(3):
        run("fails", function, [x])
    fails.append(True)
    with pytest.raises(ValueError, match="inside"):
        run_again(order, [x])
    assert order.log == FORKED
    assert order.current == "first"


def test_a_fork_within_another_is_not_recorded(order):
    def function(x):
        with streams.SideStream(x, recorded=True):
            return two_parts(x, x)

    x = torch.randn(3, 16)
    for _ in range(4):
        run("nested", function, [x])
    assert not recordings._recordings
