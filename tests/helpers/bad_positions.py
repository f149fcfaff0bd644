"""The same as bad_arguments, for calls whose sequences have other numbers of keys than queries."""

import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.bad_arguments import (
    DV,
    H_KV,
    LENGTHS,
    B,
    D,
    H,
    N,
    T,
    batched,
    ints,
    packed,
    zeros,
)


def longer(lengths, more=0, **changes):
    """The packed problem with other numbers of keys; ``more`` belong to no sequence."""
    _, k, v = make_inputs((sum(lengths) + more,), H, H_KV, D, DV)
    call = packed(k=k, v=v, cu_seqlens_k=make_cu_seqlens(lengths), **changes)
    call["q"] = call["q"][: int(getattr(call["cu_seqlens"], "cu_seqlens", call["cu_seqlens"])[-1])]
    if isinstance(call["cu_seqlens"], nsa.Packing):
        del call["cu_seqlens_k"]
    return call


# name: (arguments, error, pattern of the message)
CASES = {
    "k is shorter": (
        batched(k=zeros(B, N - 1, H_KV, D), v=zeros(B, N - 1, H_KV, DV)),
        ValueError,
        "q must have at most as many tokens as k, 19, got 20.*pass the keys of all its tokens",
    ),
    "v is shorter than k": (
        batched(k=zeros(B, N + 1, H_KV, D)),
        ValueError,
        r"v must have shape \(2, 21, 2, 6\), got \(2, 20, 2, 6\)",
    ),
    "one k is longer": (
        batched(k=(*[zeros(B, N, H_KV, D)] * 2, zeros(B, N + 8, H_KV, D))),
        ValueError,
        r"k\[2\] must have shape \(2, 20, 2, 8\), got \(2, 28, 2, 8\)",
    ),
    "a batch starts inside a tile": (
        batched(k=zeros(B, N + 9, H_KV, D), v=zeros(B, N + 9, H_KV, DV)),
        ValueError,
        "q must start at a multiple of q_tile_size.* is 8, got 20 queries after 9 of 29 keys; cut",
    ),
    "packed k is longer": (
        packed(k=zeros(T + 8, H_KV, D), v=zeros(T + 8, H_KV, DV)),
        ValueError,
        r"k must have shape \(25, 2, 8\), got \(33, 2, 8\).*cu_seqlens_k",
    ),
    "keys alone": (
        batched(cu_seqlens_k=ints(0, T)),
        ValueError,
        "cu_seqlens_k must be None without cu_seqlens, got",
    ),
    "keys are a list": (
        packed(cu_seqlens_k=[0, T]),
        TypeError,
        "cu_seqlens_k must be an int32 tensor, got list",
    ),
    "keys are int64": (
        packed(cu_seqlens_k=ints(0, 7, 7, T, dtype=torch.int64)),
        TypeError,
        "cu_seqlens_k must have dtype torch.int32, got torch.int64",
    ),
    "keys of fewer sequences": (
        packed(cu_seqlens_k=ints(0, 7, T)),
        ValueError,
        r"cu_seqlens_k must have the shape of cu_seqlens, \(4,\).*got \(3,\)",
    ),
    "keys on another device": (
        packed(cu_seqlens_k=ints(0, 7, 7, T).to("meta")),
        ValueError,
        "cu_seqlens_k must be on the device of cu_seqlens, cpu, got meta",
    ),
    "keys start": (
        packed(cu_seqlens_k=ints(1, 7, 7, T)),
        ValueError,
        "cu_seqlens_k must start at 0, got 1",
    ),
    "keys decrease": (
        packed(cu_seqlens_k=ints(0, 9, 7, T)),
        ValueError,
        "cu_seqlens_k must not decrease, got 9 then 7",
    ),
    "keys end early": (
        longer([7, 0, 18], cu_seqlens=make_cu_seqlens([2, 0, 2]), more=1),
        ValueError,
        "cu_seqlens_k must end at the 26 tokens of k, got 25",
    ),
    "more queries than keys": (
        longer([7, 8, 10]),
        ValueError,
        "cu_seqlens must give .*got 18 queries and 10 keys in sequence 2; .*pass the keys of all",
    ),
    "queries start inside a tile": (
        longer([15, 9, 21]),
        ValueError,
        "q must start at a multiple of q_tile_size.* is 8, got 18 queries after 3 of 21 keys in "
        "sequence 2; cut sequences at",
    ),
    "a Packing of queries that start inside a tile": (
        longer([7, 8, 19], cu_seqlens=nsa.Packing(make_cu_seqlens(LENGTHS), ints(0, 7, 15, 34))),
        ValueError,
        "q must start at .*18 queries after 1 of 19 keys in sequence 2",
    ),
    "a Packing and keys": (
        packed(cu_seqlens=nsa.Packing(make_cu_seqlens(LENGTHS)), cu_seqlens_k=ints(0, 7, 7, T)),
        ValueError,
        "cu_seqlens_k must be None with a Packing as cu_seqlens.*got Tensor",
    ),
    "max_seqlen_k too small": (
        longer([15, 8, 18], max_seqlen_k=17),
        ValueError,
        "max_seqlen_k must be at least the longest sequence, 18, got 17",
    ),
    "max_seqlen_k is a float": (
        longer([15, 8, 18], max_seqlen_k=18.0),
        TypeError,
        "max_seqlen_k must be an int.*18.0",
    ),
    "max_seqlen_k without keys": (
        packed(max_seqlen_k=18),
        ValueError,
        "max_seqlen_k must be None without cu_seqlens_k, got 18",
    ),
    "max_seqlen_k alone": (
        batched(max_seqlen_k=20),
        ValueError,
        "max_seqlen_k must be None without cu_seqlens, got 20",
    ),
    "gates of the keys": (
        longer([7, 0, 26], gates=zeros(33, H, 3)),
        ValueError,
        r"gates must have shape \(25, 4, 3\), got \(33, 4, 3\)",
    ),
    # One block of 4 tokens in a sequence of 7 keys, six in one of 26.
    "compressed keys of the queries": (
        longer([7, 0, 26], compressed_kv=(zeros(5, H_KV, D), zeros(5, H_KV, DV))),
        ValueError,
        r"compressed_kv\[0\] must have shape \(7, 2, 8\), got \(5, 2, 8\)",
    ),
    "tiles of the keys": (
        longer([7, 0, 26], block_indices=torch.zeros(H, 5, 3, dtype=torch.int32)),
        ValueError,
        r"block_indices must have shape \(4, 4, 3\).*got \(4, 5, 3\)",
    ),
}
