"""What a run needs and draws from, and the same seed and thread count for every test."""

import profiles
import pytest
import requirements
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

# pytest-xdist runs one worker a core; more threads than that only contend.
torch.set_num_threads(1)


def pytest_configure():
    profiles.choose_seed()
    requirements.check_gpu()


def pytest_report_header() -> str:
    return f"GPU property tests draw from {profiles.seed_line()}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and item.get_closest_marker("gpu"):
        report.sections.append(("Seed", f"{profiles.seed_line()} draws the same examples again"))
    return report


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def mesh(tmp_path):
    """One process and its mesh."""
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
