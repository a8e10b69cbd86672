"""The labelled evaluation cases through the benchmark scoring path, and the older toolkit's scores through its protocol."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data.records import CANONICAL_TYPE, Sample
from evaluate._annotations import gold_of
from evaluate._easyvideor1 import score_like_easyvideor1
from evaluate._judge import agreement_of
from evaluate._scoring import Benchmark, score_row

SHARED = Path(os.environ.get("REELRL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
CASES = SHARED / "cases/evaluation.jsonl"
needs_cases = pytest.mark.skipif(not CASES.is_file(), reason="no labelled cases beside the repository")
PLAIN = Benchmark(name="cases", title="Cases", load=lambda args: [])


def cases() -> list[dict]:
    if not CASES.is_file():
        return []
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if not row["benchmark"].startswith("judge")]


def sample_of(case: dict) -> Sample:
    name = case["problem_type"]
    kind = CANONICAL_TYPE.get(name.lower(), name)
    options = tuple(case["extra"].get("options") or ())
    extra = {**case["extra"], "row_problem_type": name}
    return Sample(case["id"], "", case["ground_truth"], kind, "video", options=options, extra=extra)


def row_of(case: dict) -> dict:
    return {"id": case["id"], "response": case["response"], "finish_reason": "stop", "status": "", "reason": ""}


@needs_cases
def test_cases_score_as_labelled_in_the_benchmark_path():
    wrong = []
    for case in cases():
        if case["want_score"] is None:
            continue
        got = score_row(PLAIN, sample_of(case), row_of(case))["score"]
        if abs(got - case["want_score"]) > 1e-4:
            wrong.append((case["id"], case["benchmark"], case["response"][:80], case["want_score"], got))
    assert not wrong, wrong[:10]


@needs_cases
def test_easyvideor1_protocol_gives_that_toolkits_scores():
    checked = 0
    for case in cases():
        if case.get("seed_score") is None:
            continue
        _, got = score_like_easyvideor1(sample_of(case), case["response"])
        assert got == pytest.approx(case["seed_score"], abs=1e-4), case["id"]
        checked += 1
    assert checked > 200


def choice(gold: str = "B") -> Sample:
    extra = {"row_problem_type": "multiple choice"}
    return Sample("x", "?", gold, "multiple choice", "video", options=("A. cat", "B. dog", "C. cow"), extra=extra)


@pytest.mark.parametrize(
    ("response", "official", "older"),
    [
        ("B", 1, 1),
        ("**B**", 1, 0),
        ("(B) dog", 1, 0),
        ("So the answer is A? No. Therefore the answer is B", 1, 0),
        ("C", 0, 0),
    ],
)
def test_the_two_protocols_differ_where_they_should(response, official, older):
    row = {"id": "x", "response": response, "finish_reason": "stop", "status": "", "reason": ""}
    assert score_row(PLAIN, choice(), row)["score"] == official
    assert score_row(PLAIN, choice(), row, "easyvideor1")["score"] == older


def test_gold_is_cleaned():
    assert gold_of("<answer>B</answer>") == "B"
    assert gold_of('<think>{"time": [1, 2]}</think><[PLHD21_never_used]>') == '{"time": [1, 2]}'
    assert gold_of("<answer>a</answer> <answer> b </answer>") == "b"
    assert gold_of(4) == 4


def test_failures_score_zero_and_keep_their_reason():
    row = {"id": "x", "response": "", "finish_reason": "", "status": "media_error", "reason": "is truncated"}
    got = score_row(PLAIN, choice(), row)
    assert (got["score"], got["status"], got["reason"], got["extracted"]) == (0.0, "media_error", "is truncated", None)


def test_an_open_answer_waits_for_its_judge():
    judged = Benchmark(name="open", title="Open", load=lambda args: [], judged=lambda sample: True)
    sample = Sample("x", "Where?", "in the kitchen", "open-ended", "video")
    row = {"id": "x", "response": "the kitchen", "finish_reason": "stop", "status": "", "reason": ""}
    waiting = score_row(judged, sample, row)
    assert waiting["score"] is None and waiting["status"] == "unjudged" and 0 < waiting["parts"]["rouge_l"] < 1
    graded = score_row(judged, sample, {**row, "judged_score": 1.0, "judged_status": "ok"})
    assert graded["score"] == 1.0 and graded["status"] == "ok"


def test_agreement_by_hand():
    """3 of 4 agree; both say 1 half / a quarter of the time: chance 0.5*0.25 + 0.5*0.75 = 0.5, kappa (0.75-0.5)/0.5."""
    assert agreement_of([(1, 1), (1, 0), (0, 0), (0, 0)]) == {"share": 0.75, "kappa": 0.5}
