"""nsa.Cache itself: memory, truncation, beams, pages of a server, what the host knows."""

import copy
import random

import pytest
import torch

import nsa
from nsa.cache.places import write
from nsa.testing import make_cu_seqlens
from tests.helpers.cache_cases import (
    DIM,
    F64,
    KV_HEADS,
    VALUE_DIM,
    cut,
    feed,
    inputs,
    make_cache,
)
from tests.helpers.decoding import CLOSE, append_on_device, assert_same_contents, contents
from tests.helpers.small_configs import SMALL
from tests.helpers.torch_defaults import DEFAULTS


@pytest.fixture
def unique_places(monkeypatch):
    """Writes to one place twice in a call would come in any order on a GPU."""

    def checked(store, places, values):
        pairs = torch.stack((places.outer, places.inner))[:, places.valid]
        assert pairs.unique(dim=1).shape == pairs.shape
        write(store, places, values)

    monkeypatch.setattr("nsa.cache.append.write", checked)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_steps_and_one_prompt_leave_the_same_bytes(name, separate, unique_places):
    config = SMALL[name]
    tensors = inputs(2, 90, separate=separate)
    prompt, steps = (make_cache(config, separate=separate) for _ in range(2))
    feed(prompt, tensors, 0, 90)
    start, sizes = 0, [1, 5, 2, 30, 8, 3, 1, 1, 33, 6]
    for size in sizes:
        # Wrong guesses leave nothing behind.
        feed(steps, inputs(2, 4, separate=separate), 0, 4)
        steps.truncate(start)
        feed(steps, tensors, start, start + size)
        start += size
    assert start == 90
    assert_same_contents(steps, prompt, atol=0)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_select_blocks_leaves_the_cache_as_it_is(name, separate):
    cache = make_cache(SMALL[name], separate=separate)
    tensors = inputs(2, 50, separate=separate)
    feed(cache, tensors, 0, 41)
    before = copy.deepcopy(cache)
    q, k, _ = (cut(x, 41, 50) for x in tensors)
    nsa.select_blocks(q, k, cache=cache)
    for x, y in zip(cache._tensors(), before._tensors(), strict=True):
        assert torch.equal(x, y)


# Rings of whole tiles of 64 keys: here the window and eight guesses just need a second one.
@pytest.mark.parametrize("window", [57, 58, 1])
@pytest.mark.parametrize("mode", ["token", "tile"])
def test_rings_survive_eight_dropped_guesses(mode, window):
    config = nsa.NSAConfig(
        selection=mode, compress_block_size=6, num_selected_blocks=2, window_size=window,
        q_tile_size=4,
    )  # fmt: skip
    tensors = inputs(1, 200, separate=True)
    whole = nsa.forward(*tensors, config=config)
    cache = make_cache(config, 1, 210, separate=True)
    feed(cache, tensors, 0, 100)
    start = 100
    for size in (1, 2, 8, 1, 1, 5, 40, 1, 7):
        feed(cache, inputs(1, 8, separate=True), 0, 8)
        cache.truncate(start)
        out = feed(cache, tensors, start, start + size)
        torch.testing.assert_close(out, whole[:, start : start + size], **CLOSE)
        start += size


def test_truncation_is_refused_where_it_would_lose_tokens():
    separate = make_cache(SMALL["token"], separate=True)
    feed(separate, inputs(2, 50, separate=True), 0, 50)
    separate.truncate([42, 50])
    with pytest.raises(ValueError, match=r"lengths must be at least \[42, 42\].*got \[41, 42\]"):
        separate.truncate([41, 42])
    assert separate.lengths.tolist() == [42, 50]
    tile = make_cache(SMALL["tile"])
    feed(tile, inputs(2, 50), 0, 50)
    tile.truncate(32)
    with pytest.raises(ValueError, match="at least"):
        tile.truncate(31)
    token = make_cache(SMALL["token"])
    feed(token, inputs(2, 50), 0, 50)
    token.truncate(torch.tensor([0, 70]))
    assert token.lengths.tolist() == [0, 50]
    for wrong, error in (
        (-1, ValueError),
        ([1, 2, 3], ValueError),
        (torch.ones(2), TypeError),
        (torch.ones(3, dtype=torch.int32), ValueError),
    ):
        with pytest.raises(error, match="lengths"):
            token.truncate(wrong)


