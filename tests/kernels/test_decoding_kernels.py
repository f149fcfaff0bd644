"""On the GPU: each kernel of decoding by itself, against its emulation in float64."""

import math

import pytest
import torch

from nsa.fused import decode_calls
from nsa.fused.decode_inputs import (
    NO_REFERENCE,
    DecodeRule,
    Parts,
    Pool,
    Records,
    TileLists,
    TileRule,
)
from nsa.fused.decoding import tile_share
from tests.helpers import emulated_decoding as emulated
from tests.helpers.decode_cases import Form, make_state
from tests.helpers.gpu_cases import gpu_test

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

BF16, FP16 = torch.bfloat16, torch.float16
PAPER = DecodeRule(32, 16, 64)
FORMS = [
    Form(BF16, 128, 128, 16, PAPER),
    Form(FP16, 64, 64, 3, DecodeRule(16, 16, 32)),
    Form(BF16, 96, 96, 32, DecodeRule(24, 8, 64)),
    Form(FP16, 192, 128, 1, DecodeRule(32, 32, 32)),
    Form(BF16, 256, 256, 4, DecodeRule(8, 4, 64)),
]
TILE_FORMS = [
    Form(BF16, 128, 128, 4, DecodeRule(64, 64, 64)),
    Form(FP16, 96, 64, 3, DecodeRule(16, 16, 64)),
]
# Lengths and new tokens: no key, a first block, whole tiles, and parts of pages.
CASES = [
    ([0, 1, 31, 700, 1023], 1),
    ([0, 40, 1090, 5, 512], [8, 3, 5, 0, 1]),
]
PAIRS = [(FORMS[0], CASES[0]), (FORMS[0], CASES[1]), (FORMS[1], CASES[1])]
PAIRS += [(FORMS[2], CASES[1]), (FORMS[3], CASES[0]), (FORMS[4], CASES[0])]
# 64 query rows of a KV head.
WIDE = [
    (FORMS[0], ([0, 40, 1090, 5, 1200], [4, 3, 2, 0, 1])),
    (Form(FP16, 192, 128, 16, DecodeRule(64, 4, 64)), ([300, 40], 3)),
    (Form(FP16, 64, 64, 12, DecodeRule(16, 16, 32)), ([1300, 40, 0], 5)),
]
SCALE = 0.1
COUNT = 12


def tensors(x, device, dtype=None):
    """A tuple of tensors on a device; floats in ``dtype``."""
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        return x.to(device, dtype if x.is_floating_point() else None)
    return type(x)(*(tensors(y, device, dtype) for y in x))


def wide(state):
    """The state in float64, for the emulations."""
    double = [tensors(x, "cpu", torch.float64) for x in (state.pool, state.compressed, state.q)]
    return state._replace(pool=double[0], compressed=double[1], q=double[2])


def rounding(dtype) -> float:
    """What rounding exponentials to 16 bits does to a mean of values, which are 5 at most."""
    return 5 * torch.finfo(dtype).eps / 2


def append(kernels, state, rule):
    overflowed = torch.zeros((), dtype=torch.bool, device=state.k.device)
    schedule = kernels.decode_append(
        *(state.k, state.v, state.pool, state.compressed, state.table, state.lengths),
        *(overflowed, state.max_length, state.cu_seqlens, state.shape, rule),
    )
    return schedule, bool(overflowed)


def compress(kernels, state, schedule, rule, after_append=False):
    return kernels.decode_compressed(
        *(state.q, state.compressed, state.table, schedule, state.cu_seqlens, state.shape),
        *(rule, SCALE, True, state.lengths if after_append else None, state.max_length),
    )


