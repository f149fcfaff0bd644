"""What ``nsa.selected_attention`` refuses, which backend it chooses, and what changes nothing."""

import re

import pytest
import torch

import nsa
from nsa.fused import selected_branch
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.host_reads import NoHostReads
from tests.helpers.selected_cases import SelectedProblem, make_problem, results
from tests.helpers.torch_defaults import DEFAULTS

H, H_KV, D, DV = 4, 2, 8, 6
B, N, T = 2, 70, 75
LENGTHS = [35, 0, 40]


def blocks(*row: int) -> torch.Tensor:
    return torch.tensor(row, dtype=torch.int32).expand(B, N, H_KV, len(row))


def batched(**changes) -> dict:
    q, k, v = make_inputs((B, N), H, H_KV, D, DV)
    return dict(q=q, k=k, v=v, block_indices=blocks(0, 1), block_size=32) | changes


def packed(**changes) -> dict:
    q, k, v = make_inputs((T,), H, H_KV, D, DV)
    lists = torch.tensor([0, -1], dtype=torch.int32).expand(T, H_KV, 2)
    bounds = make_cu_seqlens(LENGTHS)
    return dict(q=q, k=k, v=v, block_indices=lists, block_size=32, cu_seqlens=bounds) | changes


BAD = {
    "k of three": (
        batched(k=(torch.zeros(B, N, H_KV, D),) * 3),
        TypeError,
        "k must be a tensor, got tuple",
    ),
    "q on another form": (
        batched(q=torch.zeros(N, H, D)),
        ValueError,
        r"q must have shape \(B, N, H, D\), got \(70, 4, 8\)",
    ),
    "v has other heads": (
        batched(v=torch.zeros(B, N, H, DV)),
        ValueError,
        r"v must have shape \(2, 70, 2, 6\), got \(2, 70, 4, 6\)",
    ),
    "more queries than keys": (
        batched(k=torch.zeros(B, N - 1, H_KV, D), v=torch.zeros(B, N - 1, H_KV, DV)),
        ValueError,
        "q must have at most as many tokens as k, 69, got 70",
    ),
    "more packed queries than keys": (
        packed(
            k=torch.zeros(T, H_KV, D), v=torch.zeros(T, H_KV, DV),
            cu_seqlens_k=make_cu_seqlens([30, 5, 40]),
        ),
        ValueError,
        "cu_seqlens must give .*at most as many queries .*35 queries and 30 keys in sequence 0",
    ),
    "no lists": (batched(block_indices=None), TypeError, "block_indices must be an int32 tensor"),
    "int64 lists": (
        batched(block_indices=blocks(0, 1).long()),
        TypeError,
        "block_indices must have dtype torch.int32, got torch.int64",
    ),
    "lists elsewhere": (
        batched(block_indices=blocks(0, 1).to("meta")),
        ValueError,
        "block_indices must be on the device of q, cpu, got meta",
    ),
    "lists of heads": (
        batched(block_indices=torch.zeros(B, N, H, 1, dtype=torch.int32)),
        ValueError,
        r"block_indices must have shape \(2, 70, 2, n\) with n of at least 1, got \(2, 70, 4, 1\)",
    ),
    "lists without slots": (
        batched(block_indices=torch.zeros(B, N, H_KV, 0, dtype=torch.int32)),
        ValueError,
        "n of at least 1",
    ),
    "lists transposed": (
        packed(block_indices=torch.zeros(H_KV, T, 2, dtype=torch.int32)),
        ValueError,
        r"block_indices must have shape \(75, 2, n\).*got \(2, 75, 2\)",
    ),
    "beyond the last": (
        batched(block_indices=blocks(0, 3)),
        ValueError,
        r"block_indices must lie in \[0, blocks of the sequence\), at most 3, or be -1; got 3",
    ),
    "beyond its own sequence": (
        packed(cu_seqlens=make_cu_seqlens([32, 0, 43]), block_indices=torch.tensor(
            [0, 1], dtype=torch.int32).expand(T, H_KV, 2)),
        ValueError,
        "block_indices must lie in .*got 1",
    ),
    "descending": (batched(block_indices=blocks(1, 0)), ValueError, "must ascend.*got 1 before 0"),
    "twice": (batched(block_indices=blocks(1, 1)), ValueError, "must ascend.*got 1 before 1"),
    "empty slot first": (
        batched(block_indices=blocks(-1, 1)),
        ValueError,
        "-1 only at the end.*got -1 before 1",
    ),
    "block size": (batched(block_size=48), ValueError, r"block_size .*\(32, 64, 128\), got 48"),
    "block size as float": (batched(block_size=32.0), TypeError, "block_size must be an int"),
    "causal": (batched(causal=1), TypeError, "causal must be a bool, got 1"),
    "return_lse": (batched(return_lse=None), TypeError, "return_lse must be a bool, got None"),
    "scale": (batched(scale=0), ValueError, "scale must be finite and positive, got 0"),
    "scale past float32": (batched(scale=1e39), ValueError, "scale must lie in .* got 1e[+]39"),
    "scale as text": (batched(scale="1"), TypeError, "scale must be a float or None, got '1'"),
    "backend": (batched(backend="fast"), ValueError, "backend must be one of .*got 'fast'"),
    "max_seqlen": (
        packed(max_seqlen=39),
        ValueError,
        "max_seqlen must be at least the longest sequence, 40, got 39",
    ),
    "bounds of a batch": (batched(max_seqlen=70), ValueError, "max_seqlen must be None without"),
    "a Packing and more": (
        packed(
            cu_seqlens=nsa.Packing(make_cu_seqlens(LENGTHS)), cu_seqlens_k=make_cu_seqlens(LENGTHS)
        ),
        ValueError,
        "cu_seqlens_k must be None with a Packing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    arguments, error, pattern = BAD[case]
    with pytest.raises(error) as caught:
        nsa.selected_attention(**arguments)
    assert type(caught.value) is error
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("arguments", [batched, packed])
def test_the_calls_above_are_fine_unchanged(arguments):
    out, lse = nsa.selected_attention(**arguments())
    assert out.shape == (*arguments()["q"].shape[:-1], DV)
    assert lse.shape == ((B, H, N) if arguments is batched else (H, T))


def test_limits_of_the_fused_backend(monkeypatch):
    monkeypatch.setattr(nsa.fused.constraints, "_device_limit", lambda *_: None)
    monkeypatch.setattr(nsa.fused.constraints.fa4, "version_problem", lambda: None)
    half = {name: x.half() for name, x in batched().items() if name in "qkv"}

    def wide(width: int) -> dict:
        q, k, v = (x.expand(*x.shape[:-1], width) for x in make_inputs((B, N), H, H_KV, 1))
        return dict(q=q.half(), k=k.half(), v=v.half())

    many = torch.full((B, N, H_KV, 65), -1, dtype=torch.int32)
    limits = {
        "at most 64 slots in a row of block_indices, got 65": dict(block_indices=many),
        "dtype float16 or bfloat16, got torch.float32": {x: half[x].float() for x in half},
        "D of at most 256, got 257": wide(257),
    }
    for pattern, changes in limits.items():
        with pytest.raises(nsa.UnsupportedError, match=pattern):
            nsa.selected_attention(**(batched() | half | changes), backend="fused")
        # The reference can.
        out, _ = nsa.selected_attention(**(batched() | half | changes))
        assert out.isfinite().all()


def test_without_a_gpu_the_reference_is_used():
    call = batched()
    with pytest.raises(nsa.UnsupportedError, match="needs dtype float16 or bfloat16"):
        nsa.selected_attention(**call, backend="fused")
    expected = nsa.selected_attention(**call, backend="reference")
    for pair in zip(nsa.selected_attention(**call), expected, strict=True):
        assert torch.equal(*pair)


def any_problem(packed: bool) -> SelectedProblem:
    lengths = [(70, 70), (0, 9), (1, 1), (33, 130)] if packed else [(33, 130)] * 2
    return make_problem(
        lengths, packed=packed, kv_heads=2, group=2, dims=(16, 16), block_size=32, slots=3,
        dtype=torch.float32,
    )  # fmt: skip


both = pytest.mark.parametrize("backend", ["reference", "fused"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])


@both
@layouts
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.usefixtures("fused_on_cpu")
def test_global_defaults_change_nothing(default, packed, backend):
    problem = any_problem(packed)
    bounds = problem.boundaries()

    expected = problem.attend(backend=backend, **bounds)
    with DEFAULTS[default]():
        actual = nsa.selected_attention(
            *problem.leaves, problem.block_indices, block_size=32, backend=backend, **bounds
        )
    grads = [torch.autograd.grad((o.sum(), w.sin().nan_to_num().sum()), problem.leaves)
             for o, w in (actual, expected)]  # fmt: skip
    for pair in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
        assert torch.equal(*pair)


@both
@layouts
@pytest.mark.usefixtures("fused_on_cpu")
def test_autocast_changes_nothing(packed, backend):
    problem = any_problem(packed)
    expected = results(problem, lambda x: x.attend(backend=backend))

    def attend(problem):
        with torch.autocast("cpu", torch.bfloat16):
            return problem.attend(backend=backend)

    for pair in zip(results(problem, attend), expected, strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("causal", [True, False])
def test_the_host_reads_nothing_to_find_the_blocks(causal):
    config = selected_branch._config(32, causal)
    bounds = [make_cu_seqlens(x) for x in ([70, 0, 33], [70, 9, 130])]
    with NoHostReads():
        selected_branch._batched_blocks(2, 33, 130, torch.device("cpu"), config)
        selected_branch._packed_blocks(*bounds, 103, 209, config)