class Beams:
    """Sequences that take over from each other, and their tokens so far."""

    def __init__(self, config, separate: bool, seed: int):
        self.rng = random.Random(seed)
        self.config, self.separate = config, separate
        size = config.select_block_size * self.rng.randint(1, 2)
        self.cache = make_cache(config, 4, 120, separate, page_size=size)
        self.past = [inputs(1, 0, separate=separate) for _ in range(4)]

    def step(self):
        """Append tokens, and compare each output with one call over the whole sequence."""
        counts = [self.rng.choice([0, 1, 1, 3, 11]) for _ in range(4)]
        new = [inputs(1, n, separate=self.separate) for n in counts]
        packed = (_join([x[i] for x in new]) for i in range(3))
        packed = (tuple(y[0] for y in x) if isinstance(x, tuple) else x[0] for x in packed)
        bounds = make_cu_seqlens(counts)
        out = nsa.forward(*packed, cu_seqlens=bounds, cache=self.cache, backend="reference")
        for b, part in enumerate(out.split(counts)):
            self.past[b] = tuple(_join([self.past[b][i], new[b][i]]) for i in range(3))
            whole = nsa.forward(*self.past[b], config=self.config)[0]
            torch.testing.assert_close(part, whole[whole.shape[0] - counts[b] :], **CLOSE)

    def reorder(self):
        index = [self.rng.randrange(4) for _ in range(4)]
        self.cache.reorder(torch.tensor(index))
        self.past = [self.past[b] for b in index]

    def truncate(self):
        lengths = zip(self.cache.lengths.tolist(), self.cache.floors.tolist(), strict=True)
        new = [max(length - self.rng.randrange(9), floor, 0) for length, floor in lengths]
        self.cache.truncate(torch.tensor(new))
        self.past = [
            tuple(cut(x, 0, n) for x in past) for past, n in zip(self.past, new, strict=True)
        ]


def _join(parts):
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_beams_of_any_lengths(name, separate, seed):
    beams = Beams(SMALL[name], separate, seed)
    for _ in range(14):
        beams.step()
        if beams.rng.random() < 0.5:
            beams.truncate()
        if beams.rng.random() < 0.6:
            beams.reorder()


def test_truncation_stops_at_shared_pages():
    cache = make_cache(SMALL["token"], page_size=8)
    feed(cache, inputs(2, 20), 0, 20)
    cache.reorder(torch.tensor([1, 1]))
    cache.truncate(16)
    with pytest.raises(ValueError, match="at least"):
        cache.truncate(15)


def test_reset_gives_shared_pages_back():
    cache = make_cache(SMALL["token"], page_size=8)
    feed(cache, inputs(2, 33), 0, 33)
    cache.reorder(torch.tensor([1, 1]))
    cache.reset()
    tensors = inputs(2, 60)
    out = feed(cache, tensors, 0, 60)
    torch.testing.assert_close(out, nsa.forward(*tensors, config=cache.config), **CLOSE)
    assert torch.equal(contents(cache)[0], tensors[1][0])


def test_reorder_checks_its_index():
    cache = make_cache(SMALL["token"])
    for index, error in (
        (torch.tensor([0, 2]), ValueError),
        (torch.tensor([0]), ValueError),
        (torch.tensor([0.0, 1.0]), TypeError),
        ([0, 1], TypeError),
    ):
        with pytest.raises(error, match="index"):
            cache.reorder(index)


def server_pages(config, pages: int, page_size: int) -> dict[str, torch.Tensor]:
    slots = page_size // config.compress_stride
    shapes = dict(
        k_pages=(page_size, DIM),
        v_pages=(page_size, VALUE_DIM),
        k_cmp_pages=(slots, DIM),
        v_cmp_pages=(slots, VALUE_DIM),
    )
    return {
        name: torch.full((pages, rows, KV_HEADS, dim), torch.nan, dtype=F64)
        for name, (rows, dim) in shapes.items()
    }


