"""Decoding with the fused backend's stages and emulated kernels."""

import pytest
import torch
from hypothesis import given, settings

import nsa
from nsa import block_index_checks, boundaries
from nsa.cache import calls
from nsa.fused import decoding
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.decoding import assert_decodes, decodable, decodings
from tests.helpers.host_reads import NoHostReads
from tests.helpers.profiles import examples

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


@pytest.fixture
def decoded(monkeypatch):
    """Counts the calls that the decoding kernels answer."""
    forward, calls = decoding.forward, []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoding, "forward", counted)
    return calls


@pytest.mark.unmeasured
def test_steps_equal_the_whole(decoded):
    """Kernels decode what they can, the reference the rest; all in one cache."""

    @settings(max_examples=examples(60), deadline=None)
    @given(decodings(decodable()))
    def check(case):
        assert_decodes(case, "auto")

    check()
    assert len(decoded) > 20


def make_cache(config=None, batch=2, length=0, dtype=torch.float64, **options):
    """A cache, filled by the reference."""
    config = config or nsa.NSAConfig.paper(num_selected_blocks=4, window_size=40)
    cache = nsa.Cache(config, batch, 400, 2, 8, dtype=dtype, **options)
    if length:
        q, k, v = make_inputs((batch, length), 4, 2, 8, dtype=dtype)
        nsa.forward(q, k, v, cache=cache, backend="reference")
    return cache


def forget_lengths(cache):
    """As on a GPU after a CUDA graph was captured: the host does not know the lengths."""
    cache._host._known = None


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("extras", ["none", "weights", "compressed_kv", "indices"])
def test_a_step_reads_nothing_on_the_host(extras, packed, decoded, monkeypatch):
    cache = make_cache(length=190)
    # As while a CUDA graph is captured.
    for module in (block_index_checks, boundaries, calls):
        monkeypatch.setattr(module, "has_readable_values", lambda _: False)
    cu_seqlens = make_cu_seqlens([3, 0]) if packed else None
    leading = (3,) if packed else (2, 3)
    q, k, v = make_inputs(leading, 4, 2, 8, dtype=torch.float64)
    arguments = dict(gates=torch.rand(*leading, 4, 3, dtype=torch.float64))
    if extras == "weights":
        arguments["compress_k_weight"] = torch.randn(2, 8, 8, dtype=torch.float64)
    if extras == "compressed_kv":
        rows = (1,) if packed else (2, 1)
        arguments["compressed_kv"] = make_inputs(rows, 2, 2, 8, dtype=torch.float64)[:2]
    if extras == "indices":
        arguments["block_indices"] = torch.tensor([0, 1, 2, -1]).int().expand(*leading, 2, 4)
    if packed:
        arguments |= dict(cu_seqlens=cu_seqlens, max_seqlen=3)
    forget_lengths(cache)
    with NoHostReads():
        out = nsa.forward(q, k, v, cache=cache, backend="fused", **arguments)
    expected = nsa.forward(q, k, v, cache=make_cache(length=190), backend="reference", **arguments)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert cache.lengths.tolist() == ([193, 190] if packed else [193, 193])
    assert len(decoded) == 1


def test_tiles_of_a_cta():
    """Two at least, where half of the CTAs then suffice; one where there are few tiles."""
    tiles = torch.tensor([0, 1, 5, 6, 10, 11, 21])
    assert decoding.tile_share(tiles, 10, 0).tolist() == [1, 1, 1, 2, 2, 2, 3]
    # Whole units, of 8 or of 4 that two share, where that is little more.
    tiles = torch.tensor([8 * 64, 8 * 65, 4 * 128, 4 * 130])
    assert decoding.tile_share(tiles, 8, 8).tolist() == [64, 65, 64, 65]
    assert decoding.tile_share(tiles, 9, 8).tolist() == [57, 58, 57, 58]
    assert decoding.tile_share(torch.tensor([128 * 65]), 132, 128).tolist() == [65]


