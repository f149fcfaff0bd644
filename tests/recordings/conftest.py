"""Recordings on a CPU, none of which a test leaves behind."""

import pytest

from nsa import boundaries, packing, recordings
from nsa.fused import compressed_forms
from tests.helpers.noted_kernels import note_kernels


@pytest.fixture(autouse=True)
def _no_recordings(monkeypatch):
    monkeypatch.setattr(recordings, "ENABLED", True)
    recordings.clear()


@pytest.fixture
def emulated(fused_on_cpu, monkeypatch):
    """The fused backend on a CPU, whose kernels are steps of recordings."""
    note_kernels(monkeypatch.setattr)
    monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)


@pytest.fixture
def unread(monkeypatch):
    """Boundaries that the host would wait for, as those on a GPU."""
    for module in (boundaries, packing):
        monkeypatch.setattr(module, "waits_to_read", lambda _: True)
