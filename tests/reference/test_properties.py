"""What must hold for any input: isolation, causality, odd sizes, precision, memory layout."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given

import nsa
from nsa.reference import attention
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.small_configs import SMALL
from tests.helpers.strategies import problems

F64 = torch.float64
CLOSE = dict(rtol=0, atol=1e-12)


def _slice(name: str, x, cut):
    """``x`` of some sequences only; weights belong to all of them."""
    if x is None or name.endswith("weight"):
        return x
    return tuple(map(cut, x)) if isinstance(x, tuple) else cut(x)


@given(problems(min_sequences=2))
def test_batch_elements_and_sequences_do_not_meet(problem):
    q, k, v, config, extras = problem
    whole = problem.forward()
    arguments = {"q": q, "k": k, "v": v, **extras}
    if q.ndim == 4:
        spans = [(slice(b, b + 1), slice(b, b + 1), {}) for b in range(q.shape[0])]
    else:
        arguments = {n: x for n, x in arguments.items() if n not in ("cu_seqlens", "max_seqlen")}
        bounds, spans, blocks = extras["cu_seqlens"].tolist(), [], 0
        for start, end in pairwise(bounds):
            size, stride = config.compress_block_size, config.compress_stride
            more = max(0, (end - start - size) // stride + 1)
            alone = {"cu_seqlens": make_cu_seqlens([end - start])}
            spans.append((slice(start, end), slice(blocks, blocks + more), alone))
            blocks += more
    for tokens, blocks, alone in spans:
        own = {
            name: _slice(name, x, lambda x, at=blocks if name == "compressed_kv" else tokens: x[at])
            for name, x in arguments.items()
        }
        torch.testing.assert_close(
            nsa.forward(config=config, **own, **alone), whole[tokens], **CLOSE
        )


@given(problems(max_tokens=40, packed=False, min_sequences=1))
def test_packed_equals_batched(problem):
    q, k, v, config, extras = problem
    flat = {
        name: _slice(name, x, lambda x: x.flatten(0, 1))
        for name, x in {"q": q, "k": k, "v": v, **extras}.items()
    }
    cu_seqlens = make_cu_seqlens([q.shape[1]] * q.shape[0])
    packed = nsa.forward(config=config, cu_seqlens=cu_seqlens, **flat)
    torch.testing.assert_close(packed.view(problem.forward().shape), problem.forward(), **CLOSE)
    select = {n: x for n, x in flat.items() if n in ("q", "k", "compress_k_weight")}
    select["compressed_kv"] = flat.get("compressed_kv")
    indices = nsa.select_blocks(config=config, cu_seqlens=cu_seqlens, **select)
    expected = problem.select_blocks()
    if config.selection == "tile":
        expected, indices = expected.transpose(1, 2), indices.transpose(0, 1)
    assert torch.equal(indices, expected.flatten(0, 1))


def _changed_after(t: int, *tensors):
    return tuple(torch.cat([x[:, : t + 1], torch.randn_like(x[:, t + 1 :])], 1) for x in tensors)


STRICT = {
    "token": SMALL["token"],
    "tile-first": dataclasses.replace(SMALL["tile"], tile_summary="first"),
    "sparse-first": dataclasses.replace(SMALL["sparse"], tile_summary="first"),
}


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("t", [0, 2, 3, 4, 7, 8, 15, 16, 31, 40, 58])
def test_no_query_depends_on_later_tokens(name, t):
    config = STRICT[name]
    # Local blocks of a tile are those of its end, for all queries alike: forced by position, they
    # carry no later value.
    q, k, v = make_inputs((1, 60), 4, 2, 8, dtype=F64)
    before = nsa.forward(q, k, v, config=config)
    after = nsa.forward(*_changed_after(t, q, k, v), config=config)
    torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], **CLOSE)
    assert not torch.allclose(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("preset", [nsa.NSAConfig, nsa.NSAConfig.paper])
def test_the_presets_see_no_later_token(preset):
    q, k, v = make_inputs((1, 2304), 2, 1, 8)
    before = nsa.forward(q, k, v, config=preset())
    after = nsa.forward(*_changed_after(2302, q, k, v), config=preset())
    assert torch.equal(after[:, :2303], before[:, :2303])
    q, k, v = (x[:, :1500].contiguous() for x in (q, k, v))
    torch.testing.assert_close(nsa.forward(q, k, v, config=preset()), before[:, :1500])


def test_the_published_system_sees_ahead():
    q, k, v = make_inputs((1, 2304), 2, 1, 8)
    before = nsa.forward(q, k, v, config=nsa.NSAConfig.mslk())
    after = nsa.forward(*_changed_after(2302, q, k, v), config=nsa.NSAConfig.mslk())
    assert not torch.equal(after[:, :2303], before[:, :2303])


@given(
    problems(
        max_tokens=60,
        packed=False,
        min_sequences=1,
        tile_summary="first",
        compressed_visibility="complete",
        causal=True,
    )
)
def test_a_sequence_that_grows_keeps_its_earlier_outputs(problem):
    """Forced blocks past the end keep their slots, so that later tokens take none away."""
    q, k, v, config, extras = problem
    extras = {name: x for name, x in extras.items() if name != "compressed_kv"}
    whole = nsa.forward(q, k, v, config=config, **extras)
    for length in {0, 1, q.shape[1] // 3, q.shape[1] // 2, max(0, q.shape[1] - 1)}:
        arguments = {"q": q, "k": k, "v": v, **extras}
        own = {n: _slice(n, x, lambda x, end=length: x[:, :end]) for n, x in arguments.items()}
        torch.testing.assert_close(nsa.forward(config=config, **own), whole[:, :length], **CLOSE)


@pytest.mark.parametrize("t", [0, 3, 15, 20, 31, 40, 58])
def test_with_mean_summaries_only_routing_looks_ahead(t):
    config = dataclasses.replace(SMALL["tile"], tile_summary="mean")
    q, k, v = make_inputs((1, 60), 4, 2, 8, dtype=F64)
    indices = nsa.select_blocks(q, k, config=config)
    before = nsa.forward(q, k, v, config=config, block_indices=indices)
    changed = _changed_after(t, q, k, v)
    after = nsa.forward(*changed, config=config, block_indices=indices)
    torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], **CLOSE)
    # Tiles that end at or before t route as before.
    done = (t + 1) // config.q_tile_size
    rerouted = nsa.select_blocks(*changed[:2], config=config)
    assert torch.equal(rerouted[:, :, :done], indices[:, :, :done])


def test_started_blocks_leak_at_most_a_block_less_one_token():
    size, t = 4, 20
    config = dataclasses.replace(SMALL["token"], compressed_visibility="started")
    q, k, v = make_inputs((1, 60), 4, 2, 8, dtype=F64)
    before = nsa.forward(q, k, v, config=config)
    # Block 10 starts at token 20 and ends at 23: query 20 sees 3 tokens ahead and no more.
    leak = nsa.forward(*_changed_after(t, q, k, v), config=config)
    assert not torch.allclose(leak[:, t], before[:, t])
    safe = nsa.forward(*_changed_after(t + size - 1, q, k, v), config=config)
    torch.testing.assert_close(safe[:, : t + 1], before[:, : t + 1], **CLOSE)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("leading", [(0, 9), (3, 0), (0, 0), (2, 1)], ids=str)
def test_empty_and_single_token_batches(name, leading):
    config = SMALL[name]
    q, k, v = make_inputs(leading, 4, 2, 8, 5, requires_grad=True)
    out = nsa.forward(q, k, v, config=config)
    assert out.shape == (*leading, 4, 5)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    n = config.num_selected_blocks
    tiles = -(-leading[1] // config.q_tile_size)
    shape = (*leading, 2, n) if name == "token" else (leading[0], 4, tiles, n)
    assert nsa.select_blocks(q, k, config=config).shape == shape


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1, 0, 1]], ids=str)
def test_empty_and_single_token_packs(name, lengths):
    config, total = SMALL[name], sum(lengths)
    q, k, v = make_inputs((total,), 4, 2, 8, 5)
    cu_seqlens = make_cu_seqlens(lengths)
    assert nsa.forward(q, k, v, config=config, cu_seqlens=cu_seqlens).shape == (total, 4, 5)
    n = config.num_selected_blocks
    shape = (total, 2, n) if name == "token" else (4, total, n)  # a tile for every lone token
    assert nsa.select_blocks(q, k, config=config, cu_seqlens=cu_seqlens).shape == shape


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("group", [1, 3, 5, 16])
def test_each_kv_head_serves_its_own_group(name, group):
    config = SMALL[name]
    q, k, v = make_inputs((1, 40), 2 * group, 2, 8, dtype=F64)
    whole = nsa.forward(q, k, v, config=config)
    for kv in range(2):
        heads = slice(kv * group, (kv + 1) * group)
        own = slice(kv, kv + 1)
        alone = nsa.forward(q[:, :, heads], k[:, :, own], v[:, :, own], config=config)
        torch.testing.assert_close(whole[:, :, heads], alone, **CLOSE)


@pytest.mark.parametrize("name", ["tile", "sparse"])
def test_repeating_kv_heads_changes_nothing_in_tile_mode(name):
    # There every query head selects for itself; token mode selects for a group.
    q, k, v = make_inputs((2, 40), 6, 2, 8, dtype=F64)
    repeated = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    whole = nsa.forward(q, k, v, config=SMALL[name])
    torch.testing.assert_close(nsa.forward(q, *repeated, config=SMALL[name]), whole, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_lower_precision_errs_by_its_rounding(name, dtype):
    q, k, v = (x.requires_grad_() for x in make_inputs((2, 100), 4, 2, 16, dtype=dtype))
    weight = torch.randn(4, 3, 16, dtype=F64).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    indices = nsa.select_blocks(*exact[:2], config=SMALL[name])
    results = []
    for inputs, projection in (((q, k, v), weight), (exact, weight.double())):
        # Groups of compressed tokens may differ where scores nearly tie: see no sparse gate.
        gates = None if name != "sparse" else projection.new_tensor([0, 1, 1]).expand(2, 100, 4, 3)
        out = nsa.forward(
            *inputs,
            config=SMALL[name],
            gate_proj_weight=projection,
            gates=gates,
            block_indices=indices,
        )
        assert out.dtype == inputs[0].dtype
        results.append((out, *torch.autograd.grad(out.double().square().sum(), inputs)))
    # A result is rounded a few times on the way, once for every stage: 8 roundings of the
    # largest value bound them with room, and one wrong key among 20 does not fit.
    for value, truth in zip(*results, strict=True):
        error = (value.double() - truth).abs().max() / truth.abs().max()
        assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", SMALL)
def test_memory_layout_does_not_matter(name):
    q, k, v = make_inputs((2, 40), 4, 2, 8, dtype=F64)
    whole = nsa.forward(q, k, v, config=SMALL[name])
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in (q, k, v)]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.cat([q, k, v], dim=2).split([4, 2, 2], dim=2)
    for inputs in (strided, heads_first, fused):
        assert not inputs[0].is_contiguous()
        torch.testing.assert_close(nsa.forward(*inputs, config=SMALL[name]), whole, **CLOSE)
    expanded = nsa.forward(q[:1].expand(2, -1, -1, -1), k, v, config=SMALL[name])
    copied = nsa.forward(q[:1].repeat(2, 1, 1, 1), k, v, config=SMALL[name])
    torch.testing.assert_close(expanded, copied, **CLOSE)


@pytest.mark.parametrize("name", SMALL)
def test_inputs_are_not_changed_and_results_repeat(name):
    inputs = make_inputs((2, 40), 4, 2, 8)
    copies = [x.clone() for x in inputs]
    first = nsa.forward(*inputs, config=SMALL[name])
    assert torch.equal(first, nsa.forward(*inputs, config=SMALL[name]))
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_large_logits_stay_finite(name):
    q, k, v = make_inputs((1, 60), 4, 2, 8, requires_grad=True)
    out = nsa.forward(q * 1e4, k, v, config=SMALL[name])
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert out.abs().max() <= v.abs().max() * (1 + 1e-6)


@pytest.mark.parametrize("selection", ["token", "tile"])
def test_many_short_sequences_cost_what_their_tokens_do(selection, monkeypatch):
    """Chunks hold as many sequences as fit: their number follows the tokens, not the sequences."""
    calls = []
    original = attention._masked_attention
    monkeypatch.setattr(
        attention, "_masked_attention", lambda *args: calls.append(0) or original(*args)
    )
    config = nsa.NSAConfig(selection=selection)
    lengths = [16] * 500 + [700]
    q, k, v = make_inputs((sum(lengths),), 2, 1, 8)
    nsa.forward(q, k, v, config=config, cu_seqlens=make_cu_seqlens(lengths), backend="reference")
    assert len(calls) < 100