def written_parts(actual, exact, atol):
    """Compare the parts that the emulation wrote: outputs over totals, and logarithms of totals."""
    written = exact.total.isfinite()
    assert written.any()
    empty = exact.reference == NO_REFERENCE
    reference = actual.reference.cpu()
    assert torch.equal(reference[written] == NO_REFERENCE, empty[written])
    some = written & ~empty
    total, out = (x.cpu().double()[some] for x in (actual.total, actual.out))
    assert (total > 0).all()
    torch.testing.assert_close(
        total.log2() + reference[some], exact.total[some].log2() + exact.reference[some],
        rtol=0, atol=1e-4,
    )  # fmt: skip
    torch.testing.assert_close(
        out / total[:, None], exact.out[some] / exact.total[some, None], rtol=0, atol=atol
    )


@pytest.mark.parametrize(("form", "case"), PAIRS, ids=str)
def test_append(form, case):
    state = make_state(form, *case)
    on_gpu = state.to("cuda")
    # A table that names no page for the end of a sequence, and one that is too short.
    on_gpu.table[3, -1] = state.table[3, -1] = 10**6
    schedule, overflowed = append(decode_calls, on_gpu, form.rule)
    expected, expected_overflow = append(emulated, state, form.rule)
    assert overflowed == expected_overflow
    for actual, wanted in zip(
        (*on_gpu.pool, *on_gpu.compressed), (*state.pool, *state.compressed), strict=True
    ):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(schedule.starts.cpu(), expected.starts)
    assert torch.equal(schedule.ends.cpu(), expected.ends)
    assert torch.equal(schedule.tiles[1:].cpu(), expected.tiles[1:])
    shape, total = state.shape, expected.tiles[-1] * state.shape.sequence_units
    assert schedule.tiles[0].item() == tile_share(total, shape.ctas, shape.whole_units).item()


@pytest.mark.parametrize("case", [([120, 3, 65], [8, 8, 2]), ([120, 3], 4)], ids=str)
def test_append_drops_tokens_without_a_place(case):
    form = FORMS[0]
    state = make_state(form, *case)._replace(max_length=124)
    state.table[1] = -1
    on_gpu = state.to("cuda")
    schedule, overflowed = append(decode_calls, on_gpu, form.rule)
    expected, expected_overflow = append(emulated, state, form.rule)
    assert overflowed
    assert expected_overflow
    assert torch.equal(schedule.ends.cpu(), expected.ends)
    for actual, wanted in zip(
        (*on_gpu.pool, *on_gpu.compressed), (*state.pool, *state.compressed), strict=True
    ):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("after_append", [False, True], ids=["given", "after append"])
@pytest.mark.parametrize(
    ("form", "case", "page_blocks"),
    [*((*pair, 2) for pair in PAIRS + WIDE), (*PAIRS[0], 16), (*WIDE[0], 16)],
    ids=str,
)
def test_compressed(form, case, page_blocks, after_append):
    """In pages of parts of a tile, and in those of a tile; with a schedule, or its own."""
    check_compressed(make_state(form, *case, page_blocks=page_blocks), form, after_append)


@pytest.mark.parametrize("page_blocks", [2, 16])
def test_compressed_of_many_tiles(page_blocks):
    """So that each of the warpgroups that take tiles in turn has several."""
    form = FORMS[0]
    state = make_state(form, [9000, 700, 3000], 4, kv_heads=1, ctas=2, page_blocks=page_blocks)
    check_compressed(state, form, True)


