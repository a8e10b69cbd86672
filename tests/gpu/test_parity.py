"""Sampler against trainer on the GPU, in bf16: prompt ids, log-probs, weight sync, sleep; all families, with video."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model

PROGRAM = Path(__file__).with_name("parity_run.py")
# name -> (family, tied, attention of the trainer)
TOGETHER = {
    "qwen2_5_vl": ("qwen2_5_vl", False, "varlen"),
    "qwen2_vl": ("qwen2_vl", False, "varlen"),
    "qwen3_vl tied": ("qwen3_vl", True, "varlen"),
}
LATER = {"qwen3_5": ("qwen3_5", False, "flex")}  # its kernels are compiled for minutes, in which no other could start
ALONE = ("qwen3_vl", False, "auto")
NAMES = (*TOGETHER, *LATER, "qwen3_vl")


def start(family: str, tied: bool, attention: str, media: Path, out: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, str(PROGRAM), tiny_model(family, tied=tied, sharp=True), str(media), str(out), attention]
    log = out.with_suffix(".log").open("w")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, out: Path, timeout_s: float = 400) -> dict:
    """What the program saw. A test that asks for it fails with the end of its log if there is nothing."""
    try:
        status = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        status = f"none after {timeout_s} s"
    if status != 0 or not out.exists():
        return {"failed": f"status {status}\n{out.with_suffix('.log').read_text()[-4000:]}"}
    return json.loads(out.read_text())


def asked_for(items) -> set[str]:
    """Names of the cases that the selected tests are about."""
    here = [item for item in items if item.path == Path(__file__)]
    return {item.callspec.params["name"] if hasattr(item, "callspec") else "qwen3_vl" for item in here}


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory, media_folder):
    """name -> what parity_run.py saw: several at once, one that takes long, and the one whose memory is measured alone.
    Only those that a selected test asks for."""
    folder, found, asked = tmp_path_factory.mktemp("parity"), {}, asked_for(request.session.items)
    for cases in (TOGETHER, LATER):
        running = {}
        for name, case in cases.items():
            if name not in asked:
                continue
            out = folder / f"{name.replace(' ', '_')}.json"
            running[name] = (start(*case, media_folder, out), out)
        found |= {name: finish(process, out) for name, (process, out) in running.items()}
    if "qwen3_vl" not in asked:
        return found
    out = folder / "alone.json"
    return found | {"qwen3_vl": finish(start(*ALONE, media_folder, out), out)}


def of(seen: dict, name: str) -> dict:
    assert "failed" not in seen[name], seen[name]["failed"]
    return seen[name]


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_before_and_after_a_sync(seen, name):
    """The engine compares prompt ids: the program would have ended otherwise."""
    found = of(seen, name)
    assert found["gap_at_start"] <= 0.03
    assert found["gap_of_old_responses"] > 10 * found["gap_at_start"]  # the update was large, and is seen
    assert found["gap_after_sync"] <= 0.03
    assert found["synced"] == found["names"]
    assert found["rendered_here"] == {"video": True, "image and video": True}  # and vLLM's rendering was the same


@pytest.mark.parametrize("name", NAMES)
def test_both_are_near_the_library_in_fp32(seen, name):
    """On every mix of media by itself. On a CPU bf16 is 0.007 to 0.02 away, and a tower's features 0.6 %."""
    found = of(seen, name)
    for mix, far in found["from_fp32"].items():
        assert max(far.values()) <= 0.04, (mix, far)
    for mix, far in found["towers_from_fp32"].items():
        assert max(far.values()) <= 0.02, (mix, far)


@pytest.mark.parametrize("name", NAMES)
def test_old_weights_bring_the_old_engine_back(seen, name):
    found = of(seen, name)
    assert found["same_tokens"] >= 0.75  # a kernel may add in another order, and one token then changes the rest
    assert found["same_logprobs_gap"] < 0.02


def test_sleep_returns_the_memory(seen):
    """2 GiB of KV cache and the weights go at sleep, and come back at waking without more."""
    found = of(seen, "qwen3_vl")
    assert found["awake_gib"] - found["asleep_gib"] > 1.9
    assert abs(found["awake_again_gib"] - found["awake_gib"]) < 1.0
