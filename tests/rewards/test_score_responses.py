"""scripts/score_responses.py as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"problem_id": 5, "problem": "Q", "answer": "B", "problem_type": "multiple choice", "options": ["A. x", "B. y"]}
    | {"response": "<answer>B</answer>"},
    {
        "id": "c2",
        "problem_type": "Numerical",
        "ground_truth": "<answer>3</answer>",
        "extra": {"unit": "m"},
        "response": "300 cm",
    },
    {"id": "c3", "problem_type": "ocr", "ground_truth": "aaaa", "extra": {}}
    | {"response_expr": {"concat": ["<answer>", {"repeat": ["a", 4]}, "</answer>"]}},
    {"problem": "Q", "solution": "yes", "problem_type": "boolean", "response": None},
    {"id": "c5", "problem_type": "judge verdict", "ground_truth": None, "extra": {}, "response": "Judgement: 1"},
]


def run(tmp_path, rows, *flags):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "scripts/score_responses.py", "--input", str(tmp_path / "rows.jsonl")]
    command += ["--output", str(tmp_path / "scores.jsonl"), "--workers", "2", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    out = tmp_path / "scores.jsonl"
    assert not (tmp_path / "scores.jsonl.partial").exists()
    return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None


def test_scores_in_order_with_a_table(tmp_path):
    done, scores = run(tmp_path, ROWS * 40)
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in scores] == [5, "c2", "c3", 4, "c5"] * 1 + [
        item for block in range(1, 40) for item in (5, "c2", "c3", 5 * block + 4, "c5")
    ]
    first = {name: [row[name] for row in scores[:5]] for name in ("accuracy", "format", "status", "extracted")}
    assert first["accuracy"] == [1, 1, 1, 0, 1]
    assert first["format"] == [1, 0, 1, 0, 0]
    assert first["status"] == ["ok", "ok", "ok", "malformed", "ok"]
    assert first["extracted"] == ["B", "300", "aaaa", None, "1"]
    assert [row["reward"] for row in scores[:4]] == pytest.approx([1.0, 0.9, 1.0, 0.0])
    assert "multiple choice" in done.stdout and " 40 " in done.stdout


def test_bad_gold(tmp_path):
    rows = [*ROWS, {"id": "bad", "problem_type": "numerical", "answer": "many", "response": "<answer>3</answer>"}]
    done, scores = run(tmp_path, rows)
    assert (done.returncode, scores) == (2, None)
    assert "rows.jsonl:6: sample bad: answer 'many'" in done.stderr
    done, scores = run(tmp_path, rows, "--on_bad_gold", "score")
    assert done.returncode == 1
    assert scores[5] | {"reward": 0} == {
        "id": "bad", "problem_type": "numerical", "extracted": None, "accuracy": 0.0, "format": 1.0, "reward": 0,
        "status": "bad_ground_truth",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"a": ', "not JSON"), ("[1]", "no JSON object"), ('{"problem_type": "ocr"}', "response: missing")],
)
def test_what_is_no_row_is_an_error_with_file_and_line(tmp_path, line, words):
    done, scores = run(tmp_path, [*ROWS, line], "--on_bad_gold", "score")
    assert (done.returncode, scores) == (2, None)
    assert "rows.jsonl:6: " in done.stderr and words in done.stderr


def test_weights_mode_and_wrong_flags(tmp_path):
    done, scores = run(tmp_path, ROWS[:2], "--mode", "think", "--accuracy_weight", "0.5", "--format_weight", "0.5")
    assert done.returncode == 0
    assert [row["reward"] for row in scores] == pytest.approx([0.5, 0.5])
    done, _ = run(tmp_path, ROWS[:1], "--accuracy_weight", "0.5")
    assert done.returncode == 2 and "must be 1" in done.stderr


def test_judge_rows(tmp_path):
    rows = [
        {
            "id": 1,
            "benchmark": "judge.extract_model_answer",
            "problem_type": "open-ended",
            "response": "x</think>Dolly Zoom",
        },
        {
            "id": 2,
            "benchmark": "judge.extract_ground_truth",
            "problem_type": "open-ended",
            "response": "<answer>a\nb</answer>",
        },
        {
            "id": 3,
            "benchmark": "judge.extract_ground_truth",
            "problem_type": "open-ended",
            "response": "<answer></answer>",
        },
    ]
    done, scores = run(tmp_path, [{**row, "ground_truth": None, "extra": {}} for row in rows], "--on_bad_gold", "score")
    assert done.returncode == 1
    assert [(row["extracted"], row["status"]) for row in scores] == [
        ("Dolly Zoom", "ok"), ("a\nb", "ok"), (None, "bad_ground_truth"),
    ]  # fmt: skip
