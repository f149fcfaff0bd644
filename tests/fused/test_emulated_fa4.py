"""The emulated kernels against attention written out and differentiated by autograd, in float64."""

import pytest
import torch

from nsa.fused import fa4
from nsa.fused.kernel_inputs import BlockLists
from tests.helpers import emulated_fa4 as emulation

H, H_KV, D = 6, 2, 8


def make_qkv(num_queries, num_keys, value_dim=D, leading=(1,), num_kv_heads=H_KV):
    q = torch.randn(*leading, num_queries, H, D, dtype=torch.float64)
    k = torch.randn(*leading, num_keys, num_kv_heads, D, dtype=torch.float64)
    v = torch.randn(*leading, num_keys, num_kv_heads, value_dim, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v)]


def naive(q, k, v, mask, scale):
    """(out, lse) of batched attention, query by query; mask (H, Sq, Sk)."""
    # 0, but differentiable where no query sees a key.
    out = q.new_zeros(*q.shape[:-1], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    rows = []
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = mask[h, i].nonzero().flatten()
        if not len(seen):
            continue
        kv = h // (q.shape[2] // k.shape[2])
        scores = scale * k[b, seen, kv] @ q[b, i, h]
        lse[b, h, i] = scores.logsumexp(0).detach()
        rows.append(((b, i, h), scores.softmax(0) @ v[b, seen, kv]))
    if rows:
        where, values = zip(*rows, strict=True)
        out = out.index_put(tuple(torch.tensor(where).T), torch.stack(values))
    return out, lse


def check(forward, backward, tensors, mask):
    """Both calls against the naive attention; ``forward`` and ``backward`` lack the tensors."""
    expected_out, expected_lse = naive(*tensors, mask, 0.3)
    plain = [x.detach() for x in tensors]
    out, lse = forward(*plain, scale=0.3)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    dout = torch.randn_like(out)
    gradients = backward(dout, *plain, emulation.row_statistics(dout, out, lse), scale=0.3)
    expected = torch.autograd.grad(expected_out, tensors, dout)
    for actual, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, exact)


def dense_mask(num_queries, num_keys, left, right):
    mask = torch.zeros(H, num_queries, num_keys, dtype=torch.bool)
    for i in range(num_queries):
        position = i + num_keys - num_queries
        first = 0 if left is None else max(0, position - left)
        last = num_keys - 1 if right is None else position + right
        mask[:, i, first : max(0, last + 1)] = True
    return mask


@pytest.mark.parametrize("lengths", [(7, 7), (9, 4), (4, 9), (3, 0), (0, 3)])
@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (None, None)), (True, (2, None)), (False, (1, 2))],
)
def test_dense(lengths, causal, window):
    right = 0 if causal else window[1]
    keywords = {"causal": causal, "window_size": window}
    check(
        lambda *a, **k: emulation.dense_forward(*a, **k, **keywords),
        lambda *a, **k: emulation.dense_backward(*a, **k, **keywords),
        make_qkv(*lengths, leading=(2,)),
        dense_mask(*lengths, window[0], right),
    )


@pytest.mark.parametrize("ends", [(1, 0), (3, 2), (2, 9)])
def test_keys_that_are_blocks(ends):
    keywords = {"causal": False, "window_size": (None, None), "block_ends": ends}
    stride, first = ends
    query, key = torch.arange(9)[:, None], torch.arange(4)
    check(
        lambda *a, **k: emulation.dense_forward(*a, **k, **keywords),
        lambda *a, **k: emulation.dense_backward(*a, **k, **keywords),
        make_qkv(9, 4, leading=(2,)),
        (key * stride + first <= query).expand(H, 9, 4),
    )


def test_dense_value_dim():
    keywords = {"causal": True, "window_size": (None, None)}
    check(
        lambda *a, **k: emulation.dense_forward(*a, **k, **keywords),
        lambda *a, **k: emulation.dense_backward(*a, **k, **keywords),
        make_qkv(5, 5, value_dim=4, num_kv_heads=H),
        dense_mask(5, 5, None, 0),
    )


def test_packed_is_each_sequence_alone():
    lengths_q, lengths_k = [3, 0, 5, 1], [4, 2, 5, 0]
    q, k, v = (x[0].detach() for x in make_qkv(sum(lengths_q), sum(lengths_k)))
    keywords = {"scale": 0.3, "causal": True, "window_size": (2, None)}
    bounds = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k)]
    packed = dict(cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])
    out, lse = emulation.dense_forward(q, k, v, **keywords, **packed)
    dout = torch.randn_like(out)
    statistics = emulation.row_statistics(dout, out, lse)
    gradients = emulation.dense_backward(dout, q, k, v, statistics, **keywords, **packed)
    split = [x.split(lengths_q) for x in (q, dout)] + [x.split(lengths_k) for x in (k, v)]
    parts = []
    for q1, dout1, k1, v1 in zip(*split, strict=True):
        alone = [x[None] for x in (q1, k1, v1)]
        results = emulation.dense_forward(*alone, **keywords)
        statistics = emulation.row_statistics(dout1[None], *results)
        gradients1 = emulation.dense_backward(dout1[None], *alone, statistics, **keywords)
        parts.append((*results, *gradients1))
    for i, actual in enumerate((out, lse, *gradients)):
        expected = torch.cat([part[i][0] for part in parts], dim=1 if i == 1 else 0)
        torch.testing.assert_close(actual, expected)


