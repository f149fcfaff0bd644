"""FA4's classes as they are, and stand-ins for compiled kernels: what these are called with."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from nsa.fused import fa4, fa4_call
from nsa.fused.fa4_variants import Mask, forward_tile
from nsa.fused.kernel_inputs import BlockLists, RowStatistics
from tests.helpers.poison import poisoned_memory
from tests.helpers.requirements import import_fused

fa4_closing = import_fused("nsa.fused.kernels.fa4_closing")
fa4_heads = import_fused("nsa.fused.kernels.fa4_heads")
fa4_sm90 = import_fused("nsa.fused.kernels.fa4_sm90")
head_rows = import_fused("nsa.fused.kernels.head_rows")
padded_rows = import_fused("nsa.fused.kernels.padded_rows")
cutlass = import_fused("cutlass")
cute = import_fused("cutlass.cute")

ROWS, HEADS, KV_HEADS, DIM = 256, 8, 2, 128
# What the tests below call each class.
CLASSES = {
    "FlashAttentionForwardSm90": "Forward",
    "TallForward": "Forward",
    "ClosingForward": "Forward",
    "ForwardOfBlocks": "Forward",
    "FlashAttentionBackwardSm90": "Backward",
    "BackwardThroughHeads": "Backward",
    "FlashAttentionBackwardPostprocess": "Postprocess",
    "ConvertKeySums": "ConvertKeys",
    "CuSeqlensToBlocksKernel": "TileStarts",
}


class Kernel:
    """A compiled kernel that writes nothing, and keeps what it is called with."""

    def __init__(self, kernel, compiled_for, calls):
        self.kernel, self.compiled_for, self.calls = kernel, compiled_for, calls

    def __call__(self, *arguments):
        self.calls.append((self, arguments))

    def named(self, arguments) -> dict:
        _, *names, _ = inspect.signature(type(self.kernel).__call__).parameters
        return dict(zip(names, arguments, strict=True))


@pytest.fixture(params=[False, True], ids=["heads alone", "heads together"])
def together(request, monkeypatch):
    """Whether a CTA of the backward may pass through several heads, of few keys too."""
    if request.param:
        monkeypatch.setattr(fa4_call, "FEWEST_CTAS", 0)
    return request.param


@pytest.fixture
def calls(monkeypatch, together):
    """(kernel, arguments) of each call; the classes are built as far as to take their options."""
    calls = []
    for name, called in CLASSES.items():
        module = fa4_closing if name == "ClosingForward" else fa4_sm90
        original = getattr(module, name)

        def build(self, *args, original=original, **options):
            inspect.signature(original).bind(*args, **options)

        stand_in = type(called, (original,), {"__init__": build})
        monkeypatch.setattr(module, name, stand_in)
    for module in (fa4_sm90, fa4_closing, padded_rows):
        for name, function in vars(module).items():
            if hasattr(function, "cache_info") and name != "_parameters":
                monkeypatch.setattr(module, name, inspect.unwrap(function))
        monkeypatch.setattr(
            module, "compile_kernel", lambda kernel, *arguments: Kernel(kernel, arguments, calls)
        )
    # Tensors are on a CPU.
    monkeypatch.setattr(head_rows, "check_float", lambda *_: None)
    monkeypatch.setattr(fa4_closing, "sm_count", lambda _: 4)
    return calls


def make(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def statistics_like(lse: torch.Tensor) -> RowStatistics:
    return RowStatistics(*(torch.zeros_like(lse) for _ in range(2)))


def window(group=4, value_dim=DIM, **options):
    q, k = make(1, ROWS, HEADS, DIM), make(1, 100, HEADS // group, DIM)
    v = make(1, 100, HEADS // group, value_dim)
    mask = dict(scale=0.1, causal=True, window_size=(63, None))
    out, lse = fa4.dense_forward(q, k, v, **mask)
    return out, lse, *fa4.dense_backward(out, q, k, v, statistics_like(lse), **mask, **options)


def window_of_every_head():
    return window(1)


def window_with_other_values():
    return window(1, 64)


def closing(group=4, form="weight", keep=True):
    q, k = make(2, ROWS, HEADS, DIM), make(2, 100, HEADS // group, DIM)
    gates = make(2, ROWS, HEADS, 3) if form == "gates" else None
    weight = make(HEADS, 3, DIM) if form == "weight" else None
    others, mask = (make(*q.shape), make(*q.shape)), dict(causal=True, window_size=(63, None))
    return fa4.closing_forward(q, k, k, others, gates, weight, scale=0.1, keep=keep, **mask)


def closing_of_every_head():
    return closing(1, "gates")


def closing_without_output():
    out, o_win, lse = closing(8, "mean", keep=False)
    assert o_win is None
    return out, lse


def block_ends():
    q, k = make(2, ROWS, HEADS, DIM), make(2, 4, KV_HEADS, DIM)
    mask = dict(scale=0.1, causal=False, window_size=(None, None), block_ends=(64, 63))
    out, lse = fa4.dense_forward(q, k, k, **mask)
    return out, lse, *fa4.dense_backward(out, q, k, k, statistics_like(lse), **mask)


def into_slices():
    """As folding has it: permuted views of what is written, a batch of heads."""
    q, out, dq = (
        make(ROWS, HEADS, DIM).unflatten(0, (-1, 64)).permute(2, 0, 1, 3) for _ in range(3)
    )
    k = make(HEADS, ROWS // 64, 1, DIM)
    lse = make(HEADS, ROWS, dtype=torch.float32).unflatten(1, (-1, 64)).mT
    mask = dict(scale=0.2, causal=True, window_size=(None, None))
    fa4.dense_forward(q, k, k, out=out, lse=lse, **mask)
    return out, lse, *fa4.dense_backward(out, q, k, k, statistics_like(lse), dq=dq, **mask)


def of_blocks(group=4):
    q, k = make(2, ROWS, HEADS, DIM), make(2, 100, HEADS // group, DIM)
    return fa4.forward_of_blocks(q, k, k, scale=0.1, block_ends=(16, 31))


def of_blocks_of_every_head():
    return of_blocks(1)


def packed(group=4, sequences=3, **options):
    q, k = make(ROWS, HEADS, DIM), make(ROWS // 2, HEADS // group, DIM)
    bounds = [make(sequences + 1, dtype=torch.int32) for _ in range(2)]
    call = dict(scale=0.1, causal=False, window_size=(None, 1))
    call |= dict(cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])
    out, lse = fa4.dense_forward(q, k, k, **call)
    return out, lse, *fa4.dense_backward(out, q, k, k, statistics_like(lse), **call, **options)


def packed_of_every_head():
    return packed(1)


def deterministic():
    return window(deterministic=True)


def deterministic_packed():
    return packed(4, 300, deterministic=True)


def deterministic_packed_of_every_head():
    return packed(1, deterministic=True)


def packed_many():
    return packed(4, 300)


def packed_many_of_every_head():
    return packed(1, 300)


def sparse(query_block=128, key_block=128, dim=DIM, **mask):
    q, k = make(1, ROWS, HEADS, dim), make(1, ROWS, KV_HEADS, dim)
    rows, columns = -(-ROWS // query_block), -(-ROWS // key_block)
    lists = [
        BlockLists(
            *(make(1, HEADS, n, dtype=torch.int32), make(1, HEADS, n, 2, dtype=torch.int32)),
            *(make(1, HEADS, n, dtype=torch.int32), make(1, HEADS, n, 1, dtype=torch.int32)),
            *(query_block, key_block),
        )
        for n in (rows, columns)
    ]
    out, lse = fa4.sparse_forward(q, k, k, lists[0], scale=0.1, **mask)
    statistics = statistics_like(lse)
    return out, lse, *fa4.sparse_backward(out, q, k, k, statistics, lists[1], scale=0.1, **mask)


def sparse_causal():
    return sparse(causal=True)


def sparse_limit():
    return sparse(192, causal=False, key_limit=make(ROWS, dtype=torch.int32))


def sparse_wide():
    return sparse(256, 64, 256, causal=True)


CALLS = [
    *(window, window_of_every_head, window_with_other_values, block_ends, into_slices),
    *(of_blocks, of_blocks_of_every_head),
    *(packed, packed_of_every_head, packed_many, packed_many_of_every_head),
    *(sparse_causal, sparse_limit, sparse_wide),
]


CLOSING = [closing, closing_of_every_head, closing_without_output]
DETERMINISTIC = [deterministic, deterministic_packed, deterministic_packed_of_every_head]


@pytest.mark.parametrize("call", CALLS + CLOSING + DETERMINISTIC)
def test_kernels_get_what_they_are_compiled_for(call, calls):
    call()
    for kernel, arguments in calls:
        sizes = {}
        for name, compiled in kernel.named(kernel.compiled_for).items():
            assert_fits(compiled, kernel.named(arguments)[name], sizes, name)


def assert_fits(compiled, actual, sizes: dict, name: str):
    """Whether an argument is of the kind of the compile-time one; equal symbols are equal sizes."""
    if isinstance(compiled, (tuple, list)):
        assert type(actual) is type(compiled), name
        for one, other in zip(compiled, actual, strict=True):
            assert_fits(one, other, sizes, name)
    elif compiled is None:
        assert actual is None, name
    elif isinstance(compiled, (cutlass.Float32, float)):
        assert isinstance(actual, float), name
    elif isinstance(compiled, (cutlass.Int32, cutlass.Int64)):
        assert isinstance(actual, int), name
    else:
        assert fa4_sm90.CUTE_DTYPES[actual.dtype] is compiled.element_type, name
        assert not actual.requires_grad, name
        assert len(actual.shape) == len(compiled.shape), name
        for size, symbol in zip(actual.shape, compiled.shape, strict=True):
            assert sizes.setdefault(id(symbol), size) == size, name
        for size, stride, known in zip(actual.shape, actual.stride(), compiled.stride, strict=True):
            fits = stride == known if isinstance(known, int) else stride % known.divisibility == 0
            assert fits or size == 1, name


@pytest.mark.parametrize("call", CALLS)
def test_kernels_of_a_call_write_and_read_the_same_memory(call, calls):
    out, lse, *grads = call()
    place = {}
    for kernel, arguments in calls:
        named = kernel.named(arguments)
        place.setdefault(type(kernel.kernel).__name__, []).append(
            {k: x.data_ptr() for k, x in named.items() if torch.is_tensor(x)}
        )
    (forward,) = place["Forward"]
    assert (forward["mO"], forward["mLSE"]) == (out.data_ptr(), lse.data_ptr())
    if not grads:
        return
    (main,) = place["Backward"]
    (queries,) = place["Postprocess"]
    for padded in place.get("PadStatistics", ()):
        assert padded["mPaddedLse"] == main["mLSE"]
        assert padded["mPaddedDelta"] == main["mdPsum"]
    assert main["mdQaccum"] == queries["mdQaccum"]
    given = [main["mdK"], main["mdV"]]
    for both in place.get("ConvertKeys", ()):
        assert [both["mdKaccum"], both["mdVaccum"]] == given
        given = [both["mdK"], both["mdV"]]
    assert [queries["mdQ"], *given] == [x.data_ptr() for x in grads]


@pytest.mark.parametrize("keep", [False, True])
def test_the_kernel_that_adds_up_reads_and_writes_what_the_caller_has(keep, calls):
    out, o_win, lse = closing(keep=keep)
    ((kernel, arguments),) = calls
    named = kernel.named(arguments)
    assert named["mO"] is out
    assert named["mLSE"] is lse
    branches = named["branches"]
    assert branches.heads == HEADS
    # Of 2 sequences and 2 KV heads, 6 tiles each: 4 CTAs at a time.
    assert branches.ctas == 4
    assert branches.strides == (HEADS * DIM, HEADS * DIM)
    assert (branches.o_win is None) == (o_win is None) == (not keep)
    assert not keep or branches.o_win.data_ptr() == o_win.data_ptr()


@pytest.mark.parametrize("processors", [4, 1000])
def test_ctas_share_the_tiles_of_all_sequences_and_heads(processors, calls, monkeypatch):
    monkeypatch.setattr(fa4_closing, "sm_count", lambda _: processors)
    tiles = []
    for form, group in (("weight", 4), ("gates", 1)):
        # 192 rows, each of a group's four heads of a token, or 128 of one head.
        closing(group, form)
        ((_, arguments),) = calls
        tiles.append(arguments[-1].ctas)
        calls.clear()
    assert tiles == ([4, 4] if processors == 4 else [2 * 2 * 6, 2 * 8 * 2])


@pytest.mark.parametrize("tiles", [1, 3, 131, 132, 133, 1368, 2000, 21846, 10**6])
def test_ctas_of_several_tiles_do_not_make_longer_waves(tiles):
    ctas = fa4_closing.closing_ctas(tiles, 132)
    part = -(-tiles // ctas)
    assert -(-tiles // part) == ctas
    # Nor more of them than a fortieth, where there are enough to choose from.
    waves = -(-tiles // 132)
    assert waves <= -(-ctas // 132) * part <= max(waves, -(-waves * 41 // 40))


def test_two_kernels_add_up_where_shared_memory_has_no_room(calls, monkeypatch):
    """Or where TMA cannot load the rows of so many heads."""
    added = []
    monkeypatch.setattr(fa4.kernel_calls, "gating_forward", lambda *x: added.append(x) or x[-1])
    for heads, dim in ((4, 256), (5, DIM)):
        q, k = make(1, ROWS, heads, dim), make(1, ROWS, 1, dim)
        out, mask = make(*q.shape), dict(causal=True, window_size=(63, None))
        call = dict(scale=0.1, keep=True, out=out, **mask)
        total, o_win, lse = fa4.closing_forward(q, k, k, (q, q), None, None, **call)
        assert total is out
        kernel, arguments = calls[-1]
        named = kernel.named(arguments)
        assert "branches" not in named
        assert named["mO"] is o_win
        assert named["mLSE"] is lse
        assert added[-1][2] is o_win
    assert len(added) == len(calls) == 2


@pytest.mark.parametrize("call", [packed_many, packed_many_of_every_head])
def test_many_sequences_have_tables_of_their_tiles(call, calls):
    """Of the tiles that the kernels have which look there."""
    call()
    tables = {}
    for kernel, arguments in calls:
        named = kernel.named(arguments)
        if "mCuBlocks" in named:
            tables[named["mCuBlocks"].data_ptr()] = named["mCuSeqlens"].data_ptr()
    named = [k.named(x) for k, x in calls]
    looked_up = [x["mCuTotalMBlocks"] for x in named if "mCuTotalMBlocks" in x]
    assert {x.data_ptr() for x in looked_up} == set(tables)
    # One of the forward, one of queries and one of keys in backward.
    assert len(tables) == 3
    assert len(set(tables.values())) == 2


@pytest.mark.parametrize("call", CALLS + CLOSING)
def test_poison_reaches_every_output(call, calls):
    """These kernels write nothing, so a result without poison would be memory that it misses."""
    if call is into_slices:
        pytest.skip("its results are given")
    with poisoned_memory():
        results = call()
    for x in results:
        assert x.isnan().all()


def test_sums_that_heads_add_to_start_at_zero(calls, together):
    with poisoned_memory():
        window()
    (main,) = [k.named(x) for k, x in calls if "mdPsum" in k.named(x)]
    assert not main["mdQaccum"].any()
    # One CTA has all heads of a KV head, or else each adds to float32 sums.
    assert main["mdK"].dtype is (torch.bfloat16 if together else torch.float32)
    assert together or not any(main[name].any() for name in ("mdK", "mdV"))


def test_heads_lie_side_by_side_for_a_cta_that_passes_through_them(calls, together):
    into_slices()
    (main,) = [k.named(x) for k, x in calls if "mdPsum" in k.named(x)]
    heads = 8 if together else 64
    assert {main[name].shape[-2] for name in ("mQ", "mdO")} == {heads}
    assert {main[name].shape[1] for name in ("mLSE", "mdPsum", "mdQaccum")} == {heads}
    extent = 7 * HEADS * DIM + DIM if together else DIM
    assert main["mQ"].shape[-1] == extent


@pytest.mark.parametrize("call", DETERMINISTIC)
def test_semaphores_start_at_zero_one_for_each_tile_of_the_sums(call, calls, together):
    with poisoned_memory():
        call()
    named = next(k.named(x) for k, x in calls if "mdPsum" in k.named(x))
    tiles = {"mdQ": named["mdQaccum"]}
    # Of a batch's window, one CTA may have all heads of a KV head.
    through = HEADS // KV_HEADS if together and call is deterministic else 1
    if call is deterministic_packed_of_every_head or through > 1:
        assert named["mdK_semaphore"] is named["mdV_semaphore"] is None
    else:
        tiles |= {x: named[x] for x in ("mdK", "mdV")}
    for name, sums in tiles.items():
        semaphores = named[f"{name}_semaphore"]
        assert not semaphores.any()
        _, heads, count, _ = semaphores.shape
        assert heads == sums.shape[-2] * through
        # The last head of a set ends a tile after it begins.
        extent = sums.shape[-1] + (count - 1) * 64 * DIM if through > 1 else sums.shape[-1]
        assert extent % (through * count * 64 * DIM) == 0


def test_listed_tiles_are_tall_where_both_halves_have_one_list(calls):
    q, k = make(1, ROWS, HEADS, DIM), make(1, ROWS, KV_HEADS, DIM)
    for query_block, queries in ((256, 256), (128, 128)):
        tiles = ROWS // query_block
        lists = [make(1, HEADS, tiles, *size, dtype=torch.int32) for size in ((), (2,))]
        lists = BlockLists(*lists, None, None, query_block, 64)
        fa4.sparse_forward(q, k, k, lists, scale=0.1, causal=True)
        variant = fa4_call.Call(
            *(q, k, k, 0.1, Mask(causal=True)), blocks=(query_block, 64)
        ).variant()
        assert forward_tile(variant) == (queries, 64)
    assert len({type(kernel.kernel) for kernel, _ in calls}) == 2


@pytest.mark.parametrize("by_head", [False, True])
def test_each_tile_of_each_head_is_met_once(by_head):
    block_info = SimpleNamespace(get_m_block_min_max=lambda seqlen, n_block: (3, 8))
    tiles = fa4_heads._Tiles(block_info, 4, by_head)
    first, count = tiles.get_m_block_min_max(None, 0)
    met = [tiles.at(None, 0, index) for index in range(first, count)]
    assert sorted(met) == [(tile, head) for tile in range(3, 8) for head in range(4)]
    if by_head:
        assert met[:5] == [(tile, 0) for tile in range(3, 8)]
    else:
        assert met[:4] == [(7, head) for head in range(4)]


def test_a_name_that_a_class_lost_is_refused():
    class Renamed:
        def __call__(self, mQ, mKeys, stream=None):
            pass

    assert fa4_sm90.ordered(Renamed, mKeys=1) == [None, 1]
    with pytest.raises(TypeError, match="Renamed takes mQ, mKeys, and got mK too"):
        fa4_sm90.ordered(Renamed, mQ=0, mK=1)


def test_a_stream_must_come_last():
    class Moved:
        def __call__(self, stream, mQ):
            pass

    with pytest.raises(TypeError, match="takes mQ last"):
        fa4_sm90.ordered(Moved, mQ=0)
