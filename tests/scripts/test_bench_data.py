"""scripts/bench_data.py: its clips are what they are said to be, and a short run measures both sides on equal frames."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.decode import probe

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "scripts" / "bench_data.py"


@pytest.fixture(scope="module")
def program():
    from scripts import bench_data

    return bench_data


def test_clips_of_any_length_are_regular(program, tmp_path):
    """10 s encoded once, 30 s by repeating its packets: 900 frames at 30 fps, groups of 30 or 250 as asked."""
    for name, group in (("b_frames_g30", 30), ("no_b_frames_g250", 250)):
        base, clip = str(tmp_path / f"{name}.mp4"), str(tmp_path / f"{name}-30.mp4")
        program.make_base(base, *program.KINDS[name], 64, 48)
        program.repeat_clip(base, clip, 30)
        timeline = probe(clip)
        assert (len(timeline.pts), timeline.fps, timeline.constant_rate) == (900, 30.0, True)
        keys = timeline.keys
        assert set(np.diff(keys)) <= {group, 300 % group or group} and len(keys) == 3 * -(-300 // group)
        reordered = bool((np.diff(timeline.packet_pts) < 0).any())
        assert reordered == name.startswith("b_frames")


def test_memory_is_the_median_of_rounds_over_all_lengths(program, tmp_path, monkeypatch):
    """Rounds go over 10 s, then 20 s: (9, 5), (1, 8), (4, 6) MB have the medians 4 and 6."""
    figures = iter([9.0, 5.0, 1.0, 8.0, 4.0, 6.0])
    monkeypatch.setattr(program, "make_base", lambda *_: None)
    monkeypatch.setattr(program, "repeat_clip", lambda base, clip, seconds: Path(clip).touch())
    monkeypatch.setattr(program, "run_child", lambda job, clip, folder: {"peak_mb": next(figures)})
    assert program.memory_over_lengths(str(tmp_path), [10, 20], 3) == {"10 s": 4.0, "20 s": 6.0}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_short_run(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, PROGRAM, "--seconds", "10", "--kinds", "b_frames_g30", "--repeats", "1", "--no_real"]
    command += ["--memory_seconds", "10", "20", "--no_scaling", "--json", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "NOTE" not in done.stdout and done.stdout.count("bit-equal: True") == 2
    figures = json.loads(out.read_text())
    clip = figures["b_frames_g30-10s"]
    assert clip["recipe"]["digest"] == clip["exact"]["digest"] != clip["native"]["digest"]
    assert clip["recipe"]["frames"] == clip["exact"]["frames"] == 20 and clip["bound"]["frames"] == 20
    assert 0.25 <= clip["exact"]["bytes"] / clip["recipe"]["bytes"] < 0.2505
    assert set(figures["memory_mb"]) == {"10 s", "20 s"}
