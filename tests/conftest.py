"""What a run needs and draws from, one seed and thread count for every test, and fixtures.

PyTorch and the package are imported where they are used: this file is read before coverage is
measured, and by the process that gives tests to the workers of pytest-xdist and needs neither.
"""

import gc
import os

import pytest

from tests.helpers import measuring, profiles
from tests.helpers.compressed_calls import COMPRESSED_CALLS
from tests.helpers.world import World


def pytest_configure():
    profiles.choose_seed()
    if os.environ.get("NSA_REQUIRE_GPU"):
        from tests.helpers import requirements

        requirements.check_gpu()


def pytest_report_header() -> str:
    return f"GPU property tests draw from {profiles.seed_line()}"


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    if session.config.pluginmanager.hasplugin("dsession"):
        # The workers of pytest-xdist collect.
        return (yield)
    # Of what is made now, all stays.
    gc.disable()
    measuring.import_package()
    import torch

    # pytest-xdist runs one worker a core; more threads than that only contend.
    torch.set_num_threads(1)
    with measuring.paused():
        return (yield)


def pytest_collection_modifyitems(items):
    """What may take long first, so that no worker of pytest-xdist ends long after the others."""
    items.sort(key=lambda item: item.get_closest_marker("unmeasured") is None)


def pytest_collection_finish():
    """What is imported and collected stays, so garbage collections need not look at it."""
    gc.collect()
    gc.freeze()
    # Tracing makes many objects and little garbage.
    gc.set_threshold(5000, 20, 50)
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with measuring.measured(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and item.get_closest_marker("gpu"):
        report.sections.append(("Seed", f"{profiles.seed_line()} draws the same examples again"))
    return report


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _step_by_step(monkeypatch):
    """Tests of recordings turn them on. Others replace functions, which recordings do not call."""
    monkeypatch.setattr("nsa.recordings.ENABLED", False)


@pytest.fixture
def mesh(tmp_path):
    """One process and its mesh."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Four ranks, which start with the first test that needs them."""
    ranks = World(str(tmp_path_factory.mktemp("world")))
    yield ranks
    ranks.stop()


@pytest.fixture
def fused_on_cpu(monkeypatch):
    """The fused backend on a CPU and in any dtype: its kernel calls answered by PyTorch."""
    from tests.helpers.emulation import emulate_kernels

    emulate_kernels(monkeypatch.setattr)


@pytest.fixture(params=COMPRESSED_CALLS)
def compressed_calls(monkeypatch, request):
    """All ways to compute the compressed branch of a batch. A pack has the first two."""
    from tests.helpers.emulation import compute_compressed

    compute_compressed(monkeypatch.setattr, request.param)


@pytest.fixture
def poisoned_memory():
    """What is not written is NaN, or the largest integer."""
    from tests.helpers import poison

    with poison.poisoned_memory():
        yield
