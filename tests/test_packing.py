"""Boundaries: a bare tensor is read in each call, a Packing once; equal results, whoever writes."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nsa
from nsa import boundaries, compressor, packing, segments, validation
from nsa.block_index_checks import check_block_indices
from nsa.boundaries import check_boundaries
from nsa.fused import token_inputs
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.packed_calls import (
    CONFIGS,
    F64,
    LENGTHS,
    OTHER,
    TOTAL,
    assert_same,
    both,
    inputs,
    modes,
    run,
)

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


@both
@modes
def test_a_packing_gives_what_the_tensor_gives(mode, backend):
    cu_seqlens = make_cu_seqlens(LENGTHS)
    expected = run(cu_seqlens, mode, backend)
    given = nsa.Packing(cu_seqlens)
    for _ in range(2):
        assert_same(run(given, mode, backend), expected)
    assert_same(run(nsa.Packing(cu_seqlens, max_seqlen=200), mode, backend), expected)
    assert_same(run(cu_seqlens, mode, backend, max_seqlen=140), expected)
    q, k, _ = inputs()
    call = dict(config=CONFIGS[mode], backend=backend)
    assert torch.equal(
        nsa.select_blocks(q, k, cu_seqlens=given, **call),
        nsa.select_blocks(q, k, cu_seqlens=cu_seqlens, **call),
    )
    said = nsa.explain_backend(q, k, k, cu_seqlens=given, **call)
    assert said == nsa.explain_backend(q, k, k, cu_seqlens=cu_seqlens, **call)


def broadcast(target, values):
    """As torch.distributed writes: the version of the tensor stays."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.distributed.all_gather([target], values.clone())
    finally:
        torch.distributed.destroy_process_group()


WRITES = {
    "copy_": lambda target, values: target.copy_(values),
    "data": lambda target, values: target.data.copy_(values),
    "set data": lambda target, values: setattr(target, "data", values.clone()),
    "numpy": lambda target, values: target.numpy().__setitem__(slice(None), values.numpy()),
    "dlpack": lambda target, values: torch.from_dlpack(target.__dlpack__()).copy_(values),
    "torch.distributed": broadcast,
}


@both
@modes
def test_whoever_writes_boundaries_is_noticed(mode, backend):
    other = make_cu_seqlens(OTHER)
    first, second = (run(make_cu_seqlens(x), mode, backend) for x in (LENGTHS, OTHER))
    for name, write in WRITES.items():
        cu_seqlens = make_cu_seqlens(LENGTHS)
        assert_same(run(cu_seqlens, mode, backend), first)
        given = nsa.Packing(cu_seqlens)
        write(cu_seqlens, other)
        assert torch.equal(cu_seqlens, other), name
        assert_same(run(cu_seqlens, mode, backend), second)
        assert_same(run(cu_seqlens, mode, backend, max_seqlen=130), second)
        # A Packing has its own.
        assert_same(run(given, mode, backend), first)


@both
@modes
def test_boundaries_may_be_overwritten_before_the_backward(mode, backend):
    expected, other = run(make_cu_seqlens(LENGTHS), mode, backend), make_cu_seqlens(OTHER)
    for write in WRITES.values():
        cu_seqlens = make_cu_seqlens(LENGTHS)
        between = partial(write, cu_seqlens, other)
        assert_same(run(cu_seqlens, mode, backend, between=between), expected)


@pytest.fixture
def reads(monkeypatch):
    """Boundaries that the host reads; the emulated kernels read too."""
    seen = []
    read = packing.read_lengths
    monkeypatch.setattr(packing, "read_lengths", lambda x, *n: seen.append(x.shape) or read(x, *n))
    return seen


@modes
def test_a_packing_is_read_once_and_a_tensor_in_each_call(mode, reads):
    cu_seqlens = make_cu_seqlens(LENGTHS)
    given = nsa.Packing(cu_seqlens)
    assert len(reads) == 1
    for _ in range(3):
        run(given, mode, "fused")
    assert len(reads) == 1
    for index in range(3):
        run(cu_seqlens, mode, "fused")
        assert len(reads) == 2 + index


def test_a_layer_reads_a_tensor_once(reads):
    layer = nsa.NativeSparseAttention(32, 4, 2, CONFIGS["token"], backend="fused").double()
    x = torch.randn(TOTAL, 32, dtype=F64)
    cu_seqlens = make_cu_seqlens(LENGTHS)
    out = layer(x, cu_seqlens)
    assert len(reads) == 1
    given = nsa.Packing(cu_seqlens)
    assert torch.equal(layer(x, given), out)
    assert torch.equal(layer(x, given), out)
    assert torch.equal(layer.select_blocks(x, given), layer.select_blocks(x, cu_seqlens))
    assert len(reads) == 3