def make_lists(listed, full, query_block, key_block, transposed=False):
    """Lists of ``listed`` bool (H, query blocks, key blocks), ``full`` ones apart; junk unread."""

    def compact(chosen):
        chosen = chosen.mT if transposed else chosen
        count = chosen.sum(-1)
        index = torch.randint(-9, 99, chosen.shape)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in chosen.shape[:2])).tolist():
            blocks = chosen[tuple(place)].nonzero().flatten()
            index[tuple(place)][: len(blocks)] = blocks
        return count[None].int(), index[None, ..., : max(1, int(count.max()))].int()

    if full is None:
        return BlockLists(*compact(listed), None, None, query_block, key_block)
    return BlockLists(*compact(listed & ~full), *compact(listed & full), query_block, key_block)


@pytest.mark.parametrize("key_block", [64, 128])
@pytest.mark.parametrize("mask", ["none", "causal", "limit"])
@pytest.mark.parametrize("with_full", [False, True])
def test_sparse(key_block, mask, with_full):
    num_queries, num_keys, query_block = 150, 150 if mask == "causal" else 170, 64
    q, k, v = make_qkv(num_queries, num_keys)
    query, key = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    limit = torch.randint(0, num_keys, (num_queries,), dtype=torch.int32)
    limit[::7], limit[64:128] = 0, num_keys
    allowed = {"none": key >= 0, "causal": key <= query, "limit": key < limit[:, None]}[mask]
    blocks = (-(-num_queries // query_block), -(-num_keys // key_block))
    listed = torch.rand(H, *blocks) < 0.6
    listed[0, 0], listed[1, :, 0] = False, False
    pair = (query // query_block, key // key_block)
    hidden = torch.zeros(blocks, dtype=torch.int64)
    hidden.index_put_(pair, (~allowed).long().expand(num_queries, num_keys), accumulate=True)
    full = (hidden == 0).expand(listed.shape) if with_full else None
    keywords = {"causal": mask == "causal", "key_limit": limit if mask == "limit" else None}
    lists = [make_lists(listed, full, query_block, key_block, t) for t in (False, True)]
    check(
        lambda *a, **k: emulation.sparse_forward(*a, lists[0], **k, **keywords),
        lambda *a, **k: emulation.sparse_backward(*a, lists[1], **k, **keywords),
        [q, k, v],
        listed[:, pair[0], pair[1]] & allowed,
    )


def sparse_call(index, count, **changes):
    shape = (1, 128, 1, D)
    lists = BlockLists(
        torch.tensor(count, dtype=torch.int32).expand(1, 1, 2).contiguous(),
        torch.tensor(index, dtype=torch.int32).expand(1, 1, 2, -1).contiguous(),
        None,
        None,
        64,
        64,
    )
    arguments = {"causal": False, "scale": 1.0, **changes}
    q, k, v = (torch.randn(shape) for _ in range(3))
    k, v = (arguments.pop(name, x) for name, x in (("k", k), ("v", v)))
    return emulation.sparse_forward(q, k, v, lists, **arguments)


@pytest.mark.parametrize(
    ("index", "count", "changes", "message"),
    [
        ([1, 0], 2, {}, "ascend"),
        ([1, 1], 2, {}, "ascend"),
        ([0, 2], 2, {}, "range"),
        ([-1, 0], 2, {}, "range"),
        ([0, 1], 3, {}, "count"),
        ([0, 1, 1], 2, {}, "width"),
        ([0, 1], 2, {"causal": True, "key_limit": torch.ones(128).int()}, "each obey"),
        ([0, 1], 2, {"v": torch.full((1, 128, 1, D), torch.nan)}, "finite"),
    ],
)
def test_bad_calls_are_refused(index, count, changes, message):
    with pytest.raises(AssertionError, match=message):
        sparse_call(index, count, **changes)


def test_backward_refuses_other_pairs():
    q, k, v = (x.detach() for x in make_qkv(128, 128))
    listed = torch.ones(H, 2, 2, dtype=torch.bool)
    out, lse = emulation.sparse_forward(
        q, k, v, make_lists(listed, None, 64, 64), scale=1.0, causal=False
    )
    listed[3, 1, 0] = False
    lists = make_lists(listed, None, 64, 64, transposed=True)
    statistics = emulation.row_statistics(out, out, lse)
    # With a gate of a half, P sums to that.
    for log2_gate in (0, -1):
        gated = statistics._replace(lse_log2=statistics.lse_log2 - log2_gate)
        with pytest.raises(AssertionError, match="different pairs"):
            emulation.sparse_backward(out, q, k, v, gated, lists, scale=1.0, causal=False)


def test_fixture_replaces_the_kernels(fused_on_cpu):
    for name in emulation.NAMES:
        assert getattr(fa4, name) is getattr(emulation, name)
