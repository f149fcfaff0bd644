"""On the GPU: output and every gradient of the fused backend against the float64 reference."""

import pytest
import torch
from gpu_cases import (
    VARIANTS,
    Case,
    Variant,
    cases,
    check_against_reference,
    gpu_test,
    leaves,
    make_tensors,
    run,
)
from hypothesis import HealthCheck, given, settings

import nsa
from nsa import reference
from nsa.fused import interface

pytestmark = gpu_test


def variant_id(variant: Variant) -> str:
    dtype = str(variant.dtype).removeprefix("torch.")
    return f"D{variant.head_dim}-Dv{variant.value_dim}-G{variant.group}-l{variant.block}-{dtype}"


# 18 variants of 20 examples: 360 in one run.
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_output_and_gradients(variant):
    @settings(
        max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases(variant))
    def check(case):
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_against_reference(case, monkeypatch)

    check()


def default_case(**changes) -> Case:
    settings = dict(
        variant=VARIANTS[2],
        num_kv_heads=2,
        batch=1,
        lengths=(1000,),
        packed=False,
        config=nsa.NSAConfig(),
        separate=False,
        gates="q",
        compressor="mean",
        seed=0,
    )
    return Case(**(settings | changes))


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_forward_gives_the_same_bits_twice(packed):
    lengths = (700, 0, 1, 4096) if packed else (4096,)
    case = default_case(lengths=lengths, packed=packed)
    arguments = make_tensors(case)
    outs = [nsa.forward(**arguments, config=case.config, backend="fused") for _ in range(2)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_no_output_is_left_unwritten(packed, monkeypatch):
    """Uninitialised memory is NaN, so an element that no kernel writes shows in the result."""
    lengths = (700, 0, 1, 65, 4096) if packed else (1000,)
    case = default_case(lengths=lengths, packed=packed, config=nsa.NSAConfig(num_initial_blocks=1))
    arguments = make_tensors(case)
    dout = torch.randn_like(arguments["q"])
    clean = run(interface, arguments, case.config, dout)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    poisoned_run = run(interface, arguments, case.config, dout)
    assert torch.equal(clean["out"], poisoned_run["out"])
    for name, x in poisoned_run.items():
        assert x.isfinite().all(), name


def poisoned(allocate):
    def empty(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() and x.is_cuda else x

    return empty


@pytest.mark.parametrize("tile_summary", ["mean", "first"])
@pytest.mark.parametrize("groups", [None, 2])
def test_selection_equals_reference(tile_summary, groups):
    """The same compressed keys on both sides, so that scores differ by float32 rounding alone."""
    config = nsa.NSAConfig(
        tile_summary=tile_summary, num_initial_blocks=1, num_local_blocks=1, num_selected_blocks=5
    )
    case = default_case(lengths=(3000, 1, 0, 700), packed=True, compressor="given", config=config)
    arguments = make_tensors(case)
    q, k = arguments["q"], arguments["k"]
    extras = {name: arguments[name] for name in ("compressed_kv", "cu_seqlens")}
    expected = reference.select_blocks(q, k, config=config, **extras)
    actual = nsa.select_blocks(q, k, config=config, backend="fused", **extras)
    # Scores closer than rounding may swap; random ones are so in a few of some ten thousand.
    assert (actual == expected).float().mean() > 0.999


def test_equal_scores_go_to_the_lower_index():
    case = default_case(config=nsa.NSAConfig(num_selected_blocks=4))
    arguments = make_tensors(case)
    keys = arguments["k"][:, :1].expand_as(arguments["k"])
    actual = nsa.select_blocks(arguments["q"], keys, config=case.config, backend="fused")
    expected = nsa.select_blocks(arguments["q"], keys, config=case.config, backend="reference")
    assert torch.equal(actual, expected)


def test_no_grad_keeps_nothing():
    case = default_case(lengths=(4096,))
    arguments = make_tensors(case)
    with torch.no_grad():
        nsa.forward(**arguments, config=case.config, backend="fused")
        before = torch.cuda.memory_allocated()
        out = nsa.forward(**arguments, config=case.config, backend="fused")
    kept = torch.cuda.memory_allocated() - before
    assert kept <= out.numel() * out.element_size() + (1 << 20)


def test_double_backward_is_refused():
    case = default_case()
    arguments = make_tensors(case)
    out = nsa.forward(**arguments, config=case.config, backend="fused")
    (grad,) = torch.autograd.grad(out.float().square().sum(), arguments["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(grad.float().sum(), leaves(arguments)["k"])