@pytest.mark.parametrize("mode", CONFIGS)
def test_layers_with_one_packing_locate_nothing_again(mode, monkeypatch):
    located = []
    locate = segments.locate_items
    for module in (segments, compressor, token_inputs):
        monkeypatch.setattr(module, "locate_items", lambda *a: located.append(a) or locate(*a))
    stack = [nsa.NativeSparseAttention(32, 4, 2, CONFIGS[mode], backend="fused") for _ in "ab"]
    x = torch.randn(TOTAL, 32, requires_grad=True)
    given = nsa.Packing(make_cu_seqlens(LENGTHS))
    stack[0](x, given).sum().backward()
    assert located
    del located[:]
    for layer in stack:
        layer(x, given).sum().backward()
    assert not located


def test_a_bound_spares_reading_on_a_gpu(monkeypatch, reads):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    cu_seqlens = make_cu_seqlens(LENGTHS)
    x = torch.zeros(TOTAL, 1, 1)
    on_gpu, like = cu_seqlens.as_subclass(OnGpu), x.as_subclass(OnGpu)
    found = check_boundaries(on_gpu, 140, like, like)
    assert (found.lengths, found.max_seqlen, len(reads)) == (None, 140, 0)
    found = check_boundaries(on_gpu, None, like, like)
    assert (found.lengths, found.max_seqlen, len(reads)) == (LENGTHS, 130, 1)
    # Keys of their own need a bound of their own.
    del reads[:]
    keys = make_cu_seqlens(MORE).as_subclass(OnGpu)
    many = torch.zeros(sum(MORE), 1, 1).as_subclass(OnGpu)
    for bounds in ((140, None), (None, 200)):
        found = check_boundaries(on_gpu, bounds[0], like, many, keys, bounds[1])
        assert (found.lengths, found.lengths_k) == (LENGTHS, MORE)
        assert (found.max_seqlen, found.max_seqlen_k) == (bounds[0] or 130, bounds[1] or 194)
    assert len(reads) == 4
    found = check_boundaries(on_gpu, 140, like, many, keys, 200)
    assert (found.lengths, found.lengths_k, found.max_seqlen, found.max_seqlen_k) == (
        None, None, 140, 200,
    )  # fmt: skip
    assert len(reads) == 4


def test_a_captured_call_needs_both_bounds(monkeypatch):
    monkeypatch.setattr("nsa.boundaries.is_capturing", lambda _: True)
    monkeypatch.setattr("nsa.boundaries.has_readable_values", lambda _: False)
    bounds, keys = make_cu_seqlens(LENGTHS), make_cu_seqlens(MORE)
    q, k = torch.zeros(TOTAL, 1, 1), torch.zeros(sum(MORE), 1, 1)
    for given in ((None, 200), (140, None)):
        name = "max_seqlen" if given[0] is None else "max_seqlen_k"
        with pytest.raises(ValueError, match=rf"{name} must be an int while a CUDA graph is"):
            check_boundaries(bounds, given[0], q, k, keys, given[1])
    assert check_boundaries(bounds, 140, q, k, keys, 200).max_seqlen_k == 200


@both
@modes
@pytest.mark.parametrize("huge", [2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30])
def test_a_huge_bound_is_that_of_the_tokens(huge, mode, backend):
    cu_seqlens = make_cu_seqlens(LENGTHS)
    expected = run(cu_seqlens, mode, backend)
    assert_same(run(cu_seqlens, mode, backend, max_seqlen=huge), expected)
    assert_same(run(nsa.Packing(cu_seqlens, max_seqlen=huge), mode, backend), expected)
    q, k, _ = inputs()
    call = dict(config=CONFIGS[mode], backend=backend, cu_seqlens=cu_seqlens)
    assert torch.equal(
        nsa.select_blocks(q, k, max_seqlen=huge, **call), nsa.select_blocks(q, k, **call)
    )


MORE = [134, 8, 65, 194]
"""Keys of sequences with ``LENGTHS`` queries, which start at tiles."""


