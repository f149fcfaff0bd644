"""Recordings on a CPU, none of which a test leaves behind."""

import math

import pytest
import torch

from nsa import boundaries, packing, recordings
from nsa.fused import compressed_forms
from nsa.recorded_call import RecordedPart
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


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What recordings allocate has NaN in it, or large integers."""
    allocate = RecordedPart.allocate

    def allocate_poisoned(self):
        memories = allocate(self)
        for x in memories:
            x.fill_(math.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else 77)
        return memories

    monkeypatch.setattr(RecordedPart, "allocate", allocate_poisoned)
