"""Calls of ``nsa.forward`` with one bad argument each, and the expected error."""

import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs

H, H_KV, D, DV = 4, 2, 8, 6
B, N, T = 2, 20, 25
LENGTHS = [7, 0, 18]
TOKEN = nsa.NSAConfig.paper(
    compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=3
)
TILE = nsa.NSAConfig(compress_block_size=4, num_selected_blocks=3, q_tile_size=8)


def batched(**changes):
    q, k, v = make_inputs((B, N), H, H_KV, D, DV)
    return {"q": q, "k": k, "v": v, "config": TILE, **changes}


def packed(**changes):
    q, k, v = make_inputs((T,), H, H_KV, D, DV)
    lengths = make_cu_seqlens(LENGTHS)
    return {"q": q, "k": k, "v": v, "config": TILE, "cu_seqlens": lengths, **changes}


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def blocks(*row, config=TILE):
    """``block_indices`` of the batched problem, with every row equal to ``row``."""
    shape = (B, N, H_KV, 3) if config is TOKEN else (B, H, 3, 3)
    return ints(*row).expand(shape)


# name: (arguments, error, pattern of the message)
TENSORS = {
    "q is no tensor": (batched(q=[[1.0]]), TypeError, "q must be a tensor, got list"),
    "k is no tensor": (batched(k=3), TypeError, "k must be a tensor.*got int"),
    "v is None": (batched(v=None), TypeError, "v must be a tensor.*got NoneType"),
    "k has two": (batched(k=(zeros(1),) * 2), ValueError, "k must be .*three.*got 2"),
    "v has four": (batched(v=[zeros(1)] * 4), ValueError, "v must be .*three.*got 4"),
    "one k is None": (
        batched(k=(zeros(B, N, H_KV, D), None, zeros(B, N, H_KV, D))),
        TypeError,
        r"k\[1\] must be a tensor, got NoneType",
    ),
    "one v is short": (
        batched(v=(zeros(B, N, H_KV, DV), zeros(B, N, H_KV, DV), zeros(B, N - 1, H_KV, DV))),
        ValueError,
        r"v\[2\] must have shape \(2, 20, 2, 6\), got \(2, 19, 2, 6\)",
    ),
    "sparse q": (
        batched(q=zeros(B, N, H, D).to_sparse()),
        TypeError,
        "q must be a dense tensor, got layout torch.sparse_coo",
    ),
    "nested q": (
        batched(q=torch.nested.nested_tensor([zeros(N, H, D)] * B, layout=torch.jagged)),
        TypeError,
        "q must be a dense tensor, got a nested tensor; pack sequences",
    ),
    "integer q": (batched(q=zeros(B, N, H, D).int()), TypeError, "q must .*dtype.*got torch.int32"),
    "complex q": (
        batched(q=zeros(B, N, H, D) + 0j),
        TypeError,
        "q must .*dtype.*got torch.complex64",
    ),
    "k has another dtype": (
        batched(k=zeros(B, N, H_KV, D, dtype=torch.float64)),
        TypeError,
        "k must have the dtype of q, torch.float32, got torch.float64",
    ),
    "v has another dtype": (
        batched(v=zeros(B, N, H_KV, DV, dtype=torch.bfloat16)),
        TypeError,
        "v must have the dtype of q, torch.float32, got torch.bfloat16",
    ),
    "k on another device": (
        batched(k=zeros(B, N, H_KV, D, device="meta")),
        ValueError,
        "k must be on the device of q, cpu, got meta",
    ),
    "v on another device": (
        batched(v=zeros(B, N, H_KV, DV, device="meta")),
        ValueError,
        "v must be on the device of q, cpu, got meta",
    ),
    "rank 2": (
        batched(q=zeros(N, D)),
        ValueError,
        r"q must have shape \(B, N, H, D\).*got \(20, 8",
    ),
    "packed q without cu_seqlens": (
        batched(q=zeros(T, H, D)),
        ValueError,
        r"q must have shape \(B, N, H, D\).*got \(25, 4, 8\)",
    ),
    "batched q with cu_seqlens": (
        packed(q=zeros(B, N, H, D)),
        ValueError,
        r"q must have shape \(T, H, D\) with cu_seqlens, got \(2, 20, 4, 8\)",
    ),
    "k of rank 3": (
        batched(k=zeros(N, H_KV, D)),
        ValueError,
        r"k must have shape .*got \(20, 2, 8\)",
    ),
    "v of rank 3": (batched(v=zeros(N, H_KV, D)), ValueError, r"v must have .*got \(20, 2, 8\)"),
    "no head": (batched(q=zeros(B, N, 0, D)), ValueError, r"q must .*head.*got \(2, 20, 0, 8\)"),
    "no channel": (batched(q=zeros(B, N, H, 0)), ValueError, r"q must .*got \(2, 20, 4, 0\)"),
    "no KV head": (batched(k=zeros(B, N, 0, D)), ValueError, "k must .*4 heads of q, got 0"),
    "H_kv does not divide H": (
        batched(k=zeros(B, N, 3, D)),
        ValueError,
        "k must .*heads.* divides the 4 heads of q, got 3",
    ),
    "more KV heads than heads": (
        batched(k=zeros(B, N, 8, D)),
        ValueError,
        "k must .*heads.*4 heads of q, got 8",
    ),
    "k and v heads differ": (
        batched(v=zeros(B, N, 4, DV)),
        ValueError,
        r"v must have shape \(2, 20, 2, 6\), got \(2, 20, 4, 6\)",
    ),
    "k has another batch": (
        batched(k=zeros(1, N, H_KV, D)),
        ValueError,
        r"k must have shape \(2, 20, 2, 8\), got \(1, 20, 2, 8\)",
    ),
    "k has another head_dim": (
        batched(k=zeros(B, N, H_KV, D + 1)),
        ValueError,
        r"k must have shape \(2, 20, 2, 8\), got \(2, 20, 2, 9\)",
    ),
    "config is a dict": (batched(config={}), TypeError, "config must be an? .*NSAConfig.*got dict"),
    "unknown backend": (batched(backend="fast"), ValueError, "backend must be one of.*got 'fast'"),
}
SEQUENCES = {
    "list": (packed(cu_seqlens=[0, T]), TypeError, "cu_seqlens must be an int32 tensor, got list"),
    "int64": (
        packed(cu_seqlens=ints(0, T, dtype=torch.int64)),
        TypeError,
        "cu_seqlens must have dtype torch.int32, got torch.int64",
    ),
    "rank 2": (
        packed(cu_seqlens=ints([0, T])),
        ValueError,
        r"cu_seqlens must have shape \(S \+ 1,\), got \(1, 2\)",
    ),
    "empty": (packed(cu_seqlens=ints()), ValueError, r"cu_seqlens must have shape .*got \(0,\)"),
    "start": (packed(cu_seqlens=ints(1, T)), ValueError, "cu_seqlens must start at 0, got 1"),
    "early end": (packed(cu_seqlens=ints(0, 9)), ValueError, "cu_seqlens must end at.*25.*got 9"),
    "late end": (packed(cu_seqlens=ints(0, 99)), ValueError, "cu_seqlens must end at.*25.*got 99"),
    "decreasing": (
        packed(cu_seqlens=ints(0, 9, 4, T)),
        ValueError,
        "cu_seqlens must not decrease, got 9 then 4",
    ),
    "device": (
        packed(cu_seqlens=ints(0, T).to("meta")),
        ValueError,
        "cu_seqlens must be on the device of q, cpu, got meta",
    ),
    "max_seqlen too small": (
        packed(max_seqlen=17),
        ValueError,
        "max_seqlen must be at least the longest sequence, 18, got 17",
    ),
    "max_seqlen is a float": (
        packed(max_seqlen=18.0),
        TypeError,
        "max_seqlen must be an int.*18.0",
    ),
    "max_seqlen alone": (
        batched(max_seqlen=20),
        ValueError,
        "max_seqlen must be None without cu_seqlens, got 20",
    ),
}
CMP = ints(0).float().expand(B, 5, H_KV, D), ints(0).float().expand(B, 5, H_KV, DV)
WEIGHTS = {
    "gates shape": (
        batched(gates=zeros(B, N, H, 2)),
        ValueError,
        r"gates must have shape \(2, 20, 4, 3\), got \(2, 20, 4, 2\)",
    ),
    "packed gates": (
        packed(gates=zeros(B, N, H, 3)),
        ValueError,
        r"gates must have shape \(25, 4, 3\), got \(2, 20, 4, 3\)",
    ),
    "gates dtype": (
        batched(gates=zeros(B, N, H, 3, dtype=torch.float64)),
        TypeError,
        "gates must have the dtype of q, torch.float32, got torch.float64",
    ),
    "gates kind": (batched(gates=0.5), TypeError, "gates must be a tensor, got float"),
    "gate_proj_weight shape": (
        batched(gate_proj_weight=zeros(H, D, 3)),
        ValueError,
        r"gate_proj_weight must have shape \(4, 3, 8\), got \(4, 8, 3\)",
    ),
    "gate_proj_weight device": (
        batched(gate_proj_weight=zeros(H, 3, D, device="meta")),
        ValueError,
        "gate_proj_weight must be on the device of q, cpu, got meta",
    ),
    "compress_k_weight shape": (
        batched(compress_k_weight=zeros(H, D, D)),
        ValueError,
        r"compress_k_weight must have shape \(2, 8, 8\), got \(4, 8, 8\)",
    ),
    "compress_v_weight shape": (
        batched(compress_v_weight=zeros(H_KV, D, D)),
        ValueError,
        r"compress_v_weight must have shape \(2, 6, 6\), got \(2, 8, 8\)",
    ),
    "compress_v_weight dtype": (
        batched(compress_v_weight=zeros(H_KV, DV, DV, dtype=torch.float16)),
        TypeError,
        "compress_v_weight must have the dtype of q, torch.float32, got torch.float16",
    ),
    "compressed_kv kind": (
        batched(compressed_kv=zeros(2, 2)),
        TypeError,
        "compressed_kv must be a tuple.*got Tensor",
    ),
    "compressed_kv of three": (
        batched(compressed_kv=(*CMP, CMP[0])),
        ValueError,
        "compressed_kv must be .*got 3",
    ),
    "compressed_kv holds None": (
        batched(compressed_kv=(CMP[0], None)),
        TypeError,
        r"compressed_kv\[1\] must be a tensor, got NoneType",
    ),
    "compressed keys short": (
        batched(compressed_kv=(CMP[0][:, 1:], CMP[1])),
        ValueError,
        r"compressed_kv\[0\] must have shape \(2, 5, 2, 8\), got \(2, 4, 2, 8\)",
    ),
    "compressed values wide": (
        batched(compressed_kv=(CMP[0], CMP[0])),
        ValueError,
        r"compressed_kv\[1\] must have shape \(2, 5, 2, 6\), got \(2, 5, 2, 8\)",
    ),
    # One block of 4 tokens in a sequence of 7, four in one of 18.
    "packed compressed keys": (
        packed(compressed_kv=(zeros(6, H_KV, D), zeros(6, H_KV, DV))),
        ValueError,
        r"compressed_kv\[0\] must have shape \(5, 2, 8\), got \(6, 2, 8\)",
    ),
    "compressed_kv and k weight": (
        batched(compressed_kv=CMP, compress_k_weight=zeros(H_KV, D, D)),
        ValueError,
        "compress_k_weight must be None with compressed_kv",
    ),
    "compressed_kv and v weight": (
        batched(compressed_kv=CMP, compress_v_weight=zeros(H_KV, DV, DV)),
        ValueError,
        "compress_v_weight must be None with compressed_kv",
    ),
}
BLOCKS = {
    "kind": (batched(block_indices=[0]), TypeError, "block_indices must be an int32 .*got list"),
    "dtype": (
        batched(block_indices=blocks(0, 1, 2).long()),
        TypeError,
        "block_indices must have dtype torch.int32, got torch.int64",
    ),
    "device": (
        batched(block_indices=blocks(0, 1, 2).to("meta")),
        ValueError,
        "block_indices must be on the device of q, cpu, got meta",
    ),
    "tile shape": (
        batched(block_indices=blocks(0, 1, 2, config=TOKEN)),
        ValueError,
        r"block_indices must have shape \(2, 4, 3, 3\).*'tile', got \(2, 20, 2, 3\)",
    ),
    "token shape": (
        batched(config=TOKEN, block_indices=blocks(0, 1, 2)),
        ValueError,
        r"block_indices must have shape \(2, 20, 2, 3\).*'token', got \(2, 4, 3, 3\)",
    ),
    "slots": (
        batched(block_indices=blocks(0, 1, 2)[..., :2]),
        ValueError,
        r"block_indices must have shape \(2, 4, 3, 3\).*got \(2, 4, 3, 2\)",
    ),
    # One tile of the first sequence, none of the second and three of the third.
    "packed tiles": (
        packed(block_indices=torch.zeros(H, 5, 3, dtype=torch.int32)),
        ValueError,
        r"block_indices must have shape \(4, 4, 3\).*got \(4, 5, 3\)",
    ),
    "packed tokens": (
        packed(config=TOKEN, block_indices=torch.zeros(H, 5, 3, dtype=torch.int32)),
        ValueError,
        r"block_indices must have shape \(25, 2, 3\).*got \(4, 5, 3\)",
    ),
    "beyond the last": (
        batched(block_indices=blocks(0, 1, 5)),
        ValueError,
        "block_indices must lie in .*5.*got 5",
    ),
    "below -1": (
        batched(block_indices=blocks(0, -2, -1)),
        ValueError,
        "block_indices must .*got -2",
    ),
    # The first sequence has two blocks, the third five.
    "beyond its own sequence": (
        packed(block_indices=ints(0, 1, 2).expand(H, 4, 3)),
        ValueError,
        "block_indices must lie in .*got 2",
    ),
    "descending": (
        batched(block_indices=blocks(0, 3, 2)),
        ValueError,
        "block_indices must ascend.*got 3 before 2",
    ),
    "twice": (
        batched(config=TOKEN, block_indices=blocks(0, 2, 2, config=TOKEN)),
        ValueError,
        "block_indices must ascend.*got 2 before 2",
    ),
    "-1 before a block": (
        batched(block_indices=blocks(0, -1, 2)),
        ValueError,
        "block_indices must ascend.*-1 only at the end.*got -1 before 2",
    ),
}
MEMORY = {
    "float": (
        batched(max_workspace_bytes=1e9),
        TypeError,
        "max_workspace_bytes must be an int or None, got 1000000000.0",
    ),
    "bool": (batched(max_workspace_bytes=True), TypeError, "max_workspace_bytes .*got True"),
    "flag": (batched(recompute_window=1), TypeError, "recompute_window must be a bool, got 1"),
    "none": (batched(max_workspace_bytes=0), ValueError, "must be at least 1, got 0"),
}
CASES = {
    f"{group}: {name}": case
    for group, cases in (
        ("tensors", TENSORS),
        ("sequences", SEQUENCES),
        ("weights", WEIGHTS),
        ("blocks", BLOCKS),
        ("memory", MEMORY),
    )
    for name, case in cases.items()
}