def test_keys_with_the_boundaries_of_the_queries_are_the_default():
    bounds = make_cu_seqlens(LENGTHS)
    given = nsa.Packing(bounds, bounds.clone(), max_seqlen=131, max_seqlen_k=150)
    assert given.cu_seqlens_k is given.cu_seqlens
    assert (given.lengths_k, given.max_seqlen_k) == (LENGTHS, 131)
    q = torch.zeros(TOTAL, 1, 1)
    found = check_boundaries(bounds, None, q, q, bounds.clone(), 150)
    assert found.cu_seqlens_k is found.cu_seqlens
    assert (found.lengths_k, found.max_seqlen_k) == (LENGTHS, 130)


@modes
def test_a_packing_of_queries_and_keys(mode):
    q, _, _ = inputs(requires_grad=False)
    _, k, v = make_inputs((sum(MORE),), 4, 2, 8, dtype=F64)
    bounds = make_cu_seqlens(LENGTHS), make_cu_seqlens(MORE)
    call = dict(config=CONFIGS[mode])
    expected = nsa.forward(q, k, v, cu_seqlens=bounds[0], cu_seqlens_k=bounds[1], **call)
    given = nsa.Packing(*bounds, max_seqlen_k=200)
    for bound in bounds:
        bound.zero_()
    assert (given.lengths, given.max_seqlen) == (LENGTHS, 130)
    assert (given.lengths_k, given.max_seqlen_k) == (MORE, 200)
    text = f"sequences=4, tokens={TOTAL}, max_seqlen=130, keys={sum(MORE)}, max_seqlen_k=200"
    assert repr(given) == f"Packing({text})"
    for same in (given, copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert torch.equal(nsa.forward(q, k, v, cu_seqlens=same, **call), expected)
        assert (same.lengths_k, same.max_seqlen_k) == (MORE, 200)
        own = same.cu_seqlens.detach(), same.cu_seqlens_k.detach()
        assert packing.find_packing(*own) is same
        assert packing.find_packing(own[0]) is None
        assert packing.find_packing(own[0], own[1].clone()) is None
        assert packing.find_packing(own[0], own[1][:-1]) is None
        assert packing.find_packing(*own[::-1]) is None


def test_a_layer_takes_no_keys_beside_its_tokens():
    layer = nsa.NativeSparseAttention(32, 4, 2, CONFIGS["token"])
    given = nsa.Packing(make_cu_seqlens(LENGTHS), make_cu_seqlens(MORE))
    with pytest.raises(ValueError, match=r"as many keys as queries .* for new tokens .* a cache"):
        layer(torch.randn(TOTAL, 32), given)


BAD = {
    "no tensor": ([0, 3], {}, TypeError, "cu_seqlens must be an int32 tensor, got list$"),
    "dtype": (torch.tensor([0, 3]), {}, TypeError, "must have dtype torch.int32, got torch.int64"),
    "shape": (torch.zeros(2, 2, dtype=torch.int32), {}, ValueError, r"\(S \+ 1,\), got \(2, 2\)"),
    "start": (torch.tensor([1, 3], dtype=torch.int32), {}, ValueError, "start at 0, got 1"),
    "order": (torch.tensor([0, 3, 2], dtype=torch.int32), {}, ValueError, "decrease, got 3 then 2"),
    "bound": (make_cu_seqlens([3]), {"max_seqlen": 2}, ValueError, "longest sequence, 3, got 2"),
    "no bound": (make_cu_seqlens([3]), {"max_seqlen": -1}, ValueError, "at least 0, got -1"),
    "kind": (make_cu_seqlens([3]), {"max_seqlen": 3.0}, TypeError, "must be an int, got 3.0"),
    "keys": (
        make_cu_seqlens([3, 4]),
        {"cu_seqlens_k": make_cu_seqlens([4, 3])},
        ValueError,
        "cu_seqlens must give .*got 4 queries and 3 keys in sequence 1; .*keys of all its tokens",
    ),
    "sequences of keys": (
        make_cu_seqlens([3, 4]),
        {"cu_seqlens_k": make_cu_seqlens([9])},
        ValueError,
        r"cu_seqlens_k must have the shape of cu_seqlens, \(3,\), .*got \(2,\)",
    ),
    "bound without keys": (
        make_cu_seqlens([3]),
        {"max_seqlen_k": 3},
        ValueError,
        "max_seqlen_k must be None without cu_seqlens_k, got 3",
    ),
    "bound of keys": (
        make_cu_seqlens([3]),
        {"cu_seqlens_k": make_cu_seqlens([5]), "max_seqlen_k": 4},
        ValueError,
        "max_seqlen_k must be at least the longest sequence, 5, got 4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_packing_checks_its_arguments(case):
    cu_seqlens, extras, error, message = BAD[case]
    with pytest.raises(error, match=message):
        nsa.Packing(cu_seqlens, **extras)


def test_a_packing_is_checked_against_every_call():
    q, k, v = inputs()
    given = nsa.Packing(make_cu_seqlens([3, 4]))
    with pytest.raises(ValueError, match=rf"cu_seqlens must end at the {TOTAL} tokens of q, got 7"):
        nsa.forward(q, k, v, cu_seqlens=given)
    given = nsa.Packing(make_cu_seqlens(LENGTHS))
    with pytest.raises(ValueError, match=r"max_seqlen must be at least the longest .* 130, got 7"):
        nsa.forward(q, k, v, cu_seqlens=given, max_seqlen=7)
    with pytest.raises(ValueError, match=r"must be on the device of q, meta, got cpu"):
        nsa.forward(*(x.to("meta") for x in (q, k, v)), cu_seqlens=given)
    assert repr(given) == f"Packing(sequences=4, tokens={TOTAL}, max_seqlen=130)"


def test_a_packing_cannot_be_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(packing, "is_capturing_on", lambda _: True)
    with pytest.raises(ValueError, match="before, not while a CUDA graph is captured"):
        nsa.Packing(make_cu_seqlens(LENGTHS))
    # Of boundaries on the GPU neither, wherever the copies are to be.
    monkeypatch.setattr(packing, "is_capturing_on", lambda device: device.type == "meta")
    with pytest.raises(ValueError, match="before, not while a CUDA graph is captured"):
        nsa.Packing(make_cu_seqlens(LENGTHS, "meta"), device="cpu")


@pytest.mark.parametrize("more", [(), (MORE,)], ids=["same", "more keys"])
def test_boundaries_for_another_device_are_read_where_they_are(more, monkeypatch):
    """The copies for the device have no values that the host could read."""
    read, bounds = [], [make_cu_seqlens(lengths) for lengths in (LENGTHS, *more)]
    both = packing.read_both
    monkeypatch.setattr(packing, "read_both", lambda *given: read.extend(given) or both(*given))
    given = nsa.Packing(*bounds, device="meta")
    assert read[0] is bounds[0]
    assert read[1] is bounds[-1]
    assert (given.lengths, given.lengths_k) == (LENGTHS, [*more, LENGTHS][0])
    assert {given.cu_seqlens.device.type, given.cu_seqlens_k.device.type} == {"meta"}
    assert given.rounded.cu_seqlens.is_meta
    # All tensors without memory have one address.
    for x in (given.cu_seqlens, given.rounded.cu_seqlens):
        assert packing.find_packing(torch.empty_like(x)) is None


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0), 0])
def test_a_packing_for_a_gpu_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # A number needs an accelerator, of which PyTorch for CPUs has none.
    with pytest.raises(ValueError, match=r"device must be .*(no GPU was found|accelerator)"):
        nsa.Packing(make_cu_seqlens(LENGTHS), device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_the_device_of_a_packing(device):
    cu_seqlens = make_cu_seqlens(LENGTHS)
    given = nsa.Packing(cu_seqlens, device=device)
    cu_seqlens.zero_()
    assert given.cu_seqlens.tolist() == make_cu_seqlens(LENGTHS).tolist()
    assert given.cu_seqlens.device.type == "cpu"
    for wrong in ("nope", 1.5):
        with pytest.raises(
            ValueError, match=f"device must be a torch.device or its name, got.*{wrong}"
        ):
            nsa.Packing(cu_seqlens, device=wrong)


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)])
def test_what_is_on_the_device_or_pinned_is_copied_too(device, monkeypatch):
    """PyTorch gives the tensor itself where "cuda" is where it is, or where it is pinned."""
    x = make_cu_seqlens(LENGTHS)
    sent = []

    def to(x, device, *, non_blocking=False, copy=False):
        sent.append(x.clone() if copy else x)
        return sent[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for target in (torch.device(device), torch.device("cpu", 0)):
        copied = packing._copy(x, target)
        assert copied is sent[-1]
        assert copied.data_ptr() != x.data_ptr()
        assert torch.equal(copied, x)


UNREAD = {
    "wrong heads": lambda x: x[:-1] if x.shape[0] < 10 else x[:, :-1],
    "wrong slots": lambda x: x[..., :-1],
    "wrong rank": lambda x: x[None],
    "past the longest": lambda x: torch.where(x >= 0, x + 1000, x),
    "descending": lambda x: x.flip(-1),
}


@pytest.fixture
def unread_with_a_bound(monkeypatch):
    """As on a GPU, where a bound spares reading."""
    for module in (boundaries, packing):
        monkeypatch.setattr(module, "waits_to_read", lambda _: True)


@both
@modes
@pytest.mark.usefixtures("unread_with_a_bound")
def test_block_indices_are_checked_where_lengths_are_not_read(mode, backend):
    q, k, v = inputs(requires_grad=False)
    call = dict(config=CONFIGS[mode], cu_seqlens=make_cu_seqlens(LENGTHS), backend=backend)
    blocks = nsa.select_blocks(q, k, **call)
    call["max_seqlen"] = max(LENGTHS)
    out = nsa.forward(q, k, v, block_indices=blocks, **call)
    assert torch.equal(out, nsa.forward(q, k, v, **call))
    assert torch.equal(nsa.select_blocks(q, k, **call), blocks)
    for spoil in UNREAD.values():
        with pytest.raises(ValueError, match=r"block_indices must"):
            nsa.forward(q, k, v, block_indices=spoil(blocks).contiguous(), **call)
    if mode == "tile":
        with pytest.raises(ValueError, match=r"block_indices must have shape"):
            nsa.forward(q, k, v, block_indices=blocks.repeat(1, 4, 1), **call)


@both
@modes
@pytest.mark.usefixtures("unread_with_a_bound")
def test_compressed_keys_are_counted_where_lengths_are_not_read(mode, backend):
    q, k, v = inputs(requires_grad=False)
    call = dict(
        config=CONFIGS[mode], cu_seqlens=make_cu_seqlens(LENGTHS), max_seqlen=130, backend=backend
    )
    for keys, values in ((11, 5), (300, 300)):
        compressed = (torch.zeros(keys, 2, 8, dtype=F64), torch.zeros(values, 2, 8, dtype=F64))
        with pytest.raises(ValueError, match=rf"as many blocks of keys.*, got {keys} and {values}"):
            nsa.forward(q, k, v, compressed_kv=compressed, **call)


def test_block_indices_are_waited_for_once():
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits.append(func is torch.ops.aten._local_scalar_dense.default)
            return func(*args, **(kwargs or {}))

    waits = []
    q, k, _ = inputs(requires_grad=False)
    call = dict(config=CONFIGS["token"], cu_seqlens=nsa.Packing(make_cu_seqlens(LENGTHS)))
    blocks = nsa.select_blocks(q, k, **call)
    found = check_boundaries(call["cu_seqlens"], None, q, q)
    problem = validation.check_qkv(q, (k,) * 3, (k,) * 3, call["config"], call["cu_seqlens"])
    with Waits():
        check_block_indices(blocks, found, q, problem)
    assert sum(waits) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_packing_can_be_copied_and_pickled(copied):
    given = nsa.Packing(make_cu_seqlens(LENGTHS), max_seqlen=150)
    expected = run(given, "tile", "fused")
    other = copied(given)
    # Custom ops find it too.
    assert packing.find_packing(other.cu_seqlens) is other
    assert (other.lengths, other.max_seqlen) == (LENGTHS, 150)
    assert other.cu_seqlens_k is other.cu_seqlens
    assert_same(run(other, "tile", "fused"), expected)


def test_threads_may_clear_what_a_packing_keeps(monkeypatch):
    """As when one keeps the last that there is room for, while another has just made its own."""
    monkeypatch.setattr(packing, "MAX_KEPT", 1)
    given = nsa.Packing(make_cu_seqlens([3, 4]))

    class Cleared(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if key == "own":
                given.keep("of another thread", list)

    given._kept = Cleared()
    assert given.keep("own", lambda: 1) == 1
    assert given.keep("own", lambda: None) is None
    assert "own" not in given._kept


def test_an_address_finds_its_packing_alone():
    given = nsa.Packing(make_cu_seqlens(LENGTHS))
    found = packing.find_packing(given.cu_seqlens.detach())
    assert found is given
    assert packing.find_packing(given.cu_seqlens[:-1]) is None
    assert packing.find_packing(given.cu_seqlens[:1].expand(5)) is None
    assert packing.find_packing(given.cu_seqlens.clone()) is None
    kept = given.cu_seqlens
    del given, found
    assert packing.find_packing(kept) is None
