"""scripts/bench_rewards.py: that its figures are of the work it names; how large they are is not a test's business."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from rewards import score
from scripts import bench_rewards

ROOT = Path(__file__).resolve().parents[2]


def test_the_rows_are_what_they_are_timed_as():
    rows = bench_rewards.other_rows(random.Random(3))
    got = {kind: score(kind.split(",")[0], *row) for kind, row in rows.items()}
    assert {kind: result.status for kind, result in got.items()} == dict.fromkeys(rows, "ok")
    exact = set(rows) - {"ocr", "regression", "temporal grounding"}
    assert {kind: got[kind].accuracy for kind in exact} == dict.fromkeys(exact, 1.0)
    assert got["temporal grounding"].accuracy == pytest.approx(9 / 20)
    assert all(1000 <= len(response) <= 2500 for response, _, _ in rows.values())


def test_a_ratio_is_the_median_of_interleaved_blocks(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench_rewards.time, "process_time", lambda: clock[0])
    order = []

    def work(name: str, seconds: float):
        def one(place: int) -> None:
            order.append(name)
            clock[0] += 100 * seconds if place == 3 else seconds  # one slow block moves no median

        return one

    figures = bench_rewards.interleaved(work("ours", 3e-6), work("theirs", 2e-6), 6, 2)
    assert order == ["ours", "ours", "theirs", "theirs"] * 3
    assert figures["ratio"] == pytest.approx(1.5)
    assert figures["ours_us"] == pytest.approx(3)
    assert figures["alone_us"] == pytest.approx(2)
    assert figures["own_share"] == pytest.approx(1.5)  # no child: all of it is outside the library


def test_hostile_texts_are_counted_per_type(tmp_path):
    rows = [
        {
            "id": f"t{place}",
            "problem_type": kind,
            "ground_truth": "yes",
            "extra": {},
            "response_expr": {"repeat": ["y ", size]},
        }
        for place, (kind, size) in enumerate([("boolean", 5), ("boolean", 20_000), ("ocr", 9)])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    worst = bench_rewards.hostile(str(tmp_path / "rows.jsonl"))
    assert {kind: row["texts"] for kind, row in worst.items()} == {"boolean": 2, "ocr": 1}
    assert worst["boolean"]["id"] == "t1"


@pytest.mark.slow
def test_the_program_prints_every_part(tmp_path):
    command = [sys.executable, "scripts/bench_rewards.py", "--responses", "600", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in ("rouge-score: ours", "8 responses per gold: ours", "tracking", "svg-code", "pool: "):
        assert words in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["math-verify, each gold once"]["ratio"] > 0
