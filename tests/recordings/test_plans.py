"""What follows from the boundaries of a Packing is made once, for all recorded layers and steps."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import nsa
from nsa import recordings
from nsa.fused import compressed_forms
from nsa.host import launches_of_plan
from nsa.testing import make_cu_seqlens
from tests.helpers.noted_kernels import count_plan_kernels, note_folded_calls, note_kernels
from tests.helpers.recorded_layers import PRESETS, make_layer, modes, new_input, with_gradients

FORMS = [[150, 1, 149], [0, 10, 255, 35], [140, 30, 130], [300 - 129, 128, 1, 0]]


@pytest.fixture
def launches(emulated, unread, monkeypatch):
    return count_plan_kernels(monkeypatch.setattr)


def new_packing(lengths) -> nsa.Packing:
    return nsa.Packing(make_cu_seqlens(lengths))


def kept_plans(packing) -> list[list[torch.Tensor]]:
    """What recordings keep, and not what single steps do."""
    return [x for key, x in packing.rounded._kept.items() if callable(key)]


def run_stack(stack, x, packing):
    for layer in stack:
        x = x + layer(x, packing)
    return x


@modes
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_new_boundaries_launch_once_for_all_layers(mode, compressor, launches):
    stack = [make_layer(mode, compressor=compressor) for _ in range(3)]
    # The blocks of the compressors, and the bounds of the plan; its tables, and those of means.
    wanted = dict(sequence_bounds=2, plan_tables=1)
    if compressor == "mean":
        wanted = dict(sequence_bounds=1, plan_tables=2)
    packings = [new_packing(lengths) for lengths in FORMS]
    for turn, packing in enumerate((*packings, packings[-1], packings[2])):
        launches.clear()
        run_stack(stack, new_input()[0].requires_grad_(), packing).sum().backward()
        if turn > 1:
            assert launches == (wanted if turn < len(FORMS) else {})
            assert len(kept_plans(packing)) == 1


@pytest.mark.parametrize("bound", [None, 200, 300])
@pytest.mark.parametrize("longest", [127, 128, 129, 143, 144])
def test_the_same_kernels_on_both_sides_of_a_limit(longest, bound, emulated, unread, monkeypatch):
    """Recordings know a bound by its next power of two; what is chosen by it is the same.

    Not its bits: recordings have more rows of compressed keys than there are, and on some CPUs the
    bits of a row of a product depend on how many there are.
    """
    monkeypatch.setattr(compressed_forms, "FEW_PACKED_KEYS", 8)  # 128 tokens
    calls = note_folded_calls(monkeypatch.setattr, tokens=300)
    layer = make_layer()
    packing = nsa.Packing(make_cu_seqlens([longest, 300 - 2 * longest, longest]), max_seqlen=bound)
    call, by_steps = (partial(f, cu_seqlens=packing) for f in (layer, layer._forward))
    for _ in range(3):
        x, parameters = new_input()[0], list(layer.parameters())
        wanted = with_gradients(by_steps, x, parameters)
        by_steps_calls = set(calls)
        calls.clear()
        got = with_gradients(call, x, parameters)
        assert set(calls) == by_steps_calls
        calls.clear()
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@modes
@pytest.mark.parametrize("allocate", [False, True], ids=["made", "written"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "q", "compressor": "mean"}, {"separate_kv": True, "compressor": "mean"}],
    ids=["default", "q-mean", "separate"],
)
def test_kept_plans_give_the_same_bits(mode, options, allocate, emulated, unread, monkeypatch):
    """Also where kernels write to memory that operations allocate, as on a GPU."""
    note_kernels(monkeypatch.setattr, allocate=allocate)
    layer = make_layer(mode, **options)
    parameters = list(layer.parameters())
    packings = [new_packing(lengths) for lengths in FORMS]
    before = {}
    for at in (0, 1, 2, 3, 1, 3, 2):
        packing = packings[at]
        x = new_input()[0]
        bare = dict(cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen)
        wanted = with_gradients(partial(layer._forward, **bare), x, parameters)
        got = with_gradients(partial(layer, cu_seqlens=packing), x, parameters)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        # Nothing writes to what is kept.
        for plan in kept_plans(packing):
            copies = before.setdefault(at, [x.clone() for x in plan])
            assert all(map(torch.equal, plan, copies))
    assert before.keys() == {1, 2, 3}


@modes
def test_one_plan_for_each_configuration(mode, launches):
    """Whatever else of the layers differs, and whichever needs gradients."""
    stack = [make_layer(other, gate=gate) for other in (mode, *PRESETS) for gate in ("q", "hidden")]
    packings = [new_packing(lengths) for lengths in FORMS]
    for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for packing in packings:
            x = new_input()[0]
            with grad_mode():
                got = run_stack(stack, x, packing)
                wanted = run_stack([layer._forward for layer in stack], x, packing)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    launches.clear()
    x = new_input()[0].requires_grad_()
    packing = new_packing(FORMS[0])
    run_stack(stack, x, packing).sum().backward()
    assert launches == dict(sequence_bounds=4, plan_tables=2)
    plans = kept_plans(packing) + kept_plans(packings[-1])
    assert not any(x.is_inference() or x.requires_grad for plan in plans for x in plan)


@modes
def test_backward_has_the_plan_of_its_forward(mode, launches):
    """Also if the Packing is gone, and others were used since."""
    layer = make_layer(mode)
    parameters = list(layer.parameters())
    for turn, lengths in enumerate(FORMS):
        x, packing = new_input()[0].requires_grad_(), new_packing(lengths)
        y = layer._forward(x, packing)
        wanted = torch.autograd.grad(y.square().sum(), [x, *parameters])
        y = layer(x, packing)
        gone = weakref.ref(packing.rounded)
        del packing
        gc.collect()
        assert gone() is None
        other = new_packing(FORMS[turn - 1])
        layer(x, other).sum().backward()
        launches.clear()
        got = torch.autograd.grad(y.square().sum(), [x, *parameters])
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        assert turn == 0 or not launches


@modes
def test_longer_sequences_have_a_recording_of_their_own(mode, emulated, unread):
    layer = make_layer(mode)
    for turn, lengths in enumerate([[100, 90, 110]] * 3 + [[297, 1, 2]] * 3):
        x = new_input()[0]
        got, wanted = layer(x, new_packing(lengths)), layer._forward(x, new_packing(lengths))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        assert len(recordings._recordings) == (0, 1, 1, 1, 2, 2)[turn]


def test_retained_graphs_and_second_derivatives(launches):
    layer = make_layer()
    for lengths in FORMS[:3]:
        x = new_input()[0].requires_grad_()
        y = layer(x, new_packing(lengths))
        (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert torch.equal(first, second)
        with pytest.raises(nsa.UnsupportedError, match="differentiated once"):
            second.sum().backward()


def add(x, table, out):
    with _disable_current_modes():  # as a kernel, whose work no mode sees
        out += x[: len(table)] + table


def launched_table(bounds):
    table = torch.zeros(3, dtype=torch.int32)
    with launches_of_plan():
        recordings.launch(add, bounds, torch.arange(3, dtype=torch.int32), table)
    return table


def by_operations(x, bounds):
    index = torch.arange(3)
    return x * (bounds.diff()[:1] + index) * index


def by_launches(x, bounds):
    out = torch.zeros(3)
    recordings.launch(add, x, launched_table(bounds), out)
    return out


def in_backward(x, bounds):
    return Doubled.apply(x, bounds)


class Doubled(torch.autograd.Function):
    """Twice its input, whose gradient it multiplies by a table."""

    @staticmethod
    def forward(ctx, x, bounds):
        ctx.bounds = bounds
        return x * 2

    @staticmethod
    def backward(ctx, dout):
        return dout * launched_table(ctx.bounds), None


def filled_before(x, bounds):
    out = torch.zeros(3, dtype=torch.int32)
    recordings.launch(add, bounds, bounds[:3] * 2, out)
    recordings.launch(add, x.int(), bounds[:3], out)
    return x * out


def read_before(x, bounds):
    zeros = torch.zeros(3, dtype=torch.int32)
    table = bounds[:3] + zeros
    recordings.launch(add, x.int(), bounds[:3], zeros)
    return x * zeros * table


def written_after(x, bounds):
    table = bounds[:3] * 2
    y = x + table
    table.add_(x.int())
    return y * table


def launched_at(x, bounds):
    table = bounds[:3] * 2
    recordings.launch(add, x.int(), bounds[:3], table)
    return x * table


def of_an_input_before(x, bounds):
    index = torch.arange(3, dtype=torch.int32)
    later = index * 2
    recordings.launch(add, x.int(), bounds[:3], index)
    return x * (bounds[:3] + later) * index


def of_the_output(x, bounds):
    return bounds[:3] * 2.0


def also_the_output(x, bounds):
    table = bounds[:3] * 2.0
    recordings.launch(add, x, table, x * table)
    return table


def launched_and_written(x, bounds):
    table = launched_table(bounds)
    y = x + table
    table.add_(1)
    return y * table


def launched_without_boundaries(x, bounds):
    first = launched_table(torch.ones(3, dtype=torch.int32))
    second = torch.zeros(3, dtype=torch.int32)
    with launches_of_plan():
        recordings.launch(add, bounds, first, second)
    return x * second


def launched_after_a_use(x, bounds):
    ones, index = torch.ones(3, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    before = index * 2
    with launches_of_plan():
        recordings.launch(add, ones, ones, index)
    return x * (bounds[:3] + before) * (bounds[:3] + index)


def no_use(x, bounds):
    return x * 2


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (by_operations, 2),
        (by_launches, 1),
        (in_backward, 1),
        (filled_before, 1),
        (read_before, 0),
        (written_after, 0),
        (launched_at, 0),
        (of_an_input_before, 0),
        (of_the_output, 0),
        (also_the_output, 0),
        (launched_and_written, 0),
        (launched_without_boundaries, 1),
        (launched_after_a_use, 2),
        (no_use, 0),
    ],
)
def test_steps_of_plans(function, kept, unread):
    """What a plan keeps is what no other step writes to."""
    packings = [new_packing(lengths).rounded for lengths in ([1, 3], [2, 2], [4, 0])]
    needs = function not in (of_the_output, also_the_output)
    for turn, at in enumerate((0, 1, 2, 1, 2, 0)):
        x, packing = torch.randn(3).mul(10).requires_grad_(needs), packings[at]
        got = recordings.run("key", function, (x,), packing=packing)
        if got is None:
            assert not turn
            continue
        wanted = function(x, *packing.bounds)
        assert torch.equal(got, wanted)
        if needs:
            assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, wanted)))
        assert list(map(len, kept_plans(packing))) == [kept] * (kept > 0)


def test_plans_of_other_shapes_are_others():
    """Though their steps are written alike."""

    def function(x, bounds):
        return x.sum() + bounds * 2

    x = torch.ones(3)
    for lengths in [1, 2], [1, 1, 1]:
        for _ in range(3):
            packing = nsa.Packing(make_cu_seqlens(lengths))
            got = recordings.run("key", function, [x], packing=packing)
        assert torch.equal(got, function(x, packing.cu_seqlens))
    assert len({id(recording.run_plan) for recording in recordings._recordings.values()}) == 2