def check_compressed(state, form, after_append):
    on_gpu = state.to("cuda")
    schedule, _ = append(emulated, state, form.rule)
    if after_append:
        made, _ = append(decode_calls, on_gpu, form.rule)
        schedule = tensors(made, "cpu")
    else:
        on_gpu, made = state.to("cuda"), tensors(schedule, "cuda")
    parts, records = compress(decode_calls, on_gpu, made, form.rule, after_append)
    exact, exact_records = compress(emulated, wide(state), schedule, form.rule)
    written_parts(parts, exact, rounding(form.dtype))
    records, exact_records = (
        emulated.records_of_rows(x, form.rule, state.shape) for x in (records, exact_records)
    )
    for name in ("sums", "carried"):
        actual, wanted = (getattr(x, name) for x in (records, exact_records))
        if wanted is None:
            assert actual is None
            continue
        repeats = wanted.shape[-1] // records.reference.shape[-1]
        references = [
            x.reference.cpu().repeat_interleave(repeats, -1) for x in (records, exact_records)
        ]
        some = wanted.isfinite() & (references[1] != NO_REFERENCE)
        assert some.any()
        factor = 2.0 ** (references[0] - references[1])[some]
        torch.testing.assert_close(
            actual.cpu().double()[some] * factor, wanted[some], rtol=1e-4, atol=1e-6
        )
        # Groups that a token does not see count nothing.
        unseen = wanted.isfinite() & (references[1] == NO_REFERENCE)
        assert (actual.cpu()[unseen] == 0).all()


def draw_gates(state, dtype):
    """One branch of each token and head."""
    shape = (*state.q.shape[:2], 3)
    return torch.nn.functional.one_hot(torch.randint(3, shape[:2]), 3).to(dtype)


def finish(kernels, records, arguments):
    """The step's end where each list has a CTA, or several."""
    return kernels.decode_finish(records=records, **arguments)


def unite(kernels, records, arguments):
    """The step's end where a CTA has all tokens of a unit."""
    selecting = "parts", "schedule", "cu_seqlens", "shape", "rule", "lists"
    forced = {name: arguments.pop(name) for name in ("num_initial", "num_local")}
    if records is not None:
        given = {name: arguments[name] for name in selecting}
        kernels.decode_select(records=records, **given, **forced)
    for name in ("rings", "floors", "cluster", "of_tokens"):
        del arguments[name]
    return kernels.decode_units(**arguments)


def check_finish(state, schedule, results, rule, lists, floors=None, end=finish, **options):
    """The step's end by the kernel is that by the emulation: outputs, lists, lengths and floors.

    ``results`` are parts and records of the compressed branch in float64.
    """
    given = dict(
        rings=None, num_initial=1, num_local=2, window=200, scale=SCALE, gates=None, weight=None,
        floors=None, cluster=1, of_tokens=False,
    ) | options  # fmt: skip
    found = []
    for kernels, device in ((emulated, "cpu"), (decode_calls, "cuda")):
        here, floats = (wide(state), torch.float64) if device == "cpu" else (state.to(device), None)
        single = [tensors(x, device, torch.float32) for x in results]
        parts, records = single if floats is None else [tensors(x, device, floats) for x in single]
        own = {
            name: x if isinstance(x, int | float) else tensors(x, device, floats)
            for name, x in given.items()
        }
        if floors is not None:
            own["floors"] = floors.to(device, copy=True)
        if isinstance(lists, TileLists):
            made = lists._replace(blocks=lists.blocks.to(device))
        else:
            made = lists.to(device, copy=True)
        lengths = state.lengths.to(device, copy=True)
        common = dict(
            parts=parts, schedule=tensors(schedule, device), cu_seqlens=here.cu_seqlens,
            shape=here.shape, rule=rule, lists=made,
        )  # fmt: skip
        own |= common | dict(q=here.q, pool=here.pool, table=here.table, lengths=lengths)
        out = end(kernels, records, own)
        blocks = made.blocks if isinstance(made, TileLists) else made
        written = (lengths, blocks, *([own["floors"]] if floors is not None else []))
        found.append((out.cpu().double(), [x.cpu() for x in written]))
    (exact, expected), (actual, written) = found
    assert torch.equal(expected[0], schedule.ends)
    for x, y in zip(written, expected, strict=True):
        assert torch.equal(x, y)
    # Exponentials, and then the output, are rounded.
    torch.testing.assert_close(actual, exact, rtol=0, atol=2 * rounding(state.q.dtype))


