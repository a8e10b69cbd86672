"""Peaks of memory per phase, on a device whose counters are given: torch goes on counting vLLM's sleeping tensors."""

from __future__ import annotations

import pytest
import torch

from train.metrics import GIB, StepMetrics, device_bytes, record_asleep, record_memory, record_peak


@pytest.fixture
def counters(monkeypatch):
    """{"peak", "used"} in bytes, as torch.cuda would report them on a device of 100 GiB."""
    now = {"peak": 0, "used": 0, "resets": 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["peak"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: now["peak"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB - now["used"], 100 * GIB))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: now.update(resets=now["resets"] + 1))
    return now


def test_sleeping_tensors_are_taken_off_the_updates_peak(counters):
    step = StepMetrics()
    counters |= {"peak": 70 * GIB, "used": 75 * GIB}  # 20 of the policy, 50 of vLLM, 5 of CUDA itself
    record_peak(step, "rollout")
    awake = device_bytes()
    counters["used"] = 25 * GIB  # vLLM sleeps: 50 given back, which torch still counts
    sleeping = awake - record_asleep(step)
    counters["peak"] = 110 * GIB  # 60 of the update
    record_peak(step, "update", sleeping)
    counters |= {"peak": 95 * GIB, "used": 75 * GIB}  # the weight sync, vLLM's weights mapped again
    record_memory(step)
    assert step.highs["memory/rollout_max_gib"] == 70
    assert step.highs["memory/update_max_gib"] == 60
    assert step.highs["memory/asleep_gib"] == 25
    assert step.highs["memory/allocated_max_gib"] == 70
    assert step.highs["memory/device_used_gib"] == 75
    assert counters["resets"] == 3  # every phase has a peak of its own


def test_without_phases_the_peak_is_torchs(counters):
    step = StepMetrics()
    counters["peak"] = 12 * GIB
    record_memory(step)
    assert step.highs["memory/allocated_max_gib"] == 12


def test_nothing_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step = StepMetrics()
    record_peak(step, "update")
    assert device_bytes() == record_asleep(step) == 0 and step.highs == {}
