"""Sequences fed to a cache piece by piece: prompts, chunks, steps and wrong guesses."""

import random
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import nsa
from nsa.blocks import num_compressed_blocks, num_selection_blocks
from nsa.cache.append import append, compress_candidates, locate_new_tokens
from nsa.cache.places import block_places, open_places, token_places, window_places
from nsa.testing import make_cu_seqlens
from tests.helpers.strategies import Problem, problems

CLOSE = dict(rtol=0, atol=1e-10)
GUESSES = 8


class Step(NamedTuple):
    """One call: tokens of each sequence, and wrong tokens after them, which are dropped again."""

    new: list[int]
    wrong: list[int]
    batched: bool


class Decoding(NamedTuple):
    """A problem cut into steps, and the cache to run them with."""

    problem: Problem
    steps: list[Step]
    cache: nsa.Cache
    seed: int

    def fresh(self) -> nsa.Cache:
        """Another empty cache for sequences as long."""
        old = self.cache
        dims = old.num_kv_heads, old.head_dim, old.value_head_dim, old.separate_kv
        return nsa.Cache(
            old.config, old.batch_size, old.max_length, *dims, dtype=old.dtype,
            page_size=old.layout.page_size,
        )  # fmt: skip


def decodable(**fixed) -> st.SearchStrategy[Problem]:
    """Problems that can be decoded step by step."""
    rules = dict(causal=True, compressed_visibility="complete", tile_summary="first")
    return problems(min_sequences=1, **(rules | fixed))


@st.composite
def decodings(draw, source: st.SearchStrategy[Problem]) -> Decoding:
    """Any cut of a problem, and any cache for it."""
    problem, rng = draw(source), draw(st.randoms(use_true_random=False))
    lengths = lengths_of(problem)
    limited = is_separate(problem) or problem.config.selection == "tile"
    pages = draw(st.integers(1, 3))
    return Decoding(
        problem=problem,
        steps=draw_steps(rng, lengths, GUESSES if limited else 40),
        cache=poisoned_cache(problem, pages * problem.config.select_block_size, rng),
        seed=rng.randrange(2**31),
    )


def draw_steps(rng: random.Random, lengths: list[int], most_wrong: int) -> list[Step]:
    """Steps through sequences of ``lengths`` tokens, at most 12 and then the rest at once."""
    left, steps = list(lengths), []
    while any(left):
        if len(steps) == 12:
            return [*steps, Step(left, [0] * len(left), batched=False)]
        size = rng.choice([1, 1, 2, 3, GUESSES, GUESSES, 20, 70])
        if rng.random() < 0.4:
            # Sequences that end have only wrong tokens left.
            size = min(size, min(left) + most_wrong)
            wrong = [rng.randint(max(0, size - n), min(size, most_wrong)) for n in left]
            steps.append(Step([size - x for x in wrong], wrong, batched=True))
        else:
            new = [min(n, rng.choice([0, 1, size, size])) for n in left]
            wrong = [rng.choice([0, 0, 1, min(size, most_wrong)]) for _ in left]
            steps.append(Step(new, wrong, batched=False))
        left = [n - taken for n, taken in zip(left, steps[-1].new, strict=True)]
    return steps


def lengths_of(problem: Problem) -> list[int]:
    """The length of each sequence, batched or packed."""
    if problem.q.ndim == 4:
        return [problem.q.shape[1]] * problem.q.shape[0]
    return problem.extras["cu_seqlens"].diff().tolist()


def is_separate(problem: Problem) -> bool:
    return isinstance(problem.k, tuple) or isinstance(problem.v, tuple)


def poisoned_cache(problem: Problem, page_size: int, rng: random.Random) -> nsa.Cache:
    """A cache of NaN in pages of its own, in order or in any, or of a server with too many."""
    lengths, config = lengths_of(problem), problem.config
    k, v = (x[0] if isinstance(x, tuple) else x for x in (problem.k, problem.v))
    # Room for wrong tokens too.
    longest = max(lengths) + 40
    sizes = len(lengths), k.shape[-2], k.shape[-1], v.shape[-1]
    if is_separate(problem) or rng.random() < 0.5:
        batch, heads, dim, value_dim = sizes
        cache = nsa.Cache(
            config, batch, longest, heads, dim, value_dim, is_separate(problem),
            dtype=torch.float64, page_size=page_size,
        )  # fmt: skip
        if rng.random() < 0.5:
            order = rng.sample(range(cache.page_table.numel()), cache.page_table.numel())
            cache.page_table.copy_(torch.tensor(order).view_as(cache.page_table))
        stores = (*(cache.window_rings or ()), *(cache.open_rings or ()))
        stores += (cache.k_pages, cache.v_pages, cache.k_cmp_pages, cache.v_cmp_pages)
        for store in stores:
            store.fill_(torch.nan)
        return cache
    return server_cache(config, sizes, longest, page_size, rng)


