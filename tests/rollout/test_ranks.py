"""Engines under torchrun: data-parallel replicas, and one engine over two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("rank_program.py")


def launch(model_dir, out, *flags):
    out.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(PROGRAM)]
    command += ["--model", model_dir, "--out", str(out), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_replicas_and_tensor_parallel_ranks_agree(tiny, tmp_path):
    apart = launch(tiny("qwen3_vl"), tmp_path / "apart")
    # A response depends on run seed, step, sample and slot: not on the rank nor on the company.
    assert apart[0][:2] == apart[1][:2]
    assert [rank[2] for rank in apart] == [0, 1]
    assert apart[0][0] != apart[0][1]
    together = launch(tiny("qwen3_vl"), tmp_path / "together", "--tensor_parallel", "2")
    assert together[0] == together[1]
    for step in range(2):
        for name, responses in apart[0][step].items():
            for (tokens, logprobs), (tokens_2, logprobs_2) in zip(responses, together[0][step][name], strict=True):
                assert tokens == tokens_2
                assert logprobs == pytest.approx(logprobs_2, abs=1e-4)
