"""Finite differences against autograd, in float64, for every input and weight."""

import pytest
import torch
from torch.autograd import gradcheck

import nsa
from nsa.testing import make_cu_seqlens, make_inputs

F64 = torch.float64
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 3, 2
CONFIGS = {
    "token": nsa.NSAConfig.paper(
        compress_block_size=4,
        compress_stride=2,
        select_block_size=4,
        num_selected_blocks=3,
        num_local_blocks=1,
        window_size=3,
    ),
    "tile": nsa.NSAConfig(
        compress_block_size=2,
        select_block_size=4,
        num_selected_blocks=2,
        num_local_blocks=1,
        window_size=3,
        q_tile_size=5,
    ),
    "sparse": nsa.NSAConfig(
        compress_block_size=2,
        num_selected_blocks=2,
        window_size=3,
        q_tile_size=4,
        num_cmp_selected_blocks=1,
        cmp_group_size=2,
    ),
}
# One batch element of 13 tokens, or sequences with none, one and an uneven number of them.
LAYOUTS = {"batched": ((1, 13), None), "packed": ((13,), [0, 1, 9, 0, 3])}
LAYOUTS |= {f"{name}, fewer queries": layout for name, layout in LAYOUTS.items()}


def _fewer(length, config):
    """The queries of a sequence from the fourth or the second tile on, which may be none."""
    return max(0, length - (3 if config.selection == "token" else config.q_tile_size))