def test_sequences_share_the_pages_of_a_prefix():
    config, page_size = SMALL["token"], 16
    pages = server_pages(config, 8, page_size)
    prefix = inputs(1, 32)
    table = torch.tensor([[5, 2, -1, -1]], dtype=torch.int32)
    empty = torch.zeros(1, dtype=torch.int32)
    first = nsa.Cache.from_pages(config, **pages, page_table=table, lengths=empty)
    feed(first, prefix, 0, 32)
    kept = {name: x[[5, 2]].clone() for name, x in pages.items()}
    table = torch.tensor([[5, 2, 7, -1], [5, 2, 0, 3]], dtype=torch.int32)
    lengths = torch.tensor([32, 32], dtype=torch.int32)
    cache = nsa.Cache.from_pages(config, **pages, page_table=table, lengths=lengths)
    more = inputs(2, 16)
    out = feed(cache, more, 0, 16)
    whole = tuple(
        torch.cat([x.expand(2, -1, -1, -1), y], 1) for x, y in zip(prefix, more, strict=True)
    )
    torch.testing.assert_close(out, nsa.forward(*whole, config=config)[:, 32:], **CLOSE)
    for name, x in pages.items():
        # Slots before the first complete block are never written.
        torch.testing.assert_close(x[[5, 2]], kept[name], rtol=0, atol=0, equal_nan=True)
        assert x[[1, 4, 6]].isnan().all()
    # The server's own lengths stay, its table is the cache's.
    assert lengths.tolist() == [32, 32]
    assert cache.page_table is table
    with pytest.raises(nsa.UnsupportedError, match=r"page_table.*Cache\.from_pages"):
        cache.reorder(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="got no place for token 48 of sequence 0"):
        feed(cache, inputs(2, 1), 0, 1)
    assert cache.lengths.tolist() == [48, 48]


def test_a_server_tells_of_whole_tiles_only():
    pages = server_pages(SMALL["tile"], 4, 16)
    table = torch.zeros(1, 4, dtype=torch.int32)
    lengths = torch.tensor([17], dtype=torch.int32)
    with pytest.raises(ValueError, match="lengths must be multiples of q_tile_size=16"):
        nsa.Cache.from_pages(SMALL["tile"], **pages, page_table=table, lengths=lengths)


@pytest.mark.parametrize("length", [-1, 65])
def test_a_server_tells_of_no_more_tokens_than_pages_hold(length):
    pages = server_pages(SMALL["token"], 4, 16)
    table = torch.zeros(1, 4, dtype=torch.int32)
    lengths = torch.tensor([length], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"lengths must lie in \[0, 64\].*got \[{length}\]"):
        nsa.Cache.from_pages(SMALL["token"], **pages, page_table=table, lengths=lengths)


@pytest.mark.parametrize("name", ["k_pages", "v_cmp_pages"])
def test_pages_of_one_place_are_refused(name):
    pages = server_pages(SMALL["token"], 4, 16)
    pages[name] = pages[name][:1].expand_as(pages[name])
    table, lengths = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name} must have a place for each entry"):
        nsa.Cache.from_pages(SMALL["token"], **pages, page_table=table, lengths=lengths)


