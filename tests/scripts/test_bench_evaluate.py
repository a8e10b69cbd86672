"""scripts/bench_evaluate.py with cached clips on the tiny model: all three ways answer, and the figures follow from the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench_evaluate import figures

ROOT = Path(__file__).resolve().parents[2]


def test_figures_are_those_of_the_ways_that_were_run():
    """Medians 3 and 12 s: 4 times the loop. 8 s of loader threads for 4 clips are 2 s each, 2 s of rendering 0.5 s."""
    fact = {"engine_idle_share": 0.1, "prepare_thread_s": 8.0, "render_thread_s": 2.0, "mean_requests_in_engine": 5.0}
    told = {"pipeline": [{**fact, "peak_in_flight_mib": peak} for peak in (7.0, 9.0, 8.0)], "loop": [{}]}
    times = {"loop": [12.0], "pipeline": [2.0, 4.0, 3.0]}
    alone = {
        "engine_idle_share": 0.1, "loader_thread_s_per_clip": 2.0, "rendering_thread_s_per_clip": 0.5,
        "mean_requests_in_engine": 5.0, "peak_in_flight_mib": 9.0,
    }  # fmt: skip
    assert figures(times, told, 1.0, 2, 4, 2) == {"times_the_loop": 4.0, **alone}
    assert figures({"pipeline": [3.0]}, told, 1.0, 2, 4, 2) == alone
    assert figures({"loop": [12.0]}, told, 1.0, 2, 4, 2) == {}
    batch = figures({"batch": [6.0]}, {"batch": [{"engine_s": 2.0, "engine_cpu_s": 3.0}]}, 10.0, 2, 4, 2)
    assert (batch["batched_engine_s"], batch["bound_s"]) == (2.0, 5.0) and "share_of_bound" not in batch


@pytest.mark.slow
def test_cached_clips(tiny, tmp_path):
    command = [sys.executable, "scripts/bench_evaluate.py", "--model", tiny("qwen3_vl"), "--cached", "--clips", "2"]
    command += ["--ways", "loop", "batch", "pipeline"]
    command += ["--questions", "2", "--rounds", "1", "--seconds", "2", "--response_tokens", "3", "--dtype", "float32"]
    command += ["--max_num_seqs", "4", "--max_model_len", "2048", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["questions"], found["clips"]) == (4, 2)
    middle = found["median_s"]
    assert {name: [seconds] for name, seconds in middle.items()} == found["all_s"]  # one round
    assert found["times_the_loop"] == pytest.approx(middle["loop"] / middle["pipeline"], rel=0.03)
    assert 0.0 < found["rendering_thread_s_per_clip"] < found["loader_thread_s_per_clip"]
    assert found["bound_s"] >= found["batched_engine_s"] and 0.0 <= found["engine_idle_share"] < 1.0