SELECTED = [
    # CTAs of a list, or of as many tokens, and blocks.
    (*PAIRS[1], 4, False, 3),
    (*PAIRS[1], 1, False, 40),
    (*PAIRS[1], 2, True, COUNT),
    (*PAIRS[2], 8, False, COUNT),
    (*PAIRS[2], 4, True, COUNT),
    (*PAIRS[3], 2, False, COUNT),
    (*PAIRS[3], 2, True, COUNT),
    (*PAIRS[4], 2, False, 40),
    (*PAIRS[5], 1, False, 3),
    (*PAIRS[5], 4, True, 3),
    (*WIDE[0], 1, False, COUNT),
    (*WIDE[0], 2, True, COUNT),
    (*WIDE[1], 2, True, COUNT),
    (*WIDE[1], 4, False, COUNT),
    (*WIDE[2], 2, False, COUNT),
]


@pytest.mark.parametrize(("form", "case", "cluster", "of_tokens", "count"), SELECTED, ids=str)
def test_select(form, case, cluster, of_tokens, count):
    state = make_state(form, *case)
    schedule, _ = append(emulated, state, form.rule)
    # Repeated keys, so that blocks tie.
    for x in state.compressed:
        x[:, 1::2] = torch.where(x[:, ::2].isnan(), x[:, 1::2], x[:, ::2])
    results = compress(emulated, wide(state), schedule, form.rule)
    lists = torch.full((state.q.shape[0], state.shape.kv_heads, count), -7, dtype=torch.int32)
    gates = draw_gates(state, form.dtype)
    check_finish(
        state, schedule, results, form.rule, lists, gates=gates, cluster=cluster,
        of_tokens=of_tokens,
    )  # fmt: skip


UNITED = [
    # And blocks of a list, and how gates are given.
    (*WIDE[0], COUNT, "gates"),
    (*WIDE[0], 32, "weight"),
    (Form(FP16, 64, 64, 8, DecodeRule(16, 16, 64)), CASES[1], 16, "weight"),
    (Form(BF16, 96, 96, 12, DecodeRule(32, 16, 128)), ([300, 40, 0, 127], 5), 3, "mean"),
    # Heads that warps do not share evenly, and whose records share lines of memory.
    (Form(FP16, 64, 64, 9, PAPER), ([1300, 40], 5), 20, "mean"),
    (Form(BF16, 128, 64, 32, PAPER), ([3000, 62], 2), 40, "gates"),
]


@pytest.mark.parametrize("given", [False, True], ids=["selected", "given"])
@pytest.mark.parametrize(("form", "case", "count", "gating"), UNITED, ids=str)
def test_units(form, case, count, gating, given):
    """Tokens whose lists have blocks in common and others, and sequences with fewer tokens."""
    state = make_state(form, *case)
    schedule, _ = append(emulated, state, form.rule)
    parts, records = compress(emulated, wide(state), schedule, form.rule)
    lists = torch.full((state.q.shape[0], state.shape.kv_heads, count), -7, dtype=torch.int32)
    if given:
        lists, records = make_lists(state, schedule, form.rule), None
    options = {}
    if gating == "gates":
        options["gates"] = draw_gates(state, form.dtype)
    if gating == "weight":
        options["weight"] = torch.randn(state.q.shape[1], 3, form.head_dim).to(form.dtype)
        options["weight"] *= form.head_dim**-0.5
    check_finish(state, schedule, (parts, records), form.rule, lists, end=unite, **options)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_select_among_many(cluster):
    """More blocks than a CTA scores at a time; scores of few values, so that many tie."""
    check_select_among_many(FORMS[3], 1, 16, cluster=cluster)


def test_select_among_many_for_units():
    form = Form(BF16, 64, 64, 16, DecodeRule(64, 64, 64))
    check_select_among_many(form, 4, 16, length=100_000, end=unite)


