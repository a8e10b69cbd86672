"""Labelled cases: the shared ones when they are there, the hand-computed ones and the adversarial ones always."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rewards import score
from rewards.format import format_reward
from rewards.rows import expand, job_of_row, score_job

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("REELRL_SHARED", HERE.parents[2] / "shared")) / "cases"
SLOW_TYPES = {"code", "coding", "svg-code", "html-code", "math", "mathematics"}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def response_of(row: dict) -> object:
    return row["response"] if "response" in row else expand(row["response_expr"])


def fits(value: float, want: object) -> bool:
    if isinstance(want, dict):
        return want["min"] - 1e-4 <= value <= want["max"] + 1e-4
    return abs(value - want) <= 1e-4


def disagreements(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        result, bad = score_job(job_of_row(row))
        want = row.get("want_accuracy", row.get("want_score"))
        if want is not None and not fits(result.accuracy, want):
            found.append(f"{row['id']}: accuracy {result.accuracy}, want {want} ({row['why']})")
        if bool(row.get("want_gt_error")) != (bad is not None):
            found.append(f"{row['id']}: bad gold {bad}")
        if row.get("want_format") is not None and result.format != row["want_format"]:
            found.append(f"{row['id']}: format {result.format}")
        if "want_extracted" in row and result.extracted != row["want_extracted"]:
            found.append(f"{row['id']}: extracted {result.extracted!r}")
        for mode, value in (row.get("want_format_modes") or {}).items():
            prefilled = row["extra"].get("think_prefilled") is True
            if value is not None and format_reward(response_of(row), mode, prefilled) != value:
                found.append(f"{row['id']}: format in mode {mode} is not {value}")
    return found


@pytest.mark.parametrize("name", ["rewards.jsonl", "evaluation.jsonl"])
def test_shared_cases_of_the_quick_types(name):
    if not (SHARED / name).is_file():
        pytest.skip("no shared cases here")
    rows = [row for row in rows_of(SHARED / name) if (row["problem_type"] or "").strip().lower() not in SLOW_TYPES]
    assert len(rows) > 200
    assert disagreements(rows) == []


@pytest.mark.slow
def test_shared_cases_of_the_types_with_a_child():
    if not (SHARED / "rewards.jsonl").is_file():
        pytest.skip("no shared cases here")
    rows = [
        row for row in rows_of(SHARED / "rewards.jsonl") if (row["problem_type"] or "").strip().lower() in SLOW_TYPES
    ]
    assert len(rows) > 100
    assert disagreements(rows) == []


HAND = rows_of(HERE / "hand_cases.jsonl")


@pytest.mark.parametrize("kind", sorted({str(row["problem_type"]) for row in HAND}))
def test_hand_computed_cases(kind):
    wrong = []
    for row in HAND:
        if str(row["problem_type"]) == kind:
            result = score(row["problem_type"], row["response"], row["ground_truth"], row["extra"])
            refused = result.status == "bad_ground_truth"
            if abs(result.accuracy - row["want_accuracy"]) > 1e-4 or refused != row.get("want_gt_error", False):
                wrong.append((row["id"], row["response"], row["ground_truth"], result))
    assert wrong == []


ADVERSARIAL = rows_of(HERE / "adversarial.jsonl")


@pytest.mark.parametrize(
    "attack", sorted({row["attack"] for row in ADVERSARIAL if row["problem_type"] not in SLOW_TYPES})
)
def test_no_exploit(attack):
    won = []
    for row in ADVERSARIAL:
        if row["attack"] == attack and row["problem_type"] not in SLOW_TYPES:
            result = score(row["problem_type"], response_of(row), row["ground_truth"], row["extra"])
            if result.accuracy > row["max_accuracy"] or result.status == "bad_ground_truth":
                won.append((row["id"], result))
    assert won == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(SLOW_TYPES & {row["problem_type"] for row in ADVERSARIAL}))
def test_no_exploit_in_children(kind):
    won = []
    for row in ADVERSARIAL:
        if row["problem_type"] == kind:
            result = score(kind, response_of(row), row["ground_truth"], row["extra"])
            if result.accuracy > row["max_accuracy"] or result.status == "bad_ground_truth":
                won.append((row["id"], result))
    assert won == []


HOSTILE = rows_of(HERE / "hostile.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({row["problem_type"] for row in HOSTILE}))
def test_long_and_costly_texts_end_and_earn_nothing(kind):
    """How long they take is measured by scripts/bench_rewards.py --hostile; what never ends hangs here."""
    won = []
    for row in HOSTILE:
        if row["problem_type"] == kind:
            result = score(kind, response_of(row), row["ground_truth"], row["extra"])
            if result.accuracy > row["max_accuracy"] or result.status == "bad_ground_truth":
                won.append((row["id"], result))
    assert won == []
