"""Nothing depends on how a user sets PyTorch up, or on later writes to arguments."""

import contextlib
from dataclasses import replace

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.small_configs import tile_config, token_config
from tests.helpers.torch_defaults import DEFAULTS

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

LENGTHS = [70, 0, 1, 130]
CONFIGS = {
    "tile": tile_config(num_local_blocks=1),
    "sparse": tile_config(
        compress_block_size=1, num_cmp_selected_blocks=1, cmp_group_size=64
    ),
    "token": token_config(),
}  # fmt: skip
GATES = ["gates", "gate weight", "neither"]
both = pytest.mark.parametrize("backend", ["reference", "fused"])
modes = pytest.mark.parametrize("mode", CONFIGS)
forms = pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])


def make_call(mode, packed, dtype=torch.float32, gates="gate weight", scale=1.0, weights=True):
    """Differentiable tensors by name, and the other arguments."""
    leading = (sum(LENGTHS),) if packed else (2, 130)
    q, k, v = make_inputs(leading, 4, 2, 16, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    tensors = dict(q=q * scale, k=k * scale, v=v)
    if weights:
        tensors |= dict(compress_k_weight=draw(2, 16, 16), compress_v_weight=draw(2, 16, 16))
    if gates == "gates":
        tensors["gates"] = draw(*leading, 4, 3)
    elif gates == "gate weight":
        tensors["gate_proj_weight"] = draw(4, 3, 16)
    tensors = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    extras = dict(config=CONFIGS[mode])
    if packed:
        extras["cu_seqlens"] = make_cu_seqlens(LENGTHS)
    return tensors, extras


def run(tensors, extras, backend, context=contextlib.nullcontext, backward_inside=True):
    """Output, gradients and selected blocks, with forward (and backward) in a context."""
    with context():
        out = nsa.forward(**tensors, **extras, backend=backend)
        if backward_inside:
            grads = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
        selecting = {name: tensors.get(name) for name in ("q", "k", "compress_k_weight")}
        blocks = nsa.select_blocks(**selecting, **extras, backend=backend)
    if not backward_inside:
        grads = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    return out.detach(), *grads, blocks


def assert_same_bits(actual, expected):
    for x, wanted in zip(actual, expected, strict=True):
        assert x.dtype == wanted.dtype
        assert x.device == wanted.device
        assert torch.equal(x, wanted)


@both
@modes
@forms
def test_global_defaults_change_nothing(packed, mode, backend):
    tensors, extras = make_call(mode, packed)
    expected = run(tensors, extras, backend)
    given = extras | dict(block_indices=expected[-1], backend=backend)
    wanted = nsa.forward(**tensors, **given)
    for default in DEFAULTS.values():
        assert_same_bits(run(tensors, extras, backend, default), expected)
        with default():
            out = nsa.forward(**tensors, **given)
            if packed:
                packing = nsa.Packing(extras["cu_seqlens"])
                again = nsa.forward(**tensors, **(given | dict(cu_seqlens=packing)))
                assert torch.equal(again, wanted)
        assert torch.equal(out, wanted)


@both
@modes
@forms
@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_autocast_changes_nothing(dtype, cast, packed, mode, backend):
    tensors, extras = make_call(mode, packed, dtype)
    expected = run(tensors, extras, backend)
    inside = dtype != torch.float16

    def autocast():
        return torch.autocast("cpu", cast)

    assert_same_bits(run(tensors, extras, backend, autocast, inside), expected)


@modes
def test_autocast_does_not_overflow_the_reference(mode):
    """Logits past 65504, which float16 products would be infinite at."""
    tensors, extras = make_call(mode, False, torch.float16, "neither", weights=False)
    tensors = {name: x.detach() for name, x in tensors.items()}
    tensors["q"], tensors["k"] = tensors["q"] * 200, tensors["k"] * 20
    with torch.autocast("cpu", torch.float16):
        out = nsa.forward(**tensors, **extras)
    assert out.isfinite().all()
    assert torch.equal(out, nsa.forward(**tensors, **extras))


@both
@modes
@forms
def test_autocast_casts_mixed_dtypes(packed, mode, backend):
    tensors, extras = make_call(mode, packed, torch.float32)
    expected = run({n: x.bfloat16().detach().requires_grad_() for n, x in tensors.items()}, extras,
                   backend)  # fmt: skip
    mixed = dict(tensors)
    mixed["k"] = mixed["k"].detach().bfloat16().requires_grad_()
    mixed["v"] = mixed["v"].detach().half().requires_grad_()
    with pytest.raises(TypeError, match=r"k must have the dtype of q, torch.float32, got"):
        nsa.forward(**mixed, **extras, backend=backend)
    del tensors["v"], mixed["v"]
    tensors["v"] = mixed["v"] = mixed["k"].detach()[..., :16].clone().requires_grad_()

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        out = nsa.forward(**mixed, **extras, backend=backend)
        scaled = torch.nn.functional.scaled_dot_product_attention
        like = scaled(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8).bfloat16(),
                      torch.zeros(1, 1, 2, 8).half())  # fmt: skip
    assert out.dtype == like.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, list(mixed.values()), torch.ones_like(out))
    assert [g.dtype for g in grads] == [x.dtype for x in mixed.values()]
    wanted = nsa.forward(**{n: x.bfloat16() for n, x in mixed.items()}, **extras, backend=backend)
    assert torch.equal(out, wanted)
    assert expected[0].dtype == torch.bfloat16


