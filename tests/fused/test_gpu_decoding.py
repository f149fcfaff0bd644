"""On the GPU: decoding against the float64 reference, and in CUDA graphs."""

import pytest
import torch

import nsa
from nsa.fused import decode_calls
from nsa.testing import assert_as_accurate, make_cu_seqlens
from tests.helpers.cuda_graphs import capture
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.poison import poisoned_memory

pytestmark = gpu_test

BF16, FP16 = torch.bfloat16, torch.float16
PAPER = nsa.NSAConfig.paper()
OTHER = nsa.NSAConfig.paper(
    compress_block_size=24, compress_stride=8, select_block_size=32, num_selected_blocks=20,
    window_size=100,
)  # fmt: skip
FORMS = [
    # dtype, D, Dv, query heads, KV heads, configuration, gates
    (BF16, 128, 128, 32, 2, PAPER, "weight"),
    (FP16, 64, 64, 6, 2, OTHER, "gates"),
    (BF16, 256, 256, 4, 1, PAPER, "mean"),
    (FP16, 192, 128, 64, 2, PAPER, "weight"),
]
TILE_FORM = (BF16, 128, 128, 8, 2, nsa.NSAConfig(num_local_blocks=1), "weight")


def make_cache(lengths, room, form, seed=0) -> nsa.Cache:
    """A server's cache with random contents, in pages of any order."""
    dtype, dim, dim_v, _, kv_heads, config, _ = form
    page_size = 2 * config.select_block_size
    max_pages = -(-(max(lengths) + room) // page_size)
    generator = torch.Generator("cuda").manual_seed(seed)
    num_pages = len(lengths) * max_pages + 1
    order = torch.randperm(num_pages, generator=generator, device="cuda")[:-1].int()

    def pages(rows, width, std):
        shape = (num_pages, rows, kv_heads, width)
        x = torch.empty(shape, dtype=torch.float32, device="cuda")
        return x.normal_(std=std, generator=generator).to(dtype)

    rows, std = page_size // config.compress_stride, config.compress_block_size**-0.5
    return nsa.Cache.from_pages(
        config,
        k_pages=pages(page_size, dim, 1),
        v_pages=pages(page_size, dim_v, 1),
        k_cmp_pages=pages(rows, dim, std),
        v_cmp_pages=pages(rows, dim_v, std),
        page_table=order.view(len(lengths), max_pages),
        lengths=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
    )


def copied(cache: nsa.Cache, dtype: torch.dtype) -> nsa.Cache:
    names = ("k_pages", "v_pages", "k_cmp_pages", "v_cmp_pages")
    return nsa.Cache.from_pages(
        cache.config,
        **{name: getattr(cache, name).to(dtype, copy=True) for name in names},
        page_table=cache.page_table,
        lengths=cache.lengths,
    )


def make_step(leading, form, seed) -> dict[str, torch.Tensor]:
    dtype, dim, dim_v, heads, kv_heads, _, gating = form
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*leading, *shape, generator=generator, device="cuda").to(dtype)

    found = dict(q=draw(heads, dim), k=draw(kv_heads, dim), v=draw(kv_heads, dim_v))
    if gating == "gates":
        found["gates"] = draw(heads, 3).sigmoid()
    if gating == "weight":
        weight = torch.randn(heads, 3, dim, generator=generator, device="cuda")
        found["gate_proj_weight"] = (weight * dim**-0.5).to(dtype)
    return found


def as_dtype(arguments, dtype):
    return {name: x.to(dtype) for name, x in arguments.items()}


@pytest.fixture
def lists(monkeypatch):
    """The block lists that the kernels selected, one a call."""
    found = []

    def watch(name, index):
        finish = getattr(decode_calls, name)

        def spy(*args, **options):
            out = finish(*args, **options)
            found.append(args[index].clone())
            return out

        monkeypatch.setattr(decode_calls, name, spy)

    watch("decode_finish", 10)
    watch("decode_units", 8)
    return found


def check_steps(cache, form, steps, lists):
    """Steps on the kernels, and on the reference with the blocks that they selected."""
    references = [copied(cache, dtype) for dtype in (form[0], torch.float64)]
    for i, (leading, extras) in enumerate(steps):
        arguments = make_step(leading, form, seed=i)
        packed = (
            {} if extras is None
            else dict(cu_seqlens=make_cu_seqlens(extras, "cuda"), max_seqlen=max(extras))
        )  # fmt: skip
        with poisoned_memory():
            out = nsa.forward(**arguments, **packed, cache=cache, backend="fused")
        blocks = lists[-1].unflatten(0, leading)
        expected = [
            nsa.forward(
                **as_dtype(arguments, other.dtype), **packed, cache=other, block_indices=blocks,
                backend="reference",
            )
            for other in references
        ]  # fmt: skip
        assert_as_accurate(f"step {i}", out, *expected)
        assert torch.equal(cache.lengths, references[0].lengths)


LENGTHS = [0, 1, 63, 700, 2047, 5000]
CALLS = [
    (FORMS[0], [((6, 1), None)] * 2),
    (FORMS[0], [((6, 4), None)]),
    (FORMS[1], [((10,), [1, 0, 8, 1, 0, 0])]),
    (FORMS[2], [((6, 1), None)]),
    (FORMS[3], [((6,), [1] * 6)]),
]