def check_select_among_many(form, tokens, count, length=18000, **options):
    state = make_state(form, [length, 200], tokens, kv_heads=1)
    keys = torch.randn(5, form.head_dim).to(form.dtype)
    state.compressed.k.copy_(keys[torch.randint(5, state.compressed.k.shape[:3])])
    schedule, _ = append(emulated, state, form.rule)
    results = compress(emulated, wide(state), schedule, form.rule)
    lists = torch.full((2 * tokens, 1, count), -7, dtype=torch.int32)
    check_finish(state, schedule, results, form.rule, lists, **options)


ATTENDED = [
    # CTAs of a list, also more than there are tiles, or of tokens; rings with keys of the window's
    # own.
    (*PAIRS[0], 1, False, None),
    (*PAIRS[1], 4, False, None),
    (*PAIRS[1], 2, True, 256),
    (*PAIRS[2], 8, False, 256),
    (*PAIRS[3], 2, False, 256),
    (*PAIRS[4], 1, False, None),
    (*PAIRS[5], 4, False, None),
]


@pytest.mark.parametrize(("form", "case", "cluster", "of_tokens", "ring"), ATTENDED, ids=str)
def test_attend(form, case, cluster, of_tokens, ring):
    state = make_state(form, *case)
    schedule, _ = append(emulated, state, form.rule)
    parts, _ = compress(emulated, wide(state), schedule, form.rule)
    rings = None
    if ring is not None:
        rings = Pool(*(torch.randn(5, ring, *x.shape[2:]).to(form.dtype) for x in state.pool))
    check_finish(
        state, schedule, (parts, None), form.rule, make_lists(state, schedule, form.rule),
        rings=rings, gates=draw_gates(state, form.dtype), cluster=cluster, of_tokens=of_tokens,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "case", "splits"), [(*PAIRS[1], 3), (*PAIRS[2], 16), (*PAIRS[5], 1)], ids=str
)
def test_attend_alone(form, case, splits):
    """The parts of lists without a step, with more splits than there are tiles."""
    state = make_state(form, *case)
    schedule, _ = append(emulated, state, form.rule)
    indices = make_lists(state, schedule, form.rule)
    results = []
    for kernels, here in ((emulated, wide(state)), (decode_calls, state.to("cuda"))):
        device = here.q.device
        parts = kernels.decode_attend(
            here.q, here.pool, here.table, tensors(schedule, device), here.cu_seqlens,
            indices.to(device), here.shape, form.rule.select_size, SCALE, splits,
        )  # fmt: skip
        results.append(merged(tensors(parts, "cpu", torch.float64), state.q.shape[0], splits))
    (exact, exact_total), (actual, total) = results
    torch.testing.assert_close(total, exact_total, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual, exact, rtol=0, atol=rounding(form.dtype))


def merged(parts: Parts, tokens: int, splits: int):
    """Outputs ``(tokens, H_kv, G, Dv)`` of all parts, and logarithms of their totals."""
    empty = parts.reference == NO_REFERENCE
    assert (parts.total[empty] == 0).all()
    assert parts.total.isfinite().all()
    logarithm = torch.where(empty, -torch.inf, parts.total.log2() + parts.reference)
    out = torch.where(empty[..., None], 0, parts.out / parts.total[..., None])
    assert out.isfinite().all()
    logarithm, out = (x.unflatten(0, (tokens, -1, splits)) for x in (logarithm, out))
    total = (logarithm * math.log(2)).logsumexp(2) / math.log(2)
    weight = torch.exp2(logarithm - total[:, :, None]).nan_to_num(0)
    return (weight[..., None] * out).sum(2), total


