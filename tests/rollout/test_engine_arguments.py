"""RolloutEngine on a CUDA machine, without one: what it asks vLLM for, how it seeds, what it does after waking."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rollout import engine as engine_module
from rollout import vllm_access
from rollout.engine import RolloutEngine


@pytest.fixture
def asked(monkeypatch):
    """family, flags -> the arguments of vllm.LLM on a machine with CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine_module, "expected_names", lambda *_: set())
    monkeypatch.setattr(vllm_access, "build_llm", lambda **arguments: arguments)
    monkeypatch.delenv("RANK", raising=False)

    def ask(family: str = "qwen3_vl", **flags) -> dict:
        encoder = SimpleNamespace(family=family, config=None)
        return RolloutEngine("folder", encoder=encoder, dtype="bf16", **{"max_model_len": 20048, **flags}).llm

    return ask


def test_a_given_cache_size_starts_beside_the_trainers_states(asked):
    """With 76 of 139 GiB taken, half the device is not free, and vLLM would refuse although 20 GiB are asked for."""
    assert asked(gpu_memory_utilization=0.5)["gpu_memory_utilization"] == 0.5
    given = asked(gpu_memory_utilization=0.5, kv_cache_gib=20)
    assert given["kv_cache_memory_bytes"] == 20 * 1024**3 and given["gpu_memory_utilization"] * 139 < 139 - 76


def test_a_video_of_the_whole_prompt_fits_the_encoder_cache(asked):
    """vLLM's own limit is 16,384 tokens per video, whatever the prompt may have."""
    assert asked()["max_num_batched_tokens"] == 20048
    assert asked(max_model_len=1024)["max_num_batched_tokens"] == 16384
    assert asked(max_num_batched_tokens=4096)["max_num_batched_tokens"] == 4096


def test_linear_attention_takes_kernels_that_need_no_compiler(asked):
    assert asked("qwen3_5")["gdn_prefill_backend"] == "triton"
    assert "gdn_prefill_backend" not in asked("qwen3_vl")
    assert asked("qwen3_5", engine_args={"gdn_prefill_backend": "flashinfer"})["gdn_prefill_backend"] == "flashinfer"


def test_frames_become_patches_with_all_threads(monkeypatch):
    """vLLM takes the number from the environment, and one thread where it finds none. The user's own number stays."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    for given, cuda, expected in (({}, True, "7"), ({"OMP_NUM_THREADS": "3"}, True, "3"), ({}, False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(os, "environ", dict(given))
        vllm_access.prepare_environment()
        assert os.environ.get("OMP_NUM_THREADS") == expected


def test_engine_seed_is_numpys_too_and_is_given_back():
    """vLLM's newer model runner draws the seed of a request without one from NumPy."""
    engine = RolloutEngine.__new__(RolloutEngine)
    engine.seed, engine.replica, engine.rollout_seed = 3, 0, "engine"
    drawn = []
    for step in (5, 5, 6):
        np.random.seed(99)
        restore = engine._seed_engine(step, "round0")
        drawn.append((np.random.randint(2**62), torch.rand(1).item()))
        restore()
        assert np.random.randint(1000) == 641  # the first draw of seed 99: the trainer's stream goes on
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0] and drawn[0][1] != drawn[2][1]


def test_waking_from_level_2_clears_what_nothing_restores(monkeypatch):
    """vLLM's Qwen3-VL holds features in plain tensors, which sleep drops with the weights."""
    model = SimpleNamespace(deepstack_input_embeds=[torch.full((3, 5), float("nan")) for _ in range(2)])
    woken = []
    llm = SimpleNamespace(wake_up=lambda tags: woken.append(tags))
    monkeypatch.setattr(vllm_access, "model_of", lambda _: model)
    engine = RolloutEngine.__new__(RolloutEngine)
    engine.llm, engine.sleep_level = llm, 2
    engine._asleep = {"weights": True, "kv_cache": True}
    engine.wake(weights=True, kv=False)
    assert woken == [["weights"]]
    assert all(torch.equal(features, torch.zeros(3, 5)) for features in model.deepstack_input_embeds)
    model.deepstack_input_embeds[0].fill_(1.0)  # the cache alone has nothing to do with it
    engine.wake(weights=False, kv=True)
    assert model.deepstack_input_embeds[0].sum() == 15.0
    del model.deepstack_input_embeds  # other families have none
    vllm_access.clear_deepstack(llm)


def test_every_variable_of_vllm_that_is_named_here_is_one():
    """A misspelt one does nothing at all, and is found only on the machine that needed it."""
    from vllm import envs

    from tests.test_doors import project_files

    used = {
        name
        for path in project_files(".py", ".sh")
        for name in re.findall(r"\bVLLM_[A-Z0-9_]+\b", path.read_text(encoding="utf-8"))
    }
    assert {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"} <= used
    assert not used - set(envs.environment_variables)
