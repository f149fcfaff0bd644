"""What the benchmarks put around the fused pipeline, on the emulated kernels."""

import argparse
from dataclasses import replace
from itertools import count

import pytest
import torch

import nsa
from measuring import gate, stages, work, workloads
from nsa.fused import compressed_forms, kernel_calls, pipeline

OPTIONS = argparse.Namespace(heads=4, kv_heads=2, head_dim=16, dtype="bfloat16")
WIDE = vars(OPTIONS) | {"head_dim": 64}
CONFIG = nsa.NSAConfig(
    compress_block_size=16, select_block_size=64, q_tile_size=64, num_selected_blocks=2
)
TOKEN = nsa.NSAConfig.paper(num_selected_blocks=4)
SPARSE = replace(CONFIG, num_cmp_selected_blocks=4, cmp_group_size=64)


@pytest.fixture(autouse=True)
def _on_cpu(fused_on_cpu, monkeypatch):
    monkeypatch.setattr(workloads, "DEVICE", "cpu")


def test_gate_passes_and_refuses(monkeypatch):
    lengths = [1, 130, 0, 64]
    gate.check_accuracy(OPTIONS, CONFIG, lengths=lengths)
    right = kernel_calls.gating_forward
    monkeypatch.setattr(kernel_calls, "gating_forward", lambda *args: right(*args) * 1.02)
    with pytest.raises(AssertionError, match="out: "):
        gate.check_accuracy(OPTIONS, CONFIG, lengths=lengths)


def test_gate_checks_a_choice_among_groups():
    gate.check_accuracy(OPTIONS, SPARSE)


@pytest.mark.parametrize("parts", [False, True])
def test_stages_of_a_pass_and_nothing_left_behind(parts, monkeypatch):
    unmet = {function.__name__ for function in stages.stage_functions()}
    for config in (CONFIG, TOKEN):
        before = dict(vars(pipeline))
        tensors = workloads.make_tensors((1, 200), OPTIONS, backward=True)
        ticks = count()
        times = stages.StageTimes(lambda ticks=ticks: next(ticks))
        attention = workloads.nsa_attention(tensors, config)
        times.run(workloads.make_step(attention, tensors), parts=parts)
        assert vars(pipeline) == before
        totals = times.milliseconds(stages.between_host)
        assert totals[()] == next(ticks) - 1
        unmet -= {path[0] for path in totals if len(path) == 1}
        # The counts of work are of stages that there are.
        met = {"/".join(path) for path in totals}
        for name in work.stage_work(200, OPTIONS, config):
            assert name in met or ("/" in name and not parts), name
        # Emulated kernels are no parts, and batched token mode has no others.
        assert any(len(path) > 1 for path in totals) == (parts and config is CONFIG)
        # A stage of select_blocks alone.
        with stages.results_of(pipeline.compress) as compressed:
            nsa.select_blocks(tensors.q, tensors.k, config=config, backend="fused")
        unmet -= {"compress"} if compressed else set()
    # A stage of several entries.
    tensors = workloads.make_tensors((2, 200), OPTIONS, backward=True)
    with stages.results_of(pipeline.query_gradient) as results:
        workloads.make_step(workloads.nsa_attention(tensors, CONFIG), tensors)()
    unmet -= {"query_gradient"} if results else set()
    # Stages of the sparse compressed branch.
    call = dict(config=SPARSE, backend="fused")
    blocks = nsa.select_blocks(tensors.q, tensors.k, **call)
    for name, block_indices in {"select_blocks_and_groups": None, "select_groups": blocks}.items():
        with stages.results_of(getattr(pipeline, name)) as results:
            nsa.forward(tensors.q, tensors.k, tensors.v, block_indices=block_indices, **call)
        unmet -= {name} if results else set()
    # Stages of a long batch, and of sums that are rounded once.
    monkeypatch.setattr(pipeline, "SHORT_TOKENS", 100)
    monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)
    monkeypatch.setattr(compressed_forms, "UNFOLDED_CTAS", 0)
    tensors = workloads.make_tensors((1, 256), argparse.Namespace(**WIDE), backward=True)
    for config in (CONFIG, TOKEN):
        ticks = count()
        times = stages.StageTimes(lambda ticks=ticks: next(ticks))
        attention = workloads.nsa_attention(tensors, config)
        times.run(workloads.make_step(attention, tensors), parts=parts)
        unmet -= {path[0] for path in times.milliseconds(stages.between_host) if len(path) == 1}
    assert not unmet


def test_results_of_a_function():
    q, k, v = workloads.make_tensors((1, 100), OPTIONS, backward=False)[:3]
    with stages.results_of(pipeline.select_blocks) as results:
        nsa.forward(q, k, v, config=CONFIG, backend="fused")
    nsa.forward(q, k, v, config=CONFIG, backend="fused")
    assert len(results) == 1
    assert results[0].dtype == torch.int32


def test_reshaped_tensors_share_memory():
    packed = workloads.make_tensors((200,), OPTIONS, backward=True, lengths=[150, 50])
    batched = workloads.reshaped(packed, (2, 100))
    assert batched.q.shape == (2, 100, 4, 16)
    assert batched.dout.data_ptr() == packed.dout.data_ptr()
    assert batched.k.data_ptr() == packed.k.data_ptr()
    assert all(x.is_leaf and x.requires_grad for x in batched.leaves)
    assert batched.extra == {}