def test_tokens_without_a_place_are_dropped():
    cache = make_cache(length=396)
    forget_lengths(cache)
    q, k, v = make_inputs((2, 8), 4, 2, 8, dtype=torch.float64)
    out = nsa.forward(q, k, v, cache=cache, backend="fused")
    assert cache.lengths.tolist() == [400, 400]
    assert cache.overflowed
    other = make_cache(length=396)
    expected = nsa.forward(q[:, :4], k[:, :4], v[:, :4], cache=other, backend="reference")
    torch.testing.assert_close(out[:, :4], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("given", [False, True], ids=["selected", "given"])
def test_tokens_attend_together(given, packed, decoded, monkeypatch):
    """Where heads of all tokens fill a wgmma, a CTA attends what any of them selected."""
    unite, united = decoding.decode_calls.decode_units, []

    def counted(*args, **options):
        united.append(args)
        return unite(*args, **options)

    monkeypatch.setattr(decoding.decode_calls, "decode_units", counted)
    found = []
    for backend in ("fused", "reference"):
        cache = make_cache(length=190)
        torch.manual_seed(1)
        leading = (4,) if packed else (2, 4)
        q, k, v = make_inputs(leading, 32, 2, 8, dtype=torch.float64)
        options = dict(gates=torch.rand(*leading, 32, 3, dtype=torch.float64))
        if given:
            options["block_indices"] = torch.tensor([0, 1, 2, -1]).int().expand(*leading, 2, 4)
        if packed:
            options |= dict(cu_seqlens=make_cu_seqlens([1, 3]), max_seqlen=3)
        found.append(nsa.forward(q, k, v, cache=cache, backend=backend, **options))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
    assert len(united) == 1


def test_no_tokens():
    cache = make_cache(length=5)
    q, k, v = make_inputs((0,), 4, 2, 8, dtype=torch.float64)
    bounds = make_cu_seqlens([0, 0])
    out = nsa.forward(q, k, v, cu_seqlens=bounds, max_seqlen=0, cache=cache, backend="fused")
    assert out.shape == (0, 4, 8)
    assert cache.lengths.tolist() == [5, 5]


LIMITS = {
    "groups": (
        dict(config=nsa.NSAConfig(num_cmp_selected_blocks=2)),
        (2, 1),
        "num_cmp_selected_blocks=None",
    ),
    "tile": (dict(config=nsa.NSAConfig(q_tile_size=4)), (2, 1), "q_tile_size of at least 8"),
    "strides": (
        dict(config=nsa.NSAConfig.paper(compress_stride=2, compress_block_size=32)),
        (2, 1),
        "select_block_size to be 1, 2, 4, 8 or 16 strides",
    ),
    "selected": (
        dict(config=nsa.NSAConfig.paper(num_selected_blocks=65)),
        (2, 1),
        "num_selected_blocks of at most 64",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits(case):
    options, leading, message = LIMITS[case]
    q, _, _ = make_inputs(leading, 4, 2, 8, dtype=torch.float64)
    reason = decoding.unsupported_reason(q, make_cache(**options), None, given=False)
    assert message in reason


def test_limits_of_the_call():
    q, _, _ = make_inputs((2, 9), 4, 2, 8, dtype=torch.float64)
    cache = make_cache()
    assert "at most 8 new tokens" in decoding.unsupported_reason(q, cache, None, given=False)
    wide, _, _ = make_inputs((2, 1), 66, 2, 8, dtype=torch.float64)
    assert "at most 32 query heads" in decoding.unsupported_reason(wide, cache, None, given=False)
    tiles = make_cache(config=nsa.NSAConfig())
    assert "select blocks itself" in decoding.unsupported_reason(q[:, :1], tiles, None, given=True)


def test_selection_with_a_cache_is_the_references():
    cache = make_cache(length=5)
    q, k, _ = make_inputs((2, 1), 4, 2, 8, dtype=torch.float64)
    with pytest.raises(nsa.UnsupportedError, match="select_blocks with a cache"):
        nsa.select_blocks(q, k, cache=cache, backend="fused")


def test_pages_that_the_kernels_cannot_address():
    """The reference and the call that copies from pages take them."""
    config, table = nsa.NSAConfig.paper(), torch.zeros(2, 8, dtype=torch.int32)[:, :4]
    pages = dict(k_pages=(9, 64, 2, 64), v_pages=(9, 64, 2, 64))
    pages |= dict(k_cmp_pages=(9, 4, 2, 64), v_cmp_pages=(9, 4, 2, 64))
    pools = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in pages.items()}
    lengths = torch.zeros(2, dtype=torch.int32)

    def limit(table, **changes):
        given = dict(page_table=table, lengths=lengths) | pools | changes
        return decoding._layout_limit(nsa.Cache.from_pages(config, **given))

    assert limit(table.contiguous()) is None
    assert "contiguous page_table" in limit(table)
    odd = torch.zeros(9, 64, 2, 68, dtype=torch.bfloat16)[..., :64]
    assert "k_pages with adjacent channels" in limit(table.contiguous(), k_pages=odd)


@pytest.mark.parametrize("selection", ["token", "tile"])
@pytest.mark.parametrize("kind", ["means", "weights", "three"])
def test_an_error_leaves_the_cache_as_it_was(kind, selection, decoded, monkeypatch):
    config = nsa.NSAConfig.paper(num_selected_blocks=4, window_size=40)
    if selection == "tile":
        config = nsa.NSAConfig(num_selected_blocks=4, window_size=40, q_tile_size=64)
    q, k, v = make_inputs((2, 200), 4, 2, 8, dtype=torch.float64)
    extras = {}
    if kind == "weights":
        extras = dict(compress_k_weight=torch.randn(2, 8, 8, dtype=torch.float64))
    if kind == "three":
        k, v = (k, k.flip(0), k.clone()), (v, v.clone(), v.flip(0))
    whole = nsa.forward(q, k, v, config=config, backend="reference", **extras)
    cache = nsa.Cache(
        config, 2, 400, 2, 8, dtype=torch.float64, separate_kv=kind == "three", num_heads=4
    )

    def call(start, stop):
        def cut(x):
            return tuple(map(cut, x)) if isinstance(x, tuple) else x[:, start:stop]

        return nsa.forward(*map(cut, (q, k, v)), cache=cache, **extras)

    call(0, 188)
    failing = decoding.decode_calls.decode_compressed

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoding.decode_calls, "decode_compressed", fail)
    before = [x.clone() for x in (cache.lengths, cache.floors)]
    with pytest.raises(RuntimeError, match="out of memory"):
        call(192, 200)
    for x, y in zip(before, (cache.lengths, cache.floors), strict=True):
        assert torch.equal(x, y)
    monkeypatch.setattr(decoding.decode_calls, "decode_compressed", failing)
    out = torch.cat([call(188, 191), call(191, 199), call(199, 200)], 1)
    torch.testing.assert_close(out, whole[:, 188:], rtol=0, atol=1e-10)
    assert len(decoded) == 4
