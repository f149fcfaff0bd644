"""Token mode's band runs beside the inversion of the indices: the order of what is launched."""

import pytest
import stand_in_streams
import torch

import nsa
from nsa.fused.layout import make_plan

inverted_index = pytest.importorskip("nsa.fused.kernels.inverted_index")
selected_forward = pytest.importorskip("nsa.fused.kernels.selected_forward")

KERNELS = {
    selected_forward: ("compile_band", "compile_forward", "compile_combine"),
    inverted_index: ("compile_invert_index",),
}


@pytest.fixture
def log(monkeypatch):
    """Launches, allocations of results, and what is done with streams."""
    log = stand_in_streams.install(monkeypatch)
    for module, names in KERNELS.items():
        for name in names:
            kernel = name.removeprefix("compile_")
            monkeypatch.setattr(
                module, name, lambda *_, kernel=kernel: lambda *_: log.append(kernel)
            )
    for name in ("empty", "full", "zeros"):
        original = getattr(torch, name)

        def allocate(*args, original=original, **kwargs):
            log.append("allocation")
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, allocate)
    return log


def run(log, band: bool):
    q, k = (torch.zeros(1, 1000, heads, 64, dtype=torch.bfloat16) for heads in (16, 1))
    blocks = make_plan(q, None, None, nsa.NSAConfig.paper()).token_blocks(1)
    indices = torch.zeros(1000, 1, 16, dtype=torch.int32)
    log.clear()
    selected_forward.selected_forward(q[0], k[0], k[0], indices, blocks, 64, 0.1, True, band)


def test_the_band_runs_beside_the_index_and_writes_what_was_there_before(log):
    run(log, band=True)
    fork, join = log.index("side waits for main"), log.index("main waits for side")
    # Output, log-sum-exp, and that of the band; what is allocated later may be where the index
    # that runs beside still reads.
    assert log[:fork] == ["allocation"] * 3
    assert log[join - 3 : join] == ["on side", "band", "off side"]
    assert fork < log.index("invert_index") < join
    after = [x for x in log[join + 1 :] if x != "allocation"]
    assert after == ["forward", "combine"]


def test_without_a_band_there_is_one_stream(log):
    run(log, band=False)
    assert [x for x in log if x != "allocation"] == ["invert_index", "forward", "combine"]
