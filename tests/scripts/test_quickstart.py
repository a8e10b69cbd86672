"""scripts/quickstart.sh from end to end on a small playground, twice: everything is made, then nothing is made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def gold_share(folder: Path, playground: Path) -> float:
    """Accuracy by plain comparison with the gold files, over the types whose answer is one word."""
    gold = {}
    for line in (playground / "heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        gold[row["problem_id"]] = row
    right = [
        row["response"] == f"<answer>{gold[row['id']]['answer']}</answer>"
        for row in map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
        if row["id"] in gold and gold[row["id"]]["problem_type"] == "multiple choice"
    ]
    return sum(right) / len(right)


@pytest.mark.slow
def test_quickstart_runs_to_the_end_and_a_second_run_makes_nothing_again(tmp_path):
    playground, run = tmp_path / "playground", tmp_path / "run"
    settings = {"PLAYGROUND": str(playground), "RUN": str(run), "CLIPS": "80", "STEPS": "2", "WARM_START_STEPS": "40"}
    # The environment that these tests run in is the one that scripts/setup.sh made.
    environment = {**os.environ, **settings, "REELRL_VENV": sys.prefix}

    def quickstart() -> str:
        done = subprocess.run(
            ["bash", "scripts/quickstart.sh"], cwd=ROOT, env=environment, timeout=900,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    said = quickstart()
    assert "up to date" in said and "after − before" in said and f"report: {run}/report.html" in said
    asked = sum(1 for _ in (playground / "heldout.jsonl").open())
    for part in ("before", "after"):
        results = json.loads((run / part / "results.json").read_text())
        assert results["n"] == 2 * asked and results["n_failed"] == 0  # every question, seeing and blind
        lines = results["breakdown"]["problem_type"]
        assert lines["multiple choice"]["value"] == pytest.approx(gold_share(run / part, playground), abs=1e-4)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["mismatch/abs_log_ratio"] < 1e-4 for row in metrics)
    page = (run / "report.html").read_text()
    assert len(page) < 20e6 and "<script src" not in page and "http://" not in page.replace("http://www.w3.org", "")
    before = {path: path.stat().st_mtime_ns for path in (run / "before", run / "metrics.jsonl", run / "final")}
    again = quickstart()
    assert again.count(": already there (") == 4  # playground, evaluation, training, evaluation
    assert {path: path.stat().st_mtime_ns for path in before} == before