def server_cache(config, sizes, longest: int, page_size: int, rng: random.Random) -> nsa.Cache:
    """A cache in a server's pages, some of which no sequence has."""
    batch, heads, dim, value_dim = sizes
    each = -(-longest // page_size)
    count = batch * each + 2
    slots = page_size // config.compress_stride
    pools = {
        "k_pages": (page_size, dim),
        "v_pages": (page_size, value_dim),
        "k_cmp_pages": (slots, dim),
        "v_cmp_pages": (slots, value_dim),
    }
    nan = torch.nan
    pages = {
        name: torch.full((count, heads, rows, width), nan, dtype=torch.float64).transpose(1, 2)
        for name, (rows, width) in pools.items()
    }
    # The last page of the pool belongs to nobody, so that an index of -1 would be seen.
    order = torch.tensor(rng.sample(range(count - 1), batch * each), dtype=torch.int32)
    table = torch.full((batch, each + 2), -1, dtype=torch.int32)
    table[:, :each] = order.view(batch, each)
    lengths = torch.zeros(batch, dtype=torch.int32)
    return nsa.Cache.from_pages(config, **pages, page_table=table, lengths=lengths)


class Feed:
    """The arguments of each step of a problem, and the rows of the whole that it should give."""

    def __init__(self, problem: Problem, seed: int):
        self.problem, self.config = problem, problem.config
        self.lengths = lengths_of(problem)
        self.at = [0] * len(self.lengths)
        self.rng = torch.Generator().manual_seed(seed)
        self.bounds = make_cu_seqlens(self.lengths).tolist()
        blocks = [num_compressed_blocks(n, self.config) for n in self.lengths]
        self.block_bounds = make_cu_seqlens(blocks).tolist()

    def arguments(self, step: Step) -> dict:
        """Keyword arguments of :func:`nsa.forward` but ``config`` and ``cache``."""
        q, k, v, _, extras = self.problem
        found = {name: self._take(x, step) for name, x in (("q", q), ("k", k), ("v", v))}
        found |= {name: x for name, x in extras.items() if name.endswith("weight")}
        if "gates" in extras:
            found["gates"] = self._take(extras["gates"], step)
        if "compressed_kv" in extras:
            found["compressed_kv"] = self._blocks(extras["compressed_kv"], step)
        if not step.batched:
            found["cu_seqlens"] = make_cu_seqlens(self._sizes(step))
        return found

    def rows(self, step: Step) -> tuple[Tensor, Tensor]:
        """Rows of a step's output that count, and the rows of the whole's that they equal."""
        own, whole, start = [torch.arange(0)], [torch.arange(0)], 0
        for b, (new, size) in enumerate(zip(step.new, self._sizes(step), strict=True)):
            own.append(torch.arange(start, start + new))
            whole.append(torch.arange(new) + self.bounds[b] + self.at[b])
            start += size
        return torch.cat(own), torch.cat(whole)

    def advance(self, step: Step):
        self.at = [at + new for at, new in zip(self.at, step.new, strict=True)]

    def _sizes(self, step: Step) -> list[int]:
        return [new + wrong for new, wrong in zip(step.new, step.wrong, strict=True)]

    def _take(self, x, step: Step):
        if isinstance(x, tuple):
            return tuple(self._take(part, step) for part in x)
        flat = x.flatten(0, 1) if self.problem.q.ndim == 4 else x
        parts = []
        for b, (new, wrong) in enumerate(zip(step.new, step.wrong, strict=True)):
            start = self.bounds[b] + self.at[b]
            parts += [flat[start : start + new], self._noise(wrong, flat)]
        return self._laid_out(parts, step)

    def _blocks(self, pair, step: Step):
        """The compressed tokens that the true new tokens complete, and noise."""
        found = []
        for x in pair:
            flat = x.flatten(0, 1) if self.problem.q.ndim == 4 else x
            parts = []
            for b, (new, size) in enumerate(zip(step.new, self._sizes(step), strict=True)):
                ends = (self.at[b], self.at[b] + new)
                first, past = (
                    self.block_bounds[b] + num_compressed_blocks(n, self.config) for n in ends
                )
                most = -(-size // self.config.compress_stride)
                parts += [flat[first:past], self._noise(most - (past - first), flat)]
            found.append(self._laid_out(parts, step))
        return tuple(found)

    def _laid_out(self, parts: list[Tensor], step: Step) -> Tensor:
        rows = torch.cat(parts)
        return rows.unflatten(0, (len(step.new), -1)) if step.batched else rows

    def _noise(self, count: int, like: Tensor) -> Tensor:
        shape = (count, *like.shape[1:])
        return 3 * torch.randn(shape, generator=self.rng, dtype=torch.float64)

    def unit_rows(self, indices: Tensor, step: Step) -> list[Tensor]:
        """The rows of the whole's block indices that a step without wrong tokens selects."""
        config, parts, start = self.config, [], 0
        token = config.selection == "token"
        if indices.ndim == 4:
            # Token mode (B, N, H_kv, n), tile mode (B, H, tiles, n).
            indices = indices.flatten(0, 1) if token else indices.transpose(1, 2).flatten(0, 1)
        elif not token:
            indices = indices.transpose(0, 1)
        size = 1 if token else config.q_tile_size
        for b, new in enumerate(step.new):
            first, past = self.at[b], self.at[b] + new
            tiles = (first // size, -(-past // size)) if new else (0, 0)
            rows = indices[start + tiles[0] : start + tiles[1]]
            # What the sequence does not have yet is not there.
            parts.append(torch.where(rows < num_selection_blocks(past, config), rows, -1))
            start += -(-self.lengths[b] // size)
        return parts


def laid_out_rows(rows: list[Tensor], step: Step, config) -> Tensor:
    """``block_indices`` of a step from the rows of each sequence's tokens or tiles."""
    token = config.selection == "token"
    if not step.batched:
        packed = torch.cat(rows)
        return packed if token else packed.transpose(0, 1)
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return batch if token else batch.transpose(1, 2)


def assert_decodes(case: Decoding, backend: str):
    """Every step gives the rows of the whole, and selects its blocks."""
    problem, steps, cache, seed = case
    whole = problem.forward(backend=backend)
    blocks = problem.select_blocks(backend=backend)
    flat = whole.flatten(0, 1) if whole.ndim == 4 else whole
    feed = Feed(problem, seed)
    for step in steps:
        arguments = feed.arguments(step)
        own, expected = feed.rows(step)
        select = {n: x for n, x in arguments.items() if n not in NOT_SELECTING}
        if not any(step.wrong):
            selected = nsa.select_blocks(**select, cache=cache, backend=backend)
            rows = feed.unit_rows(blocks, step)
            actual = packed_units(selected, [len(x) for x in rows], problem.config)
            assert torch.equal(actual, torch.cat(rows))
        out = nsa.forward(**arguments, cache=cache, backend=backend)
        out = out.flatten(0, 1) if out.ndim == 4 else out
        torch.testing.assert_close(out[own], flat[expected], **CLOSE)
        feed.advance(step)
        if any(step.wrong):
            cache.truncate(feed.at)
        assert cache.lengths.tolist() == feed.at
    assert not cache.overflowed


NOT_SELECTING = ("v", "gates", "gate_proj_weight", "compress_v_weight")


def packed_units(indices: Tensor, rows: list[int], config) -> Tensor:
    """Block indices of a step, with ``rows`` tokens or tiles of each sequence."""
    if config.selection == "token":
        return indices.flatten(0, 1) if indices.ndim == 4 else indices
    if indices.ndim == 3:
        return indices.transpose(0, 1)
    tiles = indices.transpose(1, 2)
    assert tiles.shape[1] == max(rows)
    assert all((x[count:] == -1).all() for x, count in zip(tiles, rows, strict=True))
    return torch.cat([x[:count] for x, count in zip(tiles, rows, strict=True)])


def contents(cache: nsa.Cache) -> list[Tensor]:
    """Keys, values and compressed ones of each sequence, by position."""
    found, device = [], cache.device
    for b, length in enumerate(cache.lengths.tolist()):
        sequence = torch.full((length,), b, device=device)
        at = token_places(cache, sequence, torch.arange(length, device=device))
        blocks = torch.arange(num_compressed_blocks(length, cache.config), device=device)
        compressed = block_places(cache, torch.full_like(blocks, b), blocks)
        found += [at.read(cache.k_pages), at.read(cache.v_pages)]
        found += [compressed.read(cache.k_cmp_pages), compressed.read(cache.v_cmp_pages)]
        for rings, of, reach in (
            (cache.window_rings, window_places, cache.config.window_size),
            (cache.open_rings, open_places, cache.config.compress_block_size),
        ):
            if rings is not None:
                last = torch.arange(max(0, length - reach + 1), length, device=device)
                found += [of(cache, torch.full_like(last, b), last).read(x) for x in rings]
        for lists in (cache.block_lists, cache.group_lists):
            if lists is not None and length:
                tile = (length - 1) // cache.config.q_tile_size
                found.append(lists[b, cache.list_slot(tile)])
    return found


def assert_same_contents(actual: nsa.Cache, expected: nsa.Cache, atol: float = 1e-12):
    """Both caches hold the same sequences."""
    assert torch.equal(actual.lengths, expected.lengths)
    for x, y in zip(contents(actual), contents(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def append_on_device(cache: nsa.Cache, k: Tensor, v: Tensor, bounds: Tensor):
    """Append tokens without the host: ``k`` and ``v`` packed, boundaries int64."""
    tokens = locate_new_tokens(cache, bounds, k.shape[0], None)
    compressed = tuple(
        compress_candidates(cache, tokens, kind, x, None) for kind, x in enumerate((k, v))
    )
    append(cache, tokens, (k, k, k), (v, v, v), compressed)
