"""On the GPU: output and every gradient of the fused backend against the float64 reference."""

from functools import partial

import pytest
import torch
from hypothesis import given

import nsa
from nsa.blocks import num_compressed_blocks
from nsa.fused import compressed_forms, selection
from nsa.fused.compressed_forms import CompressedForm
from nsa.fused.fa4_call import MANY_SEQUENCES
from nsa.geometry import Geometry
from tests.helpers.gpu_cases import (
    VARIANTS,
    Variant,
    cases,
    check_against_reference,
    check_nothing_is_left_unwritten,
    default_case,
    fused_groups,
    gpu_test,
    leaves,
    make_tensors,
    paper_case,
)
from tests.helpers.group_cases import GROUP_FORMS, check_groups, group_case, reference_groups
from tests.helpers.profiles import gpu_property
from tests.helpers.selections import assert_same_tile_blocks

pytestmark = gpu_test


def variant_id(variant: Variant) -> str:
    dtype = str(variant.dtype).removeprefix("torch.")
    return f"D{variant.head_dim}-Dv{variant.value_dim}-G{variant.group}-l{variant.block}-{dtype}"


# 18 variants of 20 examples: 360 in one run.
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_output_and_gradients(variant):
    @gpu_property(f"tile {variant_id(variant)}", 20)
    @given(case=cases(variant))
    def check(case):
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_against_reference(case, monkeypatch)

    check()


def test_hundreds_of_sequences(monkeypatch):
    """FA4's kernels then look up where the tiles of each sequence start."""
    lengths = tuple(37 * index % 130 for index in range(MANY_SEQUENCES + 10))
    check_against_reference(default_case(lengths=lengths, packed=True), monkeypatch)


@pytest.mark.parametrize("length", [2080, 4096, 4111])
@pytest.mark.parametrize("mode", ["tile", "token"])
def test_masks_of_two_tiles_of_compressed_keys(mode, length, monkeypatch):
    """More keys than FA4's kernels take at a time, and a mask for them."""
    config = nsa.NSAConfig(compress_block_size=16, select_block_size=64, num_selected_blocks=4)
    make = paper_case if mode == "token" else partial(default_case, config=config)
    case = make(batch=2, lengths=(length,), num_kv_heads=1)
    count = num_compressed_blocks(length, case.config)
    form = CompressedForm.BATCH
    assert count > compressed_forms.ONE_TILE
    assert not compressed_forms.skips_key_tiles(
        form, count, case.config, whole=True, longest=length
    )
    check_against_reference(case, monkeypatch)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_forward_gives_the_same_bits_twice(packed):
    lengths = (700, 0, 1, 4096) if packed else (4096,)
    case = default_case(lengths=lengths, packed=packed)
    arguments = make_tensors(case)
    outs = [nsa.forward(**arguments, config=case.config, backend="fused") for _ in range(2)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("sparse", [False, True], ids=["all compressed", "sparse compressed"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_nothing_is_left_unwritten(packed, sparse):
    lengths = (700, 0, 1, 65, 4096) if packed else (1000,)
    groups = dict(num_cmp_selected_blocks=1, cmp_group_size=64) if sparse else {}
    config = nsa.NSAConfig(num_initial_blocks=1, **groups)
    case = default_case(lengths=lengths, packed=packed, config=config)
    check_nothing_is_left_unwritten(case)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("tile_summary", ["mean", "first"])
def test_blocks_equal_reference(tile_summary, packed):
    """The same compressed keys on both sides, so that scores differ by float32 rounding alone."""
    config = nsa.NSAConfig(
        tile_summary=tile_summary, num_initial_blocks=1, num_local_blocks=1, num_selected_blocks=5
    )
    lengths = (3000, 1, 0, 700) if packed else (3000,)
    case = default_case(lengths=lengths, packed=packed, compressor="given", config=config)
    arguments = make_tensors(case)
    q, k, k_cmp = arguments["q"], arguments["k"], arguments["compressed_kv"][0]
    extras = {
        name: arguments[name] for name in ("compressed_kv", "cu_seqlens") if name in arguments
    }
    expected = nsa.select_blocks(q, k, config=config, backend="reference", **extras)
    actual = nsa.select_blocks(q, k, config=config, backend="fused", **extras)
    # Scores closer than rounding may swap; random ones are so in a few of some ten thousand.
    assert (actual == expected).float().mean() > 0.999
    geometry = Geometry.of(q, q, config, extras.get("cu_seqlens"))
    if not packed:
        q, k_cmp, actual, expected = (x[0] for x in (q, k_cmp, actual, expected))
    by_tile = (x.transpose(0, 1) for x in (actual, expected))
    assert_same_tile_blocks(*by_tile, q.detach(), k_cmp.detach(), geometry, atol=1e-5)


@pytest.mark.parametrize("held", [None, 1000], ids=["at once", "in pieces"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("form", GROUP_FORMS, ids=str)
@pytest.mark.parametrize("tile_summary", ["mean", "first"])
def test_groups_equal_reference(tile_summary, form, packed, held, monkeypatch):
    if held is not None:
        monkeypatch.setattr(selection, "TILE_SCORES", held)
    check_groups(group_case(*form, packed, tile_summary), "cuda")


@pytest.mark.parametrize("form", GROUP_FORMS, ids=str)
def test_equal_scores_go_to_the_lower_group(form):
    case = group_case(*form, packed=False)
    arguments = make_tensors(case)
    arguments["compressed_kv"] = [x[:, :1].expand_as(x) for x in arguments["compressed_kv"]]
    expected, _ = reference_groups(arguments, case.config)
    assert torch.equal(fused_groups(arguments, case.config), expected)


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