@pytest.mark.parametrize(("form", "steps"), CALLS, ids=str)
def test_accuracy(form, steps, lists):
    check_steps(make_cache(LENGTHS, 64, form), form, steps, lists)


@pytest.mark.parametrize("batch", [40, 60])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_accuracy_of_many_sequences(packed, batch, lists):
    """More lists than CTAs run at a time, so that tokens share their window, or all their keys."""
    form = FORMS[0]
    lengths = [17 * i % 1000 for i in range(batch)]
    step = (batch, 4), None
    if packed:
        extras = [i % 5 for i in range(batch)]
        step = (sum(extras),), extras
    check_steps(make_cache(lengths, 64, form), form, [step], lists)


def test_accuracy_in_tile_mode():
    """Tiles begin in some sequences, at some of the tokens."""
    form = TILE_FORM
    cache = make_cache([0, 256, 1024, 4096], 512, form)
    references = [copied(cache, dtype) for dtype in (BF16, torch.float64)]
    for i, tokens in enumerate((1, 3, 8, 1)):
        if i == 2:
            # To where the next call begins a tile, or the token after it.
            ends = torch.tensor([250, 509, 1279, 4351], dtype=torch.int32, device="cuda")
            for other in (cache, *references):
                other.lengths.copy_(ends)
        arguments = make_step((4, tokens), form, seed=i)
        with poisoned_memory():
            out = nsa.forward(**arguments, cache=cache, backend="fused")
        expected = []
        for other in references:
            given = as_dtype(arguments, other.dtype)
            expected.append(nsa.forward(**given, cache=other, backend="reference"))
        assert torch.equal(cache.block_lists, references[1].block_lists)
        assert torch.equal(cache.floors, references[1].floors)
        assert_as_accurate(f"step {i}", out, *expected)


@pytest.mark.parametrize("length", [0, 65536 - 500])
def test_many_steps(length, lists):
    """1000 steps, against one call of the reference over all of them."""
    form = (BF16, 64, 64, 8, 2, PAPER, "mean")
    cache = make_cache([length, length // 2], 1024, form)
    references = [copied(cache, dtype) for dtype in (BF16, torch.float64)]
    arguments = make_step((2, 1000), form, seed=1)
    out = torch.cat(
        [
            nsa.forward(
                **{name: x[:, i : i + 1] for name, x in arguments.items()}, cache=cache,
                backend="fused",
            )
            for i in range(1000)
        ],
        dim=1,
    )  # fmt: skip
    blocks = torch.cat([x[:, None] for x in lists], dim=1)
    expected = [
        nsa.forward(
            **as_dtype(arguments, other.dtype), cache=other, block_indices=blocks,
            backend="reference",
        )
        for other in references
    ]  # fmt: skip
    assert_as_accurate("1000 steps", out, *expected)
    for name in ("k_cmp_pages", "v_cmp_pages"):
        assert torch.equal(getattr(cache, name), getattr(references[0], name))
    own = nsa.select_blocks(
        arguments["q"],
        arguments["k"],
        cache=make_cache([length, length // 2], 1024, form),
        backend="reference",
    )
    # The same but where scores are as good as equal.
    assert (own == blocks).all(-1).float().mean() > 0.98


def test_graph_replays_as_lengths_grow():
    """Captured at 4096 keys, replayed at other lengths: the bits of eager calls."""
    form = FORMS[0]
    cache = make_cache([65536, 65536], 64, form)
    cache.lengths.copy_(torch.tensor([4096, 100]))
    arguments = make_step((2, 2), form, seed=1)

    def step():
        return nsa.forward(**arguments, cache=cache, backend="fused")

    graph, out = capture(step)
    for lengths in ([4096, 4100], [65536, 20000], [30, 0], [40000, 65534]):
        start = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        cache.lengths.copy_(start)
        expected = step().clone()
        cache.lengths.copy_(start)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(cache.lengths, start + 2)


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [([65000], 1), ([5000] * 20, 1), ([900] * 40, 1), ([9000] * 60, 4)],
    ids=["8", "4", "2", "unit"],
)
def test_repeated_steps_have_the_same_bits(lengths, tokens):
    """The CTAs of a cluster, as many as the names say, send each other what they have found; or
    one has all tokens of a unit."""
    form = FORMS[0]
    cache = make_cache(lengths, 64, form)
    arguments = make_step((len(lengths), tokens), form, seed=1)
    start = cache.lengths.clone()

    def step():
        cache.lengths.copy_(start)
        return nsa.forward(**arguments, cache=cache, backend="fused")

    first = step()
    graph, out = capture(step)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        graph.replay()
        different += (out != first).any()
    assert int(different) == 0


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_a_step_does_not_wait(packed):
    form = FORMS[0]
    cache = make_cache([500, 70], 64, form)
    arguments = make_step((3,) if packed else (2, 3), form, seed=1)
    if packed:
        arguments |= dict(cu_seqlens=make_cu_seqlens([1, 2], "cuda"), max_seqlen=2)
    nsa.forward(**arguments, cache=cache, backend="fused")
    torch.cuda.set_sync_debug_mode("error")
    try:
        nsa.forward(**arguments, cache=cache, backend="fused")
    finally:
        torch.cuda.set_sync_debug_mode("default")
