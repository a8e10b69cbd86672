"""scripts/bench_evaluate.py with cached clips on the tiny model: all three ways answer, and the figures follow from the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_cached_clips(tiny, tmp_path):
    command = [sys.executable, "scripts/bench_evaluate.py", "--model", tiny("qwen3_vl"), "--cached", "--clips", "2"]
    command += ["--questions", "2", "--rounds", "1", "--seconds", "2", "--response_tokens", "3", "--dtype", "float32"]
    command += ["--max_num_seqs", "4", "--max_model_len", "2048", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["questions"], found["clips"]) == (4, 2)
    middle = found["median_s"]
    assert {name: [seconds] for name, seconds in middle.items()} == found["all_s"]  # one round
    assert found["times_the_loop"] == pytest.approx(middle["loop"] / middle["pipeline"], rel=0.03)
    assert found["bound_s"] >= found["batched_engine_s"] and 0.0 <= found["engine_idle_share"] < 1.0
