"""Where the memories of recorded calls lie, and what a backward may write to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import _disable_current_modes

from nsa import recorded_parts, recordings
from nsa.recorded_memory import ALIGNMENT, Arena, Memory, place, whole_units
from tests.helpers.profiles import examples
from tests.helpers.recorded_layers import make_layer, modes, new_input, run

KINDS = ["add", "cast", "turn", "launch", "launch to zeros", "in place"]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), max_size=14
)
NEXT = {torch.float32: torch.float64, torch.float64: torch.bfloat16, torch.bfloat16: torch.float32}
LIVES = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)
MEMORIES = st.lists(st.tuples(st.integers(0, 3000), LIVES), max_size=20)


def as_memories(drawn, start=0) -> list[Memory]:
    return [Memory(number, size, *life) for number, (size, life) in enumerate(drawn, start)]


def shares(x: Memory, y: Memory) -> bool:
    return x.first <= y.last and y.first <= x.last


@given(MEMORIES, MEMORIES)
def test_no_two_memories_have_the_same_bytes_at_a_time(saved, drawn):
    arenas = [Arena(grows=False), Arena()]
    kept = as_memories(saved)
    found = {x.number: (0, arenas[0].append(x)) for x in kept}
    total = arenas[0].size
    others = as_memories(drawn, len(kept))
    found |= place(others, arenas)
    memories = kept + others
    assert arenas[0].size == total
    for x in memories:
        at, offset = found[x.number]
        assert offset % ALIGNMENT == 0
        assert offset + x.size <= arenas[at].size
        for y in memories:
            other, start = found[y.number]
            if x.number < y.number and at == other and shares(x, y):
                apart = offset + x.size <= start or start + y.size <= offset
                assert apart or not x.size or not y.size


@given(MEMORIES)
def test_memories_that_live_in_turn_take_as_much_as_the_largest(drawn):
    turns = [Memory(at, size, at, at) for at, (size, _) in enumerate(drawn)]
    arena = Arena()
    place(turns, [arena])
    assert arena.size == -(-max((x.size for x in turns), default=0) // ALIGNMENT) * ALIGNMENT


def allocated(monkeypatch) -> list[int]:
    """The bytes of each tensor that recordings allocate from now on."""
    found, empty = [], torch.empty_strided

    def noted(*args, **kwargs):
        x = empty(*args, **kwargs)
        found.append(x.nbytes)
        return x

    monkeypatch.setattr(torch, "empty_strided", noted)
    return found


def test_what_lives_in_turn_shares_memory(monkeypatch):
    """The input of a launch is the output of the one before, which is not needed again."""

    def kernel(x, y):
        with _disable_current_modes():  # as a kernel, whose work no mode sees
            y.copy_(x + 1)

    def function(x):
        for _ in range(5):
            y = torch.empty_like(x)
            recordings.launch(kernel, x, y)
            x = y
        return y

    for _ in range(2):
        run("key", function, (torch.zeros(128),))
    found = allocated(monkeypatch)
    assert torch.equal(run("key", function, (torch.zeros(128),)), torch.full((128,), 5.0))
    # The output, and two in turn.
    assert found == [512, 2 * 512]


def saved_arena(y) -> torch.Tensor:
    recording = y.grad_fn.recording
    return y.grad_fn.saved_tensors[len(recording.saved)]


@modes
@pytest.mark.parametrize("keep", ["retain_graph", "create_graph", None])
def test_backward_writes_to_what_is_saved_unless_it_is_kept(mode, keep, emulated):
    layer = make_layer(mode)
    for _ in range(2):
        layer(new_input().requires_grad_()).sum().backward()
    x = new_input().requires_grad_()
    y = layer(x)
    arena = saved_arena(y)
    before = arena.clone()
    options = {} if keep is None else {keep: True}
    first = torch.autograd.grad(y.sum(), [x, *layer.parameters()], **options)
    assert torch.equal(arena, before) == (keep is not None)
    if keep:
        second = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
        assert all(map(torch.equal, first, second))
        assert not torch.equal(arena, before)
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


@modes
def test_what_is_saved_makes_room_for_others(mode, emulated, monkeypatch):
    layer, sizes = make_layer(mode), []
    find = Arena.find
    for has_room in (True, False):
        recordings.clear()
        monkeypatch.setattr(
            Arena,
            "find",
            lambda self, x, room=has_room: find(self, x) if room or self._grows else None,
        )
        for _ in range(2):
            layer(new_input().requires_grad_()).sum().backward()
        with monkeypatch.context() as patch:
            found = allocated(patch)
            layer(new_input().requires_grad_()).sum().backward()
        sizes.append(sum(found))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("backward", [False, True])
def test_results_and_temporaries_of_any_size(backward, monkeypatch):
    """Such as a result whose bytes are no multiple of those of what lies in it before, and
    memories without any."""
    monkeypatch.setattr(recorded_parts, "ROOMY", 1)

    def function(x):
        total = torch.cat([x.double(), x.double()[:0] * 2]).sum()
        return x * total.to(x.dtype)

    for size in (1, 1023, 1025):
        for _ in range(3):
            x = torch.randn(size).bfloat16().requires_grad_(backward)
            got, wanted = run(str(size), function, (x,)), function(x)
            assert torch.equal(got, wanted)
            if backward:
                grads = [torch.autograd.grad(y.sum(), x)[0] for y in (got, wanted)]
                assert torch.equal(*grads)


def test_a_result_that_no_step_writes():
    for _ in range(3):
        assert run("key", lambda x: x.new_empty(40000), (torch.ones(3),)).shape == (40000,)
    assert recordings._recordings


def test_what_lies_in_a_result_has_no_bytes_behind_it():
    """Of 1025 bytes the last belongs to no unit of an arena."""
    arena = Arena(grows=False)
    arena.append(Memory(0, whole_units(1025), 5, 9))
    assert arena.find(Memory(1, 1024, 0, 4)) == 0
    assert arena.find(Memory(1, 1025, 0, 4)) is None


class SavesHalf(torch.autograd.Function):
    """The forward of nodes that save what it has made."""

    @staticmethod
    def forward(ctx, x):
        half = x / 2
        ctx.save_for_backward(half)
        return half + 1


def test_a_backward_that_fails_is_not_tried_again():
    """What is saved may be overwritten by then."""
    fails = []

    def kernel(x, y):
        if fails:
            raise ValueError("inside")
        with _disable_current_modes():
            y.copy_(x)

    class Node(SavesHalf):
        @staticmethod
        def backward(ctx, dy):
            (half,) = ctx.saved_tensors
            dx = torch.empty_like(dy)
            recordings.launch(kernel, dy * half * 3 + 1, dx)
            return dx + 1

    for _ in range(3):
        x = torch.randn(1000, requires_grad=True)
        y = run("key", Node.apply, (x,))
    (wanted,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    fails.append(True)
    for options in ({"retain_graph": True}, {}):
        with pytest.raises(ValueError, match="inside"):
            torch.autograd.grad(y.sum(), x, **options)
    fails.clear()
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y.sum(), x)
    again = run("key", Node.apply, (x,))
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], wanted)


def add_to(y, x):
    with _disable_current_modes():  # as a kernel, whose work no mode sees
        y.add_(x * 3)


def run_steps(steps, given) -> list[torch.Tensor]:
    """What some steps make, each of two tensors given or made before."""
    made: list[torch.Tensor] = []
    for kind, i, j in steps:
        x, y = ([*given, *made][at % (len(given) + len(made))] for at in (i, j))
        if kind == "add":
            made.append(x + y)
        elif kind == "cast":
            made.append(x.to(NEXT[x.dtype]))
        elif kind == "turn":
            made.append(torch.cat([x[1:], y[:1].to(x.dtype)]))
        elif kind == "in place" and made:
            made[j % len(made)].mul_(x)
        else:
            new = torch.zeros_like(x) if kind == "launch to zeros" else torch.empty_like(x).copy_(y)
            recordings.launch(add_to, new, x)
            made.append(new)
    return made


class AnySteps(torch.autograd.Function):
    """Saves every second tensor that the forward makes. One gradient comes before the steps."""

    @staticmethod
    def forward(ctx, x, _, forward, backward):
        made = run_steps(forward, [x.detach()])
        ctx.save_for_backward(x, *made[::2])
        ctx.steps = backward
        return x * 2 + (made[-1] if made else 1)

    @staticmethod
    def backward(ctx, dy):
        first = dy * 3
        made = run_steps(ctx.steps, [dy, *(x.detach() for x in ctx.saved_tensors)])
        return sum(x.to(dy.dtype) for x in [dy, *made]) * 2, first, None, None


@settings(max_examples=examples(40))
@given(STEPS, STEPS, st.sampled_from([1, 63, 700, 1025]))
def test_any_steps_give_the_same_bits(forward, backward, size):
    """Of memory that holds anything before, see the fixture ``poisoned``."""

    def call(x, y):
        return AnySteps.apply(x, y, forward, backward)

    recordings.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded_parts, "ROOMY", 1)
        for _ in range(3):
            leaves = [torch.randn(size, requires_grad=True) for _ in range(2)]
            results = []
            for y in (run("key", call, leaves), call(*leaves)):
                results += [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
            for got, wanted in zip(results[:3], results[3:], strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert recordings._recordings


class GivesSaved(SavesHalf):
    """Its gradient is what the forward has saved."""

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0]


@pytest.mark.parametrize("function", [torch.exp, GivesSaved.apply], ids=["output", "gradient"])
def test_results_do_not_lie_in_what_is_saved(function):
    for _ in range(3):
        x = torch.randn(5, requires_grad=True)
        got, wanted = (
            [y.detach().clone(), *torch.autograd.grad(y.sum(), x)]
            for y in (run("key", function, (x,)), function(x))
        )
        assert all(map(torch.equal, got, wanted))
    assert not recordings._recordings