def test_pages_that_the_table_lacks_are_seen():
    config = SMALL["token"]
    pages = server_pages(config, 2, 16)
    table = torch.tensor([[-1, 0]], dtype=torch.int32)
    lengths = torch.tensor([16], dtype=torch.int32)
    cache = nsa.Cache.from_pages(config, **pages, page_table=table, lengths=lengths)
    with pytest.raises(ValueError, match="page_table must name a page for every token"):
        feed(cache, inputs(1, 1), 0, 1)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_appending_reads_nothing_on_the_host(name, separate):
    """A tensor on the meta device has no values to read."""
    cache = make_cache(SMALL[name], separate=separate, device="meta")
    _, k, v = (x.to("meta") for x in inputs(16))
    append_on_device(cache, k, v, torch.empty(3, dtype=torch.int64, device="meta"))
    cache.truncate(torch.empty(2, dtype=torch.int32, device="meta"))
    cache.reorder(torch.empty(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("limit", ["max_length", "page_table"])
def test_without_the_host_tokens_without_a_place_are_dropped(limit):
    """What a CUDA graph does, where no error can be raised."""
    config = SMALL["token"]
    pages = server_pages(config, 4, 8)
    table = torch.tensor([[1, 2, -1], [0, -1, -1]], dtype=torch.int32)
    lengths = torch.zeros(2, dtype=torch.int32)
    cache = nsa.Cache.from_pages(config, **pages, page_table=table, lengths=lengths)
    if limit == "max_length":
        cache = make_cache(config, 2, 16, page_size=8)
        cache.advance(torch.tensor([0, 8]), None)
    _, k, v = inputs(27)
    bounds = torch.tensor([0, 15, 25])  # the last two tokens belong to no sequence
    append_on_device(cache, k, v, bounds)
    expected = [15, 16] if limit == "max_length" else [15, 8]
    assert cache.lengths.tolist() == expected
    assert bool(cache.overflowed)
    if limit == "page_table":
        assert all(x[3].isnan().all() for x in pages.values())
        assert torch.equal(contents(cache)[0], k[:15])
        assert torch.equal(contents(cache)[4], k[15:23])
    cache.reset()
    assert not cache.overflowed


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("config", [nsa.NSAConfig.paper(), nsa.NSAConfig()])
@pytest.mark.parametrize("length", [4096, 65536, 5000, 1025])
def test_memory_beyond_keys_and_values(config, separate, length):
    heads, dim = 4, 128
    cache = nsa.Cache(
        config, 2, length, heads, dim, separate_kv=separate, dtype=torch.bfloat16, device="meta",
        num_heads=16,
    )  # fmt: skip
    token = 2 * heads * dim * 2  # bytes of a token's key and value
    # Two sequences, whose last page may be unused by a sixteenth of their length.
    rounded = 2 * cache.layout.max_pages * cache.layout.page_size
    assert rounded <= 2 * length * 17 / 16
    keys_and_values = rounded * token
    extra = cache.nbytes - keys_and_values
    window = 2 * (config.window_size + 7 + 63) * token
    opened = 2 * (config.compress_block_size + 7 + config.compress_stride) * token
    lists = 2 * 2 * 16 * config.num_selected_blocks * 4
    small = 4096
    allowed = keys_and_values / config.compress_stride + small
    if separate:
        allowed += window + opened
    if config.selection == "tile":
        allowed += lists
    assert extra <= allowed


def test_what_the_host_knows_of_another_device():
    config = SMALL["token"]
    cache = make_cache(config, 3, device="meta")
    assert cache.known_lengths() == [0, 0, 0]
    cache.advance(torch.empty(3, dtype=torch.int64, device="meta"), [5, 6, 7])
    cache.note_advance([1, 1, 1])
    assert cache.known_lengths() == [6, 7, 8]
    cache.truncate([5, 9, 9])
    assert cache.known_lengths() == [5, 7, 8]
    cache.reorder(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert cache.known_lengths() is None
    cache.reset()
    assert cache.known_lengths() == [0, 0, 0]
    cache.note_advance([4, 4, 4])
    cache.reorder(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert cache.known_lengths() == [4, 4, 4]
    cache.truncate(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert cache.known_lengths() is None
    cache.reset()
    cache.lengths.fill_(1)  # someone else
    assert cache.known_lengths() is None
    cache.reset()
    cache.note_advance(None)
    assert cache.known_lengths() is None


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    cache = make_cache(SMALL["token"], length=16)
    tensors = inputs(2, 17)
    feed(cache, tensors, 0, 10)
    with pytest.raises(ValueError, match=r"max_length of at least 17 for 7 new tokens after 10"):
        feed(cache, tensors, 10, 17)
    assert cache.lengths.tolist() == [10, 10]
    whole = nsa.forward(*(cut(x, 0, 16) for x in tensors), config=cache.config)
    torch.testing.assert_close(feed(cache, tensors, 10, 16), whole[:, 10:], **CLOSE)


def test_inference_mode_and_ordinary_calls_mix():
    with torch.inference_mode():
        cache = make_cache(SMALL["tile"])
        tensors = inputs(2, 40)
        out = [feed(cache, tensors, 0, 20)]
    tensors = tuple(x.clone() for x in tensors)
    out.append(feed(cache, tensors, 20, 30))
    with torch.inference_mode():
        out.append(feed(cache, tensors, 30, 40))
    whole = nsa.forward(*tensors, config=cache.config)
    torch.testing.assert_close(torch.cat(out, 1), whole, **CLOSE)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", SMALL)
def test_defaults_of_torch_change_nothing(name, default):
    tensors = inputs(2, 60)
    whole = nsa.forward(*tensors, config=SMALL[name])
    with DEFAULTS[default]():
        cache = make_cache(SMALL[name], device="cpu")
        out = [feed(cache, tensors, 0, 30), feed(cache, tensors, 30, 31)]
        cache.truncate(30)
        cache.reorder(torch.arange(2, device="cpu"))
        out[1:] = [feed(cache, tensors, 30, 45), feed(cache, tensors, 45, 60)]
    torch.testing.assert_close(torch.cat(out, 1), whole, **CLOSE)
