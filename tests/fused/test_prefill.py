"""Prompts into a cache with the fused pipeline, in float64 with emulated kernel calls."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.decoding import (
    CLOSE,
    NOT_SELECTING,
    Decoding,
    Feed,
    Step,
    assert_same_contents,
    decodings,
    lengths_of,
)
from tests.helpers.emulation import compressed, drawn_compressed_calls
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.small_configs import tile_config, token_config
from tests.helpers.strategies import tile_problems, token_problems

pytestmark = pytest.mark.usefixtures("fused_on_cpu")
all_compressed_calls = pytest.mark.usefixtures("compressed_calls")

RULES = dict(causal=True, compressed_visibility="complete", tile_summary="first")


SIZES = dict(max_tokens=200, min_sequences=1)
PROBLEMS = {
    "token": token_problems(**SIZES, **RULES),
    "tile": tile_problems(**SIZES, **RULES, num_cmp_selected_blocks=None),
}


@pytest.mark.parametrize("mode", PROBLEMS)
def test_a_prompt_equals_the_reference(mode):
    @settings(max_examples=examples(45), **WITH_FIXTURES)
    @given(case=decodings(PROBLEMS[mode]), calls=drawn_compressed_calls)
    def check(case, calls):
        with compressed(calls):
            check_prompt(case, given_indices=mode == "token")

    check()


def check_prompt(case: Decoding, given_indices: bool):
    problem = case.problem
    packed = problem.q.ndim == 3
    prompt = Step(lengths_of(problem), [0] * len(lengths_of(problem)), batched=not packed)
    arguments = Feed(problem, case.seed).arguments(prompt)
    caches = case.cache, case.fresh()
    if given_indices:
        # Ties may be broken otherwise, so both attend the same blocks.
        arguments["block_indices"] = problem.select_blocks(backend="reference")
    out, expected = (
        nsa.forward(**arguments, cache=cache, backend=backend)
        for cache, backend in zip(caches, ("fused", "reference"), strict=True)
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    assert_same_contents(*caches)


@all_compressed_calls
def test_it_selects_for_itself():
    config = token_config()
    q, k, v = make_inputs((2, 300), 4, 2, 64, dtype=torch.float64)
    cache = nsa.Cache(config, 2, 320, 2, 64, dtype=torch.float64)
    out = nsa.forward(q, k, v, cache=cache, backend="fused")
    torch.testing.assert_close(out, nsa.forward(q, k, v, config=config), **CLOSE)
    assert cache.lengths.tolist() == [300, 300]


@pytest.mark.unmeasured
@settings(max_examples=examples(45), **WITH_FIXTURES)
@given(case=decodings(PROBLEMS["token"]), calls=drawn_compressed_calls)
def test_chunks_equal_the_whole(case, calls):
    with compressed(calls):
        check_chunks(case)


def check_chunks(case: Decoding):
    problem, steps, cache, seed = case
    whole = problem.forward(backend="reference")
    rows, feed = whole.reshape(-1, *whole.shape[-2:]), Feed(problem, seed)
    for step in steps:
        arguments = feed.arguments(step)
        own, expected = feed.rows(step)
        select = {n: x for n, x in arguments.items() if n not in NOT_SELECTING}
        # Ties may be broken otherwise, so both attend the same blocks.
        blocks = nsa.select_blocks(**select, cache=cache, backend="reference")
        out = nsa.forward(**arguments, block_indices=blocks, cache=cache, backend="fused")
        out = out.reshape(-1, *out.shape[-2:])
        torch.testing.assert_close(out[own], rows[expected], **CLOSE)
        feed.advance(step)
        cache.truncate(feed.at)


@all_compressed_calls
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("given_indices", [False, True])
def test_chunks_of_whole_tiles(given_indices, separate):
    config = tile_config(num_local_blocks=1, num_selected_blocks=3)
    q, k, v = make_inputs((2, 300), 4, 2, 64, dtype=torch.float64)
    if separate:
        k, v = (k.clone(), k, k.flip(0)), (v.flip(0), v, v.clone())
    whole = nsa.forward(q, k, v, config=config)
    size = dict(separate_kv=separate, dtype=torch.float64)
    caches = [nsa.Cache(config, 2, 320, 2, 64, **size) for _ in range(2)]

    def cut(x, start, stop):
        if isinstance(x, tuple):
            return tuple(part[:, start:stop] for part in x)
        return x[:, start:stop]

    for start, stop in pairwise((0, 64, 192, 256, 290)):
        new = [cut(x, start, stop) for x in (q, k, v)]
        blocks = None
        if given_indices:
            blocks = nsa.select_blocks(*new[:2], cache=caches[0], backend="reference")
        for cache, backend in zip(caches, ("fused", "reference"), strict=True):
            out = nsa.forward(*new, block_indices=blocks, cache=cache, backend=backend)
            torch.testing.assert_close(out, whole[:, start:stop], **CLOSE)
    assert_same_contents(*caches)
    # More new tokens than the decoding kernels take.
    new = [cut(x, 290, 300) for x in (q, k, v)]
    with pytest.raises(nsa.UnsupportedError, match=r"a multiple of q_tile_size=64.*got 290"):
        nsa.forward(*new, cache=caches[0], backend="fused")
    out = nsa.forward(*new, cache=caches[0])
    torch.testing.assert_close(out, whole[:, 290:], **CLOSE)


@all_compressed_calls
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_pages_are_read_in_place_until_beams_share_them(packed):
    config = token_config()
    q, k, v = make_inputs((2, 300), 4, 2, 64, dtype=torch.float64)
    caches = [nsa.Cache(config, 2, 320, 2, 64, dtype=torch.float64) for _ in range(2)]
    cuts = list(pairwise((0, 130, 200, 300)))
    for shared in (True, False):
        for start, stop in cuts:
            new, bounds = [x[:, start:stop] for x in (q, k, v)], None
            if packed:
                # The second sequence has less.
                short = stop - start - start // 10
                new = [torch.cat([x[0], x[1, :short]]) for x in new]
                bounds = make_cu_seqlens([stop - start, short])
            outs = []
            for cache, backend in zip(caches, ("fused", "reference"), strict=True):
                outs.append(nsa.forward(*new, cache=cache, cu_seqlens=bounds, backend=backend))
            torch.testing.assert_close(*outs, **CLOSE)
            assert_same_contents(*caches)
            assert caches[0].has_ordered_pages == (start == 0 or not shared)
            for cache in caches:
                if shared:
                    cache.reorder(torch.tensor([0, 0] if start else [1, 0]))
        for cache in caches:
            cache.reset()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_tile_keeps_blocks_that_are_forced_at_its_end(length):
    """They may begin after the prompt."""
    config = tile_config(
        num_selected_blocks=5, num_initial_blocks=3, num_local_blocks=2, q_tile_size=256
    )
    tensors = make_inputs((2, length), 4, 2, 64, dtype=torch.float64)
    caches = [nsa.Cache(config, 2, 320, 2, 64, dtype=torch.float64) for _ in range(2)]
    for cache, backend in zip(caches, ("fused", "reference"), strict=True):
        nsa.forward(*tensors, cache=cache, backend=backend)
    assert_same_contents(*caches)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_tile_keeps_them_with_blocks_of_the_caller(backend):
    """What ``select_blocks`` found, given back, changes no later output."""
    config = tile_config(
        num_selected_blocks=5, num_initial_blocks=3, num_local_blocks=2, q_tile_size=256
    )
    q, k, v = make_inputs((2, 200), 4, 2, 64, dtype=torch.float64)
    whole = nsa.forward(q, k, v, config=config)
    cache = nsa.Cache(config, 2, 320, 2, 64, dtype=torch.float64)
    for start, stop in ((0, 10), (10, 120), (120, 200)):
        new = [x[:, start:stop] for x in (q, k, v)]
        blocks = None
        if stop < 200:
            blocks = nsa.select_blocks(*new[:2], cache=cache, backend="reference")
        out = nsa.forward(
            *new, block_indices=blocks, cache=cache, backend="auto" if start else backend
        )
        torch.testing.assert_close(out, whole[:, start:stop], **CLOSE)


def test_what_it_cannot_do():
    q, k, v = make_inputs((1, 20), 4, 2, 64, dtype=torch.float64)
    sparse = nsa.Cache(tile_config(num_cmp_selected_blocks=1), 1, 64, 2, 64, dtype=torch.float64)
    with pytest.raises(nsa.UnsupportedError, match="num_cmp_selected_blocks=None with a cache"):
        nsa.forward(q, k, v, cache=sparse, backend="fused")
    token = nsa.Cache(token_config(), 1, 64, 2, 64, dtype=torch.float64)
    with pytest.raises(nsa.UnsupportedError, match="no select_blocks with a cache"):
        nsa.select_blocks(q, k, cache=token, backend="fused")