def _arguments(leading, config, lengths, lengths_q):
    q, k, v = make_inputs(leading, HEADS, KV_HEADS, DIM, VALUE_DIM, dtype=F64)
    q = q[..., : sum(lengths_q), :, :].contiguous()

    def randn(*shape):
        return torch.randn(*shape, dtype=F64)

    size, stride = config.compress_block_size, config.compress_stride
    blocks = sum(max(0, (n - size) // stride + 1) for n in lengths or [leading[-1]])
    return {
        "q": q,
        "k": k,
        "v": v,
        "three_k": tuple(randn(*k.shape) for _ in range(3)),
        "three_v": tuple(randn(*v.shape) for _ in range(3)),
        "gates": randn(*q.shape[:-1], 3),
        "gate_proj_weight": randn(HEADS, 3, DIM),
        "compress_k_weight": randn(KV_HEADS, DIM, DIM),
        "compress_v_weight": randn(KV_HEADS, VALUE_DIM, VALUE_DIM),
        "compressed_kv": (
            randn(*leading[:-1], blocks, KV_HEADS, DIM),
            randn(*leading[:-1], blocks, KV_HEADS, VALUE_DIM),
        ),
    }


# Which arguments a check passes; every one of them is differentiated.
CASES = {
    "shared-kv-thirds": ("q", "k", "v"),
    "three-kv-gates": ("q", "three_k", "three_v", "gates"),
    "weights": ("q", "k", "v", "gate_proj_weight", "compress_k_weight", "compress_v_weight"),
    "learned-compressor": ("q", "k", "v", "gate_proj_weight", "compressed_kv"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck(name, layout, case):
    config, (leading, lengths) = CONFIGS[name], LAYOUTS[layout]
    lengths_q = lengths or [leading[-1]]
    if "fewer" in layout:
        lengths_q = [_fewer(n, config) for n in lengths_q]
    everything = _arguments(leading, config, lengths, lengths_q)
    bounds = {}
    if lengths is not None:
        bounds["cu_seqlens"] = make_cu_seqlens(lengths_q)
        bounds["cu_seqlens_k"] = make_cu_seqlens(lengths)
    parts = {key: everything[key] for key in CASES[case]}
    counts = [len(x) if isinstance(x, tuple) else 0 for x in parts.values()]

    def call(*flat, **fixed):
        rest, arguments = list(flat), {}
        for key, count in zip(parts, counts, strict=True):
            taken = [rest.pop(0) for _ in range(count or 1)]
            arguments[key.removeprefix("three_")] = tuple(taken) if count else taken[0]
        q, k, v = (arguments.pop(key) for key in "qkv")
        return nsa.forward(q, k, v, config=config, **bounds, **arguments, **fixed)

    flat = [x for part in parts.values() for x in (part if isinstance(part, tuple) else (part,))]
    flat = [x.requires_grad_() for x in flat]
    # Routing is a step function: the differences hold it fixed. Groups of compressed tokens
    # cannot be passed; their random scores lie far enough apart.
    select = {key: x for key, x in parts.items() if key in ("compress_k_weight", "compressed_kv")}
    key = parts["three_k" if "three_k" in parts else "k"]
    indices = nsa.select_blocks(parts["q"], key, config=config, **bounds, **select)
    assert gradcheck(lambda *x: call(*x, block_indices=indices), flat, fast_mode=True)
    # Without the caller's blocks the output and its gradients are the same.
    routed, fixed = call(*flat), call(*flat, block_indices=indices)
    torch.testing.assert_close(routed, fixed, rtol=0, atol=1e-14)
    cotangent = torch.randn_like(routed)
    routed = torch.autograd.grad(routed, flat, cotangent)
    fixed = torch.autograd.grad(fixed, flat, cotangent)
    torch.testing.assert_close(routed, fixed, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_passes_through_selection(name):
    config = CONFIGS[name]
    q, k, v = make_inputs((1, 20), HEADS, KV_HEADS, DIM, dtype=F64, requires_grad=True)
    three_k = [k.detach().clone().requires_grad_() for _ in range(3)]
    gates = torch.zeros(1, 20, HEADS, 3, dtype=F64)
    gates[..., 1] = 1
    nsa.forward(q, tuple(three_k), v, config=config, gates=gates).sum().backward()
    assert (three_k[0].grad == 0).all()
    assert (three_k[1].grad != 0).any()
    assert not nsa.select_blocks(q, k, config=config).requires_grad


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_queries_without_keys_send_zero_gradients(name, dtype):
    config = CONFIGS[name]
    q, k, v = make_inputs((1, 12), HEADS, KV_HEADS, DIM, dtype=dtype, requires_grad=True)
    gates = torch.zeros(1, 12, HEADS, 3, dtype=dtype)
    gates[..., :2] = 1
    n = config.num_selected_blocks
    shape = (1, 12, KV_HEADS, n) if name == "token" else (1, HEADS, -(-12 // config.q_tile_size), n)
    nothing = torch.full(shape, -1, dtype=torch.int32)
    out = nsa.forward(q, k, v, config=config, gates=gates, block_indices=nothing)
    first = config.compress_block_size - 1
    assert (out[:, :first] == 0).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert (q.grad[:, :first] == 0).all()
    last = 12 // config.compress_stride * config.compress_stride
    assert (k.grad[:, last:] == 0).all()
    assert (v.grad[:, last:] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [1, 0, 1]], ids=str)
def test_gradients_of_packs_that_are_empty_or_single_tokens(name, lengths):
    config, total = CONFIGS[name], sum(lengths)
    q, k, v = make_inputs((total,), HEADS, KV_HEADS, DIM, dtype=F64, requires_grad=True)
    weights = [torch.randn(KV_HEADS, DIM, DIM, dtype=F64, requires_grad=True) for _ in range(2)]
    out = nsa.forward(
        q,
        k,
        v,
        config=config,
        cu_seqlens=make_cu_seqlens(lengths),
        compress_k_weight=weights[0],
        compress_v_weight=weights[1],
    )
    out.sum().backward()
    for x in (q, k, v, *weights):
        assert x.grad.isfinite().all()
    # A lone token attends itself alone: no probability, so no score, can change.
    assert (q.grad == 0).all()
    assert (weights[0].grad == 0).all()


def test_gradients_do_not_depend_on_chunks(monkeypatch):
    from nsa.reference import chunks

    config = CONFIGS["sparse"]
    q, k, v = make_inputs((2, 40), HEADS, KV_HEADS, DIM, dtype=F64, requires_grad=True)
    whole = nsa.forward(q, k, v, config=config)
    expected = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr(chunks, "CPU_CHUNK_ELEMENTS", 50)
    pieces = nsa.forward(q, k, v, config=config)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-13)
    actual = torch.autograd.grad(pieces.square().sum(), (q, k, v))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
