"""FA4's own Python, as it is, with stand-ins for its compiled kernels: replays pass the same."""

import gc
import weakref

import pytest
import torch

from nsa.fused import fa4, fa4_replay
from nsa.fused.kernel_inputs import BlockLists
from tests.helpers.poison import poisoned_memory
from tests.helpers.requirements import import_fused

interface = import_fused("flash_attn.cute.interface")

ROWS, HEADS, KV_HEADS, DIM = 256, 8, 2, 128
FUNCTIONS = ("_flash_attn_fwd", "_flash_attn_bwd", "_bwd_preprocess", "_bwd_postprocess_convert")


class OnGpu(torch.Tensor):
    """A tensor that says so to FA4's checks."""

    is_cuda = True


class Kernels:
    """A compile cache that has a kernel for everything, and keeps what these are called with."""

    def __init__(self):
        self.calls, self.keys = [], []

    @property
    def lookups(self) -> int:
        return len(self.keys)

    def __contains__(self, key) -> bool:
        return True

    def __getitem__(self, key):
        self.keys.append(key)
        return lambda *arguments: self.calls.append(arguments)


@pytest.fixture
def kernels(monkeypatch):
    cache = Kernels()
    for name in FUNCTIONS:
        monkeypatch.setattr(getattr(interface, name), "compile_cache", cache)
    monkeypatch.setattr(interface, "_get_device_arch", lambda: 90)
    monkeypatch.setattr(interface, "get_num_sms_for_selection", lambda *_: 132)
    monkeypatch.setattr(fa4_replay, "_known", {})
    monkeypatch.setattr(fa4, "_zero_count", torch.zeros_like)
    return cache