@pytest.mark.parametrize(
    ("form", "new"), [(TILE_FORMS[0], [8, 3, 5, 0, 1]), (TILE_FORMS[1], 1)], ids=str
)
def test_tile_select_and_attend(form, new):
    """Tiles that begin with the first token of a call, with a later one, or not in it."""
    rule = TileRule(form.rule.compress_size, form.rule.select_size)
    state = make_state(form, [0, 254, 1020, 40, 1279], new)
    for x in state.compressed:
        x[:, 1::2] = torch.where(x[:, ::2].isnan(), x[:, 1::2], x[:, ::2])
    schedule, _ = append(emulated, state, form.rule)
    shape = (5, 2, state.q.shape[1], COUNT)
    before = torch.arange(COUNT).int().expand(shape).contiguous()
    limit = 1280 // rule.select_size
    written = []
    for kernels, here in ((emulated, wide(state)), (decode_calls, state.to("cuda"))):
        device = here.q.device
        lists = before.to(device, copy=True)
        kernels.decode_tile_select(
            here.q, here.compressed, here.table, tensors(schedule, device), here.cu_seqlens,
            here.shape, rule, SCALE, 256, lists, COUNT, limit, 1, 2,
        )  # fmt: skip
        written.append(lists.cpu())
    assert torch.equal(*written)
    assert not torch.equal(written[0], before)
    parts, _ = compress(emulated, wide(state), schedule, form.rule)
    check_finish(
        state, schedule, (parts, None), form.rule, TileLists(written[0], 256),
        gates=draw_gates(state, form.dtype), floors=torch.tensor([0, 3, 1000, 5, 7]).int(),
        window=100, cluster=2,
    )  # fmt: skip


@pytest.mark.parametrize(("case", "gating"), [(CASES[0], "mean"), (CASES[1], "weight")], ids=str)
def test_gates(case, gating):
    form = FORMS[0]
    state = make_state(form, *case)
    schedule, _ = append(emulated, state, form.rule)
    parts, _ = compress(emulated, wide(state), schedule, form.rule)
    weight = torch.randn(state.q.shape[1], 3, 128).to(form.dtype) / 10
    check_finish(
        state, schedule, (parts, None), form.rule, make_lists(state, schedule, form.rule),
        weight=weight if gating == "weight" else None, cluster=2,
    )  # fmt: skip


def make_lists(state, schedule, rule):
    """Lists of all lengths: the own block, others, and blocks that begin after the token."""
    indices = torch.full((state.q.shape[0], state.shape.kv_heads, COUNT), -1, dtype=torch.int32)
    row = 0
    bounds = state.cu_seqlens
    for sequence in range(state.shape.batch):
        new = state.shape.tokens if bounds is None else int(bounds[sequence + 1] - bounds[sequence])
        for token in range(new):
            own = (int(schedule.starts[sequence]) + token) // rule.select_size
            for kv_head in range(state.shape.kv_heads):
                count = int(torch.randint(1, min(COUNT, own + 2), ())) if own else 1
                chosen = torch.randperm(own + 2)[:count].sort().values
                indices[row, kv_head, : len(chosen)] = chosen
            row += 1
    return indices


def test_equal_keys_get_equal_records():
    """Whatever the part, the tile and the warp: equal keys have equal sums, once scaled."""
    form = FORMS[0]
    state = make_state(form, [20000, 1000], 1)
    for x in state.compressed:
        x.copy_(torch.randn(x.shape[2:]))
    # Where products with it are positive, one key raises the references of what follows it.
    state.compressed.k[state.table[0, 10], 3] = 4
    on_gpu = state.to("cuda")
    schedule, _ = append(decode_calls, on_gpu, form.rule)
    _, records = compress(decode_calls, on_gpu, schedule, form.rule)
    assert isinstance(records, Records)
    blocks = 20000 // 64
    sums = records.sums[0, :, :blocks].cpu().double()
    reference = records.reference[0].cpu().repeat_interleave(4, -1)[:, :blocks]
    # The key is in block 20. In the last block of a group, what the next block adds is apart.
    index = torch.arange(blocks)
    some = (index > 0) & (index != 20) & (index % 4 != 3)
    scaled = (sums * 2.0 ** (reference - reference.amax(1, keepdim=True)))[:, some]
    assert (scaled == scaled[:, :1]).all()
    assert any(len(row.unique()) > 1 for row in reference[:, some])