def test_autocast_leaves_float64_alone():
    q, k, v = make_inputs((1, 20), 4, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"k must have the dtype of q, torch.float32"):
            nsa.forward(q, k.double(), v)
        with pytest.raises(TypeError, match=r"k must be a tensor"):
            nsa.forward(q.bfloat16(), 3, v)
        three = (k, k.half(), k)
        out = nsa.forward(q, three, v, config=CONFIGS["tile"])
    assert out.dtype == torch.bfloat16


@both
@modes
@forms
@pytest.mark.parametrize("write", [lambda x: x.fill_(-1), lambda x: x.data.fill_(-1)])
def test_overwritten_block_indices_do_not_matter(write, packed, mode, backend):
    tensors, extras = make_call(mode, packed)
    blocks = run(tensors, extras, backend)[-1]
    out = nsa.forward(**tensors, **extras, block_indices=blocks, backend=backend)
    expected = gradients(out, tensors)
    out = nsa.forward(**tensors, **extras, block_indices=blocks, backend=backend)
    write(blocks)
    assert_same_bits(gradients(out, tensors), expected)


def overwritable(mode, packed):
    tensors, extras = make_call(mode, packed)
    stride, size = CONFIGS[mode].compress_stride, CONFIGS[mode].compress_block_size
    blocks = [max(0, (n - size) // stride + 1) for n in (LENGTHS if packed else [130])]
    del tensors["compress_k_weight"], tensors["compress_v_weight"]
    leading = (sum(blocks),) if packed else (2, blocks[0])
    k_cmp, v_cmp = torch.randn(2, *leading, 2, 16)
    return tensors | dict(k_cmp=k_cmp.requires_grad_(), v_cmp=v_cmp.requires_grad_()), extras


@both
@modes
@forms
def test_overwritten_tensors_are_noticed(packed, mode, backend):
    """By autograd; or the gradients are of the copy that was taken."""
    tensors, extras = overwritable(mode, packed)
    written = {key: x.detach().clone().requires_grad_() for key, x in tensors.items()}

    def call(tensors):
        # A view of a clone can be written to where a leaf cannot.
        clones = {key: x.clone() for key, x in tensors.items()}
        given = dict(clones)
        given["compressed_kv"] = (given.pop("k_cmp"), given.pop("v_cmp"))
        return nsa.forward(**given, **extras, backend=backend), clones

    out, _ = call(tensors)
    expected = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    for name in written:
        out, clones = call(written)
        with torch.no_grad():
            clones[name].fill_(7)
        assert_noticed(lambda out=out: gradients(out, written), expected)


@both
@modes
@forms
def test_inference_tensors_need_no_inference_mode(packed, mode, backend):
    """Where nothing requires a gradient, as weights loaded in inference mode."""
    tensors, extras = make_call(mode, packed)
    with torch.inference_mode():
        given = {name: x.detach().clone() for name, x in tensors.items()}
        extras["block_indices"] = nsa.select_blocks(
            *(given[name] for name in "qk"),
            compress_k_weight=given["compress_k_weight"],
            **extras,
            backend=backend,
        )
    out = nsa.forward(**given, **extras, backend=backend)
    with torch.no_grad():
        assert_same_bits([out], [nsa.forward(**tensors, **extras, backend=backend)])


def gradients(out, tensors):
    return torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))


def assert_noticed(function, expected):
    """An error of autograd's, or the expected result."""
    try:
        actual = function()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_same_bits(actual, expected)


HUGE = [10**9, 2**31 - 1, 2**31, 2**31 + 1, 2**63 - 1, 2**63, 2**100]


