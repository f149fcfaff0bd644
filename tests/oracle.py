"""An independent float64 oracle of Native Sparse Attention: plain loops over tokens.

Written from the formulas alone (https://arxiv.org/abs/2502.11089, section 3). It shares no code
with ``nsa``; of its configuration it only reads the fields. Slow: for sequences of up to about 150
tokens.
"""

import math
from itertools import pairwise
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

NEGATIVE, POSITIVE = -math.inf, math.inf


class OracleResult(NamedTuple):
    """What the definition gives for one call.

    ``scores`` has the shape of ``block_indices`` with one entry a selection block instead of the
    last axis: -inf for a block that is no candidate, +inf for a forced one. Both are None where
    there is no sequence.
    """

    out: Tensor
    block_indices: Tensor | None
    scores: Tensor | None


class Sequence(NamedTuple):
    """One sequence as nested lists: ``q[t][h]`` is a list of ``D`` floats."""

    q: list
    k: tuple[list, list, list]
    v: tuple[list, list, list]
    k_cmp: list
    v_cmp: list
    gates: list
    scale: float


def nsa_oracle(
    q, k, v, config, *, cu_seqlens=None, max_seqlen=None, block_indices=None, **arguments
) -> OracleResult:
    """The output, the selected blocks and their scores, for batched or packed input."""
    arguments = {name: x for name, x in arguments.items() if x is not None}
    if q.ndim == 4:
        spans = [(slice(b, b + 1), q.shape[1]) for b in range(q.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(slice(a, b), b - a) for a, b in pairwise(bounds)]
    cursor = {"blocks": 0, "tiles": 0}
    results = []
    for span, length in spans:
        own = {name: _of_sequence(name, x, q, span) for name, x in arguments.items()}
        own |= {"k": _of_sequence("k", k, q, span), "v": _of_sequence("v", v, q, span)}
        own["q"] = _of_sequence("q", q, q, span)
        blocks = max(0, (length - config.compress_block_size) // config.compress_stride + 1)
        if "compressed_kv" in arguments and q.ndim == 3:
            part = slice(cursor["blocks"], cursor["blocks"] + blocks)
            own["compressed_kv"] = tuple(x[part] for x in arguments["compressed_kv"])
        cursor["blocks"] += blocks
        tiles = -(-length // config.q_tile_size)
        indices = _indices_of_sequence(block_indices, config, q, span, cursor["tiles"], tiles)
        cursor["tiles"] += tiles
        results.append(_one_sequence(config=config, block_indices=indices, **own))
    return _join(results, q, v, config)


def _of_sequence(name: str, x, q: Tensor, span: slice):
    if isinstance(x, (tuple, list)):
        return tuple(_of_sequence(name, part, q, span) for part in x)
    if name.endswith("weight"):
        return x
    return x[span][0] if q.ndim == 4 else x[span]


def _indices_of_sequence(indices, config, q, span, first_tile, num_tiles):
    if indices is None or config.selection == "token":
        return None if indices is None else _of_sequence("block_indices", indices, q, span)
    if q.ndim == 4:
        return indices[span][0]
    return indices[:, first_tile : first_tile + num_tiles]


def _join(results: list[OracleResult], q: Tensor, v, config) -> OracleResult:
    dim = (v[0] if isinstance(v, (tuple, list)) else v).shape[-1]
    if not results:
        empty = torch.zeros(*q.shape[:-1], dim, dtype=torch.float64)
        return OracleResult(empty, None, None)
    width = max(result.scores.shape[-1] for result in results)
    pad = [
        torch.nn.functional.pad(r.scores, (0, width - r.scores.shape[-1]), value=NEGATIVE)
        for r in results
    ]
    outs, indices = [r.out for r in results], [r.block_indices for r in results]
    if q.ndim == 4:
        return OracleResult(torch.stack(outs), torch.stack(indices), torch.stack(pad))
    unit_axis = 0 if config.selection == "token" else 1
    return OracleResult(
        torch.cat(outs), torch.cat(indices, dim=unit_axis), torch.cat(pad, dim=unit_axis)
    )


def _one_sequence(
    *,
    q,
    k,
    v,
    config,
    gates=None,
    gate_proj_weight=None,
    compress_k_weight=None,
    compress_v_weight=None,
    compressed_kv=None,
    block_indices=None,
) -> OracleResult:
    three_k = k if isinstance(k, tuple) else (k, k, k)
    three_v = v if isinstance(v, tuple) else (v, v, v)
    if compressed_kv is None:
        k_cmp = _compress(_lists(three_k[0]), _lists(compress_k_weight), config)
        v_cmp = _compress(_lists(three_v[0]), _lists(compress_v_weight), config)
    else:
        k_cmp, v_cmp = _lists(compressed_kv[0]), _lists(compressed_kv[1])
    scale = q.shape[-1] ** -0.5 if config.scale is None else config.scale
    sequence = Sequence(
        _lists(q),
        tuple(_lists(x) for x in three_k),
        tuple(_lists(x) for x in three_v),
        k_cmp,
        v_cmp,
        _gates(_lists(q), _lists(gates), _lists(gate_proj_weight)),
        scale,
    )
    heads = (q.shape[1], three_k[0].shape[1])
    length, num_kv_heads = q.shape[0], heads[1]
    score = _token_scores if config.selection == "token" else _tile_scores
    scores = score(sequence, config, *heads)
    num_blocks = -(-length // config.select_block_size)
    if block_indices is None:
        n = config.num_selected_blocks
        # A forced block past the end keeps its slot.
        real = range(num_blocks)
        chosen = [[[J for J in _best(row, n) if J in real] for row in rows] for rows in scores]
    else:
        chosen = [[[J for J in row if J >= 0] for row in rows] for rows in block_indices.tolist()]
    scores = [[row[:num_blocks] for row in rows] for rows in scores]
    out = _attend(sequence, config, chosen, *heads)
    tiles = -(-length // config.q_tile_size)
    units = (length, num_kv_heads) if config.selection == "token" else (heads[0], tiles)
    return OracleResult(
        torch.tensor(out, dtype=torch.float64).reshape(*q.shape[:2], three_v[0].shape[-1]),
        _table(chosen, (*units, config.num_selected_blocks), -1, torch.int32),
        _table(scores, (*units, num_blocks), NEGATIVE, torch.float64),
    )


def _attend(sequence, config, chosen, num_heads, num_kv_heads) -> list:
    """``out[t][h]``, given the blocks chosen for every unit."""
    groups = _tile_groups(sequence, config, num_heads, num_kv_heads)
    out = []
    for t in range(len(sequence.q)):
        tile, rows = t // config.q_tile_size, []
        for h in range(num_heads):
            kv = h // (num_heads // num_kv_heads)
            listed = chosen[t][kv] if config.selection == "token" else chosen[h][tile]
            taken = None if groups is None else groups[h][tile]
            rows.append(_attend_token(sequence, config, t, h, kv, listed, taken))
        out.append(rows)
    return out


def _lists(x: Tensor | None):
    return None if x is None else x.detach().double().tolist()


def _table(rows: list, shape: tuple[int, ...], fill, dtype: torch.dtype) -> Tensor:
    padded = [[row + [fill] * (shape[2] - len(row)) for row in unit] for unit in rows]
    return torch.tensor(padded, dtype=dtype).reshape(shape)


def _dot(a: list, b: list) -> float:
    return sum(map(mul, a, b))


def _gates(q: list, gates: list | None, weight: list | None) -> list:
    """``gates[t][h]`` is (compressed, selected, window)."""
    if gates is not None:
        return gates
    if weight is None:
        return [[[1 / 3] * 3 for _ in row] for row in q]
    return [
        [[1 / (1 + math.exp(-_dot(x, w))) for w in weight[h]] for h, x in enumerate(row)]
        for row in q
    ]


def _compress(x: list, weight: list | None, config) -> list:
    """``x_cmp[j] = mean(x[j*d : j*d + l])``, then ``@ weight[kv]`` where given."""
    size, stride = config.compress_block_size, config.compress_stride
    out = []
    j = 0
    while j * stride + size <= len(x):
        heads = []
        for kv in range(len(x[0])):
            rows = [x[s][kv] for s in range(j * stride, j * stride + size)]
            mean = [sum(column) / size for column in zip(*rows, strict=True)]
            if weight is not None:
                mean = [_dot(mean, column) for column in zip(*weight[kv], strict=True)]
            heads.append(mean)
        out.append(heads)
        j += 1
    return out


def _sees_compressed(config, t: int, j: int, rule: str) -> bool:
    if not config.causal:
        return True
    begin = j * config.compress_stride
    return begin + config.compress_block_size - 1 <= t if rule == "complete" else begin <= t


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits, default=0.0)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def _overlap(config, j: int, block: int) -> int:
    """Tokens that compressed block ``j`` and the selection block share."""
    low = max(j * config.compress_stride, block * config.select_block_size)
    high = min(
        j * config.compress_stride + config.compress_block_size,
        (block + 1) * config.select_block_size,
    )
    return max(0, high - low)


def _is_forced(config, block: int, t: int) -> bool:
    own = t // config.select_block_size
    initial = block < config.num_initial_blocks
    return block <= own and (initial or own - block < config.num_local_blocks)


def _token_scores(sequence, config, num_heads, num_kv_heads) -> list:
    """``scores[t][kv][block]``."""
    length = len(sequence.q)
    num_blocks = -(-length // config.select_block_size)
    group = num_heads // num_kv_heads
    scores = []
    for t in range(length):
        visible = [
            j
            for j in range(len(sequence.k_cmp))
            if _sees_compressed(config, t, j, config.compressed_visibility)
        ]
        rows = []
        for kv in range(num_kv_heads):
            total = dict.fromkeys(visible, 0.0)
            for h in range(kv * group, (kv + 1) * group):
                logits = [
                    sequence.scale * _dot(sequence.q[t][h], sequence.k_cmp[j][kv]) for j in visible
                ]
                for j, p in zip(visible, _softmax(logits), strict=True):
                    total[j] += p
            row = []
            for block in range(num_blocks):
                if _is_forced(config, block, t):
                    row.append(POSITIVE)
                elif config.causal and block * config.select_block_size > t:
                    row.append(NEGATIVE)
                else:
                    row.append(_importance(config, total, block))
            rows.append(row)
        scores.append(rows)
    return scores


def _importance(config, probability: dict[int, float], block: int) -> float:
    """Sum of ``p[j] * |j ∩ J| / d``, term by term, so that equal terms give equal sums."""
    importance = 0.0
    for j, p in probability.items():
        importance += p * (_overlap(config, j, block) // config.compress_stride)
    return importance


def _tile_compressed_scores(sequence, config, num_heads, num_kv_heads) -> list:
    """``{j: s[j]}`` for every head and tile, over the blocks scored."""
    length = len(sequence.q)
    out = []
    for h in range(num_heads):
        kv, tiles = h // (num_heads // num_kv_heads), []
        for start in range(0, length, config.q_tile_size):
            queries = range(start, min(start + config.q_tile_size, length))
            if config.tile_summary == "first":
                summary, seen_at = sequence.q[start][h], start
            else:
                columns = zip(*(sequence.q[t][h] for t in queries), strict=True)
                summary, seen_at = [sum(c) / len(queries) for c in columns], queries[-1]
            scored = {
                j: sequence.scale * _dot(summary, sequence.k_cmp[j][kv])
                for j in range(len(sequence.k_cmp))
                if _sees_compressed(config, seen_at, j, "complete")
            }
            tiles.append(scored)
        out.append(tiles)
    return out


def _tile_scores(sequence, config, num_heads, num_kv_heads) -> list:
    """``scores[h][tile][block]``, of blocks up to the tile's end if that is past the sequence's."""
    num_blocks = -(-len(sequence.q) // config.select_block_size)
    per_block = config.select_block_size // config.compress_block_size
    scores = []
    for tiles in _tile_compressed_scores(sequence, config, num_heads, num_kv_heads):
        rows = []
        for u, scored in enumerate(tiles):
            end = config.q_tile_size * (u + 1) - 1
            width = max(num_blocks, end // config.select_block_size + 1)
            row = _block_maxima(scored, per_block, width)
            row = [POSITIVE if _is_forced(config, b, end) else s for b, s in enumerate(row)]
            rows.append(row)
        scores.append(rows)
    return scores


def _block_maxima(scored: dict[int, float], size: int, num_blocks: int) -> list[float]:
    """The largest score among the ``size`` compressed blocks of each block, -inf with none."""
    return [
        max((s for j, s in scored.items() if j // size == block), default=NEGATIVE)
        for block in range(num_blocks)
    ]


def _tile_groups(sequence, config, num_heads, num_kv_heads) -> list | None:
    """``groups[h][tile]``: the groups of compressed tokens attended; None where all are."""
    if config.num_cmp_selected_blocks is None:
        return None
    num_groups = -(-len(sequence.k_cmp) // config.cmp_group_size)
    chosen = []
    for tiles in _tile_compressed_scores(sequence, config, num_heads, num_kv_heads):
        rows = []
        for scored in tiles:
            row = _block_maxima(scored, config.cmp_group_size, num_groups)
            rows.append(_best(row, config.num_cmp_selected_blocks))
        chosen.append(rows)
    return chosen


def _best(scores: list[float], count: int) -> list[int]:
    """The ``count`` highest above -inf, equal ones going to the lower index, ascending."""
    real = [i for i, score in enumerate(scores) if score > NEGATIVE]
    return sorted(sorted(real, key=lambda i: (-scores[i], i))[:count])


def _attend_token(sequence, config, t, h, kv, listed, groups) -> list[float]:
    """The gated output of one token and head."""
    length, size, window = len(sequence.q), config.select_block_size, config.window_size
    compressed = [
        j
        for j in range(len(sequence.k_cmp))
        if _sees_compressed(config, t, j, config.compressed_visibility)
        and (groups is None or j // config.cmp_group_size in groups)
    ]
    tokens = range(t + 1) if config.causal else range(length)
    selected = [s for s in tokens if s // size in listed]
    near = [s for s in tokens if abs(t - s) < window]
    branches = (
        (sequence.k_cmp, sequence.v_cmp, compressed),
        (sequence.k[1], sequence.v[1], selected),
        (sequence.k[2], sequence.v[2], near),
    )
    out = [0.0] * len(sequence.v[0][0][0])
    for gate, (keys, values, seen) in zip(sequence.gates[t][h], branches, strict=True):
        logits = [sequence.scale * _dot(sequence.q[t][h], keys[s][kv]) for s in seen]
        for s, p in zip(seen, _softmax(logits), strict=True):
            for c, value in enumerate(values[s][kv]):
                out[c] += gate * p * value
    return out


def assert_same_selection(actual: Tensor, expected: OracleResult, near: float = 1e-9):
    """Assert that ``actual`` is the oracle's selection.

    Scores closer than ``near`` but not equal may go either way: they differ by rounding alone.
    Equal scores may not: the lower index wins.
    """
    assert actual.dtype == torch.int32
    if expected.block_indices is None:
        assert actual.numel() == 0
        return
    assert actual.shape == expected.block_indices.shape
    differs = (actual != expected.block_indices).any(dim=-1)
    for where in differs.nonzero().tolist():
        got, want, scores = (
            x[tuple(where)].tolist() for x in (actual, expected.block_indices, expected.scores)
        )
        context = f"at {where}: got {got}, expected {want}, scores {scores}"
        real = [block for block in got if block >= 0]
        assert got == sorted(set(real)) + [-1] * (len(got) - len(real)), context
        added = sorted(scores[b] for b in set(real) - set(want))
        dropped = sorted(scores[b] for b in set(want) - set(real) - {-1})
        assert len(added) == len(dropped), context
        assert not set(added) & set(dropped), context
        assert all(abs(a - b) < near for a, b in zip(added, dropped, strict=True)), context
