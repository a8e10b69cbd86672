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
        encoder = SimpleNamespace(family=family, tokenizer=None, config=None)
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


def test_an_argument_that_vllm_does_not_know_is_named(asked):
    with pytest.raises(
        ValueError, match=r"--vllm_args: vllm\.LLM \d+\.\d+\S* has no argument blocksize; .*\bblock_size\b"
    ):
        asked(engine_args={"blocksize": 128})
    assert asked(engine_args={"block_size": 128, "disable_log_stats": False})["block_size"] == 128


@pytest.mark.parametrize("fails_at", ["add_request", "limit_responses"])
def test_a_request_that_vllm_takes_in_part_is_aborted_with_the_others(monkeypatch, fails_at):
    """vLLM lists the responses of a request before its engine core may refuse them: left there, they never end."""
    listed, aborted = [], []

    def add(llm, request_id, prompt, params):
        listed.append(request_id)
        if prompt == "second" and fails_at == "add_request":
            raise TypeError("refused by the core")

    def limit(llm, request_id, limits):
        if request_id == "1-1":
            raise RuntimeError("not listed")

    monkeypatch.setattr(vllm_access, "unfinished_responses", lambda llm: len(listed))
    monkeypatch.setattr(vllm_access, "add_request", add)
    monkeypatch.setattr(vllm_access, "limit_responses", limit)
    monkeypatch.setattr(vllm_access, "abort", lambda llm, names: aborted.extend(names))
    engine = RolloutEngine.__new__(RolloutEngine)
    engine.llm, engine.max_num_seqs, engine._calls, engine.rollout_seed = None, 8, 0, "request"
    engine.inputs = lambda prompt: prompt
    waiting = [(0, "first", None), (1, "second", None), (2, "third", None)]
    settings = [{"max_tokens": [3, 5]}] * 3
    with pytest.raises((TypeError, RuntimeError), match=r"refused by the core|not listed"):
        list(engine._run(["first", "second", "third"], waiting, settings, 0, ""))
    assert aborted == listed == ["1-0", "1-1"]


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


def test_tokens_are_held_until_their_response_ends():
    """Two responses and one that has gone: first tokens are seen at once, later ones together, with log-probs by hand."""
    from vllm.logprobs import FlatLogprobs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.outputs import LogprobsLists

    def state(kind=RequestOutputKind.FINAL_ONLY):
        processor = SimpleNamespace(num_logprobs=0, logprobs=FlatLogprobs(), cumulative_logprob=0.0)
        return SimpleNamespace(
            output_kind=kind, is_prefilling=True, detokenizer=IncrementalDetokenizer(), logprobs_processor=processor
        )

    def output(name, token, logprob, end=None):
        part = LogprobsLists(np.array([[token]]), np.array([[logprob]], np.float32), np.array([token + 1]), None)
        return EngineCoreOutput(name, [token], new_logprobs=part, finish_reason=end)

    seen = []

    def vllms_own(outputs, engine_core_timestamp=None):
        seen.append([(item.request_id, list(item.new_token_ids), item.new_logprobs is None) for item in outputs])
        for item in outputs:
            if item.request_id in states:
                states[item.request_id].is_prefilling = False
        return engine_core_timestamp

    states = {"0_a": state(), "1_a": state(), "read": state(RequestOutputKind.DELTA)}
    processor = SimpleNamespace(
        log_stats=False, tracing_enabled=False, request_states=states, process_outputs=vllms_own
    )
    vllm_access.hold_tokens(processor)
    step = processor.process_outputs
    step([output("0_a", 5, -0.5), output("1_a", 6, -1.0), output("read", 7, -2.0), output("gone", 8, -3.0)])
    step([output("0_a", 15, -0.25), output("1_a", 16, -1.5), output("read", 17, -2.0)])
    assert (
        step([output("0_a", 25, -0.75), output("1_a", 26, -4.0, FinishReason.STOP)], engine_core_timestamp=3.5) == 3.5
    )
    step([EngineCoreOutput("0_a", [], finish_reason=FinishReason.ABORT)])  # a last word without a token
    assert seen == [
        [("0_a", [5], False), ("1_a", [6], False), ("read", [7], False), ("gone", [8], False)],
        [("read", [17], False)],
        [("1_a", [16, 26], True)],
        [("0_a", [15, 25], True)],
    ]
    first = states["0_a"].logprobs_processor
    assert (first.logprobs.token_ids, first.logprobs.logprobs) == ([15, 25], [-0.25, -0.75])
    assert (first.logprobs.start_indices, first.logprobs.end_indices) == ([0, 1], [1, 2])
    assert (first.logprobs.ranks, first.cumulative_logprob) == ([16, 26], -1.0)
    counting = SimpleNamespace(log_stats=True, tracing_enabled=False, request_states={}, process_outputs=vllms_own)
    vllm_access.hold_tokens(counting)
    assert counting.process_outputs is vllms_own  # vLLM's statistics count tokens as they come


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