def make(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


def window():
    q, k, v = make(1, ROWS, HEADS, DIM), *(make(1, ROWS, KV_HEADS, DIM) for _ in range(2))
    return fa4.dense_forward(q, k, v, scale=0.1, causal=True, window_size=(63, None))


KEY_TIMES = dict(scale=0.1, causal=False, window_size=(None, None), key_times=(64, 63))


def key_times():
    q, k, v = make(1, ROWS, HEADS, DIM), *(make(1, 4, KV_HEADS, DIM) for _ in range(2))
    return fa4.dense_forward(q, k, v, **KEY_TIMES)


def into_slices():
    """As folding has it: permuted views of what is written, a batch of heads."""
    q, out = (make(ROWS, HEADS, DIM).unflatten(0, (-1, 64)).permute(2, 0, 1, 3) for _ in range(2))
    k, v = (make(HEADS, ROWS // 64, 1, DIM) for _ in range(2))
    lse = make(HEADS, 64, ROWS // 64, dtype=torch.float32)
    mask = dict(scale=0.2, causal=True, window_size=(None, None))
    return fa4.dense_forward(q, k, v, out=out, lse=lse, **mask)


def sparse(**mask):
    q, k, v = make(1, ROWS, HEADS, DIM), *(make(1, ROWS, KV_HEADS, DIM) for _ in range(2))
    lists = (make(1, HEADS, 2, dtype=torch.int32), make(1, HEADS, 2, 2, dtype=torch.int32))
    lists = BlockLists(*lists, None, None, 128, 128)
    return fa4.sparse_forward(q, k, v, lists, scale=0.1, **mask)


def sparse_causal():
    return sparse(causal=True)


def sparse_limit():
    return sparse(causal=False, key_limit=make(ROWS, dtype=torch.int32))


def packed_arguments(**changes) -> dict:
    bounds = [make(4, dtype=torch.int32) for _ in range(2)]
    lengths = dict(cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])
    lengths |= dict(max_seqlen_q=200, max_seqlen_k=100)
    return dict(scale=0.1, causal=True, window_size=(None, None)) | lengths | changes


def packed(**changes):
    q, k = make(ROWS, HEADS, DIM), make(ROWS // 2, KV_HEADS, DIM)
    return fa4.dense_forward(q, k, make(ROWS // 2, KV_HEADS, DIM), **packed_arguments(**changes))


CALLS = [window, key_times, into_slices, sparse_causal, sparse_limit, packed]


@pytest.mark.parametrize("call", CALLS)
def test_replays_pass_what_fa4_passes(call, kernels):
    results = [call(), call()]
    # Looked up for the first call alone.
    assert kernels.lookups == 1
    first, second = map(describe, kernels.calls)
    assert first == second
    for arguments, (out, lse) in zip(kernels.calls, results, strict=True):
        assert arguments[3].data_ptr() == out.data_ptr()
        assert arguments[4].data_ptr() == lse.data_ptr()
    assert [describe(x) for x in results[0]] == [describe(x) for x in results[1]]


def describe(x):
    """All of an argument but where it lies."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.requires_grad
    return tuple(map(describe, x)) if isinstance(x, (tuple, list)) else x


def window_backward(kv_heads=KV_HEADS, **dq):
    q, out, dout = (make(1, ROWS, HEADS, DIM) for _ in range(3))
    k, v = (make(1, ROWS, kv_heads, DIM) for _ in range(2))
    lse = make(1, HEADS, ROWS, dtype=torch.float32)
    mask = dict(scale=0.1, causal=True, window_size=(63, None))
    return fa4.dense_backward(dout, q, k, v, out, lse, **mask, **dq)


def key_times_backward():
    q, out, dout = (make(1, ROWS, HEADS, DIM) for _ in range(3))
    k, v = (make(1, 4, KV_HEADS, DIM) for _ in range(2))
    lse = make(1, HEADS, ROWS, dtype=torch.float32)
    return fa4.dense_backward(dout, q, k, v, out, lse, **KEY_TIMES)


def backward_of_every_head():
    return window_backward(HEADS)


def backward_into_slices():
    shape = (ROWS, HEADS, DIM)
    q, out, dout, dq = (make(*shape).unflatten(0, (-1, 64)).permute(2, 0, 1, 3) for _ in range(4))
    k, v = (make(HEADS, ROWS // 64, 1, DIM) for _ in range(2))
    lse = make(HEADS, 64, ROWS // 64, dtype=torch.float32)
    mask = dict(scale=0.2, causal=True, window_size=(None, None))
    grads = fa4.dense_backward(dout, q, k, v, out, lse, dq=dq, **mask)
    assert grads[0].data_ptr() == dq.data_ptr()
    return grads


def packed_backward(kv_heads=KV_HEADS):
    q, out, dout = (make(ROWS, HEADS, DIM) for _ in range(3))
    k, v = (make(ROWS // 2, kv_heads, DIM) for _ in range(2))
    lse = make(HEADS, ROWS, dtype=torch.float32)
    return fa4.dense_backward(dout, q, k, v, out, lse, **packed_arguments())


def packed_backward_of_every_head():
    return packed_backward(HEADS)


@pytest.mark.parametrize(
    ("call", "steps"),
    [
        (window_backward, 5),
        (key_times_backward, 5),
        (backward_of_every_head, 3),
        (backward_into_slices, 5),
        (packed_backward, 5),
        (packed_backward_of_every_head, 3),
    ],
)
def test_replays_of_backward_pass_what_fa4_passes(call, steps, kernels):
    results = [call(), call()]
    assert kernels.lookups == steps
    first, second = kernels.calls[:steps], kernels.calls[steps:]
    assert describe(first) == describe(second)
    assert [describe(x) for x in results[0]] == [describe(x) for x in results[1]]
    for arguments, grads in zip((first, second), results, strict=True):
        assert same_memory(arguments) == same_memory(first)
        written = {arguments[2][1].data_ptr()} | {
            x.data_ptr() for x in (*arguments[1][7:9], *(step[1] for step in arguments[3:]))
        }
        assert {x.data_ptr() for x in grads} <= written
        for total in arguments[1][7:9] if steps == 5 else ():
            assert not total.any()


def same_memory(steps) -> list[int]:
    """Of each tensor the first one at the same place, so that what is passed on is seen."""
    places = [x.data_ptr() for step in steps for x in step if isinstance(x, torch.Tensor)]
    return list(map(places.index, places))


@pytest.mark.parametrize(
    "call", [window, key_times, sparse_causal, sparse_limit, packed, window_backward,
             key_times_backward, backward_of_every_head, packed_backward],
)  # fmt: skip
def test_poison_reaches_every_output(call, kernels):
    """These kernels write nothing, so a result without poison would be memory that it misses."""
    for _ in ("FA4's own call", "a replay"):
        with poisoned_memory():
            results = call()
        for x in results:
            assert x.isnan().all()


def test_backward_of_what_fa4_copies_is_never_replayed(kernels):
    wide = make(1, ROWS, DIM, HEADS).transpose(2, 3)
    q, k = make(1, ROWS, HEADS, DIM), make(1, ROWS, KV_HEADS, DIM)
    lse = make(1, HEADS, ROWS, dtype=torch.float32)
    mask = dict(scale=0.1, causal=True, window_size=(63, None))
    for _ in range(2):
        fa4.dense_backward(wide, q, k, k, q, lse, **mask)
    assert kernels.lookups == 10


def test_other_layouts_and_options_are_other_calls(kernels):
    for call in (*CALLS, *CALLS):
        call()
    assert kernels.lookups == len(CALLS)
    q, k = make(1, ROWS, HEADS, DIM), make(1, ROWS, KV_HEADS, DIM)
    mask = dict(scale=0.1, causal=True, window_size=(63, None))
    wide = make(1, ROWS, HEADS, 2 * DIM)[..., :DIM]
    for arguments in ((q, k[:, :64], k[:, :64]), (wide, k, k)):
        fa4.dense_forward(*arguments, **mask)
    fa4.dense_forward(q, k, k, **(mask | dict(window_size=(62, None))))
    fa4.dense_forward(q, k, k, **(mask | dict(causal=False)))
    assert kernels.lookups == len(CALLS) + 4


def test_what_fa4_copies_is_never_replayed(kernels):
    k = make(1, ROWS, KV_HEADS, DIM)
    q = make(ROWS * HEADS * DIM + 1)[1:].view(1, ROWS, HEADS, DIM)
    for _ in range(2):
        fa4.dense_forward(q, k, k, scale=0.1, causal=True, window_size=(None, None))
    assert kernels.lookups == 2
    for arguments in kernels.calls:
        assert arguments[0].data_ptr() % 16 == 0


def test_another_gpu_is_never_replayed(kernels, monkeypatch):
    monkeypatch.setattr(interface, "_get_device_arch", lambda: 100)
    for _ in range(2):
        window()
    assert kernels.lookups == 2


@pytest.mark.parametrize("call", [window, sparse_limit, window_backward, packed_backward])
def test_nothing_of_a_noted_call_is_kept(call, kernels):
    gc.collect()
    gc.disable()
    try:
        results = [weakref.ref(x) for x in call()]
        seen = [weakref.ref(x) for step in kernels.calls for x in step if torch.is_tensor(x)]
        kernels.calls.clear()
        assert len(seen) > len(results)
        assert not [x for x in results + seen if x() is not None]
    finally:
        gc.enable()


def test_packs_of_about_one_length_are_alike(kernels):
    for longest in (200, 512, 100):
        packed(max_seqlen_q=longest)
    assert kernels.lookups == 1
    packed(max_seqlen_q=600)
    packed(cu_seqlens_k=make(5, dtype=torch.int32), cu_seqlens_q=make(5, dtype=torch.int32))
    assert kernels.lookups == 3


def test_known_calls_are_bounded(kernels, monkeypatch):
    monkeypatch.setattr(fa4_replay, "MAX_KNOWN", 2)
    for call in CALLS:
        call()
    assert len(fa4_replay._known) <= 2


def test_packs_of_all_lengths_have_the_same_kernels(kernels, monkeypatch):
    """FA4 compiles others where a bound of the lengths is one tile."""
    caches = [Kernels() for _ in FUNCTIONS]
    for name, cache in zip(FUNCTIONS, caches, strict=True):
        monkeypatch.setattr(getattr(interface, name), "compile_cache", cache)
    for total, longest in ((4000, 3000), (4000, 100), (65, 64), (1, 1)):
        q, k = make(total, HEADS, DIM), make(total, KV_HEADS, DIM)
        bounds = make(3, dtype=torch.int32)
        call = dict(scale=0.1, causal=True, window_size=(63, None))
        call |= dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        call |= dict(max_seqlen_q=longest, max_seqlen_k=longest)
        out, lse = (x.as_subclass(OnGpu) for x in fa4.dense_forward(q, k, k, **call))
        fa4.dense_backward(out, q, k, k, out, lse, **call)
    for cache in caches[:2]:
        assert cache.lookups == 4
        assert len(set(cache.keys)) == 1