@forms
@both
@modes
def test_a_window_past_the_sequence_is_no_window(mode, backend, packed):
    tensors, extras = make_call(mode, packed)
    extras["config"] = replace(CONFIGS[mode], window_size=10_000)
    expected = run(tensors, extras, backend)
    for value in HUGE:
        extras["config"] = replace(CONFIGS[mode], window_size=value)
        assert_same_bits(run(tensors, extras, backend), expected)


@forms
@pytest.mark.parametrize("mode", ["tile", "token"])
def test_more_blocks_than_there_are_is_all(mode, packed):
    tensors, extras = make_call(mode, packed)
    selecting = {name: tensors[name].detach() for name in ("q", "k")}

    def forward(**changes):
        config = replace(CONFIGS[mode], **changes)
        out = nsa.forward(**tensors, **(extras | dict(config=config)), backend="reference")
        return out, *torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))

    def results(count):
        """With forced blocks as they are, and all of one kind."""
        none = dict(num_initial_blocks=0, num_local_blocks=0)
        for forced in ({}, dict(num_initial_blocks=count), dict(num_local_blocks=count)):
            yield from forward(num_selected_blocks=count, **(none | forced if forced else {}))

    expected = list(results(40))
    for value in HUGE:
        assert_same_bits(results(value), expected)
        config = replace(CONFIGS[mode], num_selected_blocks=value)
        message = rf"num_selected_blocks must be at most 65536 .*{value}"
        with pytest.raises(ValueError, match=message):
            nsa.select_blocks(**selecting, **(extras | dict(config=config)))


@forms
def test_more_groups_than_there_are_is_all(packed):
    tensors, extras = make_call("sparse", packed)

    def forward(**changes):
        config = replace(CONFIGS["sparse"], **changes)
        return nsa.forward(**tensors, **(extras | dict(config=config)), backend="reference")

    expected = forward(num_cmp_selected_blocks=40)
    for value in HUGE:
        assert torch.equal(forward(num_cmp_selected_blocks=value), expected)


LARGE = 2**31 - 1
LARGE_SIZES = {
    "tile": dict(q_tile_size=LARGE),
    "tile mean": dict(q_tile_size=LARGE, num_local_blocks=2),
    "group": dict(cmp_group_size=LARGE, num_cmp_selected_blocks=1),
    "blocks of tiles": dict(compress_block_size=LARGE),
    "selected blocks of tiles": dict(select_block_size=16 * (LARGE // 16)),
    "blocks of tokens": dict(compress_block_size=16 * (LARGE // 16)),
    "all blocks of tokens": dict(
        compress_block_size=LARGE, compress_stride=LARGE, select_block_size=LARGE
    ),
    "selected blocks of tokens": dict(select_block_size=16 * (LARGE // 16)),
    "strides of one": dict(compress_stride=1, compress_block_size=LARGE, select_block_size=LARGE),
    "short blocks, strides of one": dict(
        compress_stride=1, compress_block_size=4, select_block_size=LARGE
    ),
}


@forms
@pytest.mark.parametrize("case", LARGE_SIZES)
def test_sizes_past_the_sequence(case, packed):
    """As sizes a little longer than the sequences, and without memory of that size."""
    token = "tokens" in case or "strides" in case
    base = nsa.NSAConfig.paper() if token else nsa.NSAConfig(compress_block_size=16)
    tensors, extras = make_call("tile", packed)

    def forward(sizes):
        config = replace(base, **sizes)
        changed = extras | dict(config=config, backend="reference")
        out = nsa.forward(**tensors, **changed)
        grads = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
        selecting = {name: tensors[name] for name in ("q", "k")}
        return out, *grads, nsa.select_blocks(**selecting, **changed)

    counts = ("num_local_blocks", "num_cmp_selected_blocks")
    few = {n: size if size < 10 or n in counts else 960 for n, size in LARGE_SIZES[case].items()}
    assert_same_bits(forward(LARGE_SIZES[case]), forward(few))


@modes
@pytest.mark.parametrize("name", ["q_tile_size", "select_block_size", "cmp_group_size"])
def test_the_fused_backend_says_which_size_it_does_not_take(name, mode):
    sizes = {name: 2**31 - 64}
    if mode.startswith("token"):
        sizes = dict(select_block_size=2**31 - 64)
    tensors, extras = make_call(mode, False)
    extras["config"] = replace(CONFIGS[mode], **sizes)
    with pytest.raises(nsa.UnsupportedError, match=r"_size of"):
        nsa.forward(**tensors, **extras, backend="fused")
