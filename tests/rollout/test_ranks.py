"""Engines under torchrun: data-parallel replicas, and one engine over two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run_ranks import run_ranks

PROGRAM = Path(__file__).with_name("rank_program.py")


def launch(model_dir, out, *flags):
    out.mkdir()
    run_ranks(PROGRAM, 2, "--model", model_dir, "--out", out, *flags)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_replicas_and_tensor_parallel_ranks_agree(tiny, tmp_path):
    apart = launch(tiny("qwen3_vl"), tmp_path / "apart")
    # A response depends on run seed, step, sample and slot: not on the rank nor on the company.
    assert apart[0][:2] == apart[1][:2]
    assert [rank[2] for rank in apart] == [0, 1]
    assert apart[0][0] != apart[0][1]
    left = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # what a killed run leaves of vLLM's shared memory
    left.touch()
    together = launch(tiny("qwen3_vl"), tmp_path / "together", "--tensor_parallel", "2")
    assert together[0] == together[1] and not left.exists()
    for step in range(2):
        for name, responses in apart[0][step].items():
            for (tokens, logprobs), (tokens_2, logprobs_2) in zip(responses, together[0][step][name], strict=True):
                assert tokens == tokens_2
                assert logprobs == pytest.approx(logprobs_2, abs=1e-4)
