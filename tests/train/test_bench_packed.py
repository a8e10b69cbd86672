"""scripts/bench_packed.py runs on any machine, and what it compares is the same computation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "scripts" / "bench_packed.py"


def bench(*flags: str) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(PROGRAM), "--size", "tiny", "--prompt_tokens", "200", "--frames", "8", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_bench_compares_the_same_computation(tmp_path):
    printed = bench(
        "--rounds", "1", "--group_size", "3", "--response_tokens", "12", "--ragged", "--out", str(tmp_path / "o")
    )
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == 3 and max(losses) - min(losses) < 2e-5
    worst = [float(x) for x in re.findall(r"at most (\S+)", printed)]
    assert len(worst) == 2 and max(worst) < 1e-5
    assert [v["variant"] for v in json.loads((tmp_path / "o").read_text())["variants"]] == [
        "packed/sdpa",
        "rows/sdpa",
        "rows/hf",
    ]


@pytest.mark.slow
def test_bench_through_zero3():
    printed = bench("--rounds", "1", "--group_size", "2", "--response_tokens", "8", "--zero3", "--groups", "2")
    assert "zero3 sdpa, 2 groups per update" in printed and "useful TFLOP/s per rank" in printed
