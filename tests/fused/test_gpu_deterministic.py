"""On the GPU: the same bits each time in the output and in every gradient, where asked for."""

import pytest
import torch

import nsa
from nsa.fused import schedule
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import (
    Case,
    Variant,
    assert_equal_but_for_rounding,
    default_case,
    gpu_test,
    make_tensors,
    run,
)
from tests.helpers.selected_cases import make_problem, results

pytestmark = gpu_test

RUNS = 20
WIDE = Variant(128, 128, 16, torch.bfloat16, 0)
SPARSE = nsa.NSAConfig(
    num_cmp_selected_blocks=2, cmp_group_size=128, compress_block_size=32, select_block_size=64
)
CONFIGS = {
    "tile": nsa.NSAConfig(num_selected_blocks=8),
    "tile, wide blocks": nsa.NSAConfig(select_block_size=128, q_tile_size=128),
    "sparse": SPARSE,
    "non-causal": nsa.NSAConfig(num_selected_blocks=4, causal=False, tile_summary="mean"),
    "token": nsa.NSAConfig.paper(),
    # Which leave sums of keys, to which those of the window are added.
    "token, compressed given": nsa.NSAConfig.paper(),
}
COMPRESSORS = {"token": "weights", "token, compressed given": "given"}
PACKS = {
    "batched": dict(batch=2, lengths=(4096,)),
    "one sequence": dict(batch=1, lengths=(5000,)),
    "packed": dict(packed=True, lengths=(3000, 0, 1, 63, 2100)),
    "many sequences": dict(packed=True, lengths=(17,) * 300),
}


def make_case(config: str, pack: str) -> Case:
    compressor = COMPRESSORS.get(config, "mean")
    changes = dict(config=CONFIGS[config], compressor=compressor, variant=WIDE, num_kv_heads=2)
    return default_case(**changes, **PACKS[pack])


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("config", CONFIGS)
def test_results_have_the_same_bits_each_time(config, pack, monkeypatch):
    # Other tests run beside this one, and FA4's sums of many short sequences take 40 GiB.
    monkeypatch.setattr(schedule, "DETERMINISTIC_SHARE", 1 / 8)
    case = make_case(config, pack)
    arguments = make_tensors(case)
    dout = torch.randn_like(arguments["q"])
    expected = run("fused", arguments, case.config, dout, deterministic=True)
    differing = count_differences(
        lambda: run("fused", arguments, case.config, dout, deterministic=True), expected, RUNS
    )
    assert differing == dict.fromkeys(expected, 0)
    default = run("fused", arguments, case.config, dout)
    assert torch.equal(default["out"], expected["out"])
    for name, x in expected.items():
        assert_equal_but_for_rounding(x, default[name])


def count_differences(function, expected: dict, runs: int) -> dict[str, int]:
    """How many of ``runs`` give other bits than ``expected``, by name."""
    counts = {name: torch.zeros((), dtype=torch.int64, device="cuda") for name in expected}
    for _ in range(runs):
        for name, x in function().items():
            counts[name] += (x.view(torch.int16) != expected[name].view(torch.int16)).any()
    return {name: int(count) for name, count in counts.items()}


@pytest.mark.parametrize("block_size", [32, 128])
def test_the_selected_branch_has_the_same_bits_each_time(block_size):
    problem = make_problem(
        [(900, 1100), (0, 40), (1, 1), (700, 700)],
        packed=True,
        kv_heads=2,
        group=4,
        dims=(128, 128),
        block_size=block_size,
        slots=6,
        causal=True,
        dtype=torch.bfloat16,
        device="cuda",
    )

    def attend():
        options = dict(deterministic=True, backend="fused")
        out, _, *grads = results(problem, lambda x: x.attend(**options))
        return {str(i): x for i, x in enumerate((out, *grads))}

    expected = attend()
    assert count_differences(attend, expected, RUNS) == dict.fromkeys(expected, 0)


@pytest.mark.parametrize("mode", ["tile", "token"])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_pytorch_deterministic_algorithms_raise_nothing(backend, mode, monkeypatch):
    """Also with what they fill uninitialised memory with, and in the layer."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = CONFIGS[mode]
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(
        256, 4, 2, head_dim=64, config=config, compressor="mlp", backend=backend, device="cuda",
        dtype=torch.bfloat16,
    )  # fmt: skip
    x = torch.randn(700, 256, device="cuda", dtype=torch.bfloat16)
    bounds = make_cu_seqlens([500, 0, 1, 199], "cuda")

    def step():
        layer.zero_grad(set_to_none=True)
        out = layer(x, cu_seqlens=bounds)
        out.float().square().sum().backward()
        return {"out": out.detach()} | {n: p.grad for n, p in layer.named_parameters()}

    torch.use_deterministic_algorithms(True)
    try:
        expected = step()
        assert all(x.isfinite().all() for x in expected.values())
        assert count_differences(step, expected, 3) == dict.fromkeys(expected, 0)
    finally:
        torch.use_deterministic_algorithms(False)
