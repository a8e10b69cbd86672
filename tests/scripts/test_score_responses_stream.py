"""scripts/score_responses.py holds a bounded number of rows, however long the file is."""

from __future__ import annotations

import json
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from rewards import Score
from rewards.rows import BadRow
from scripts import score_responses
from scripts.score_responses import AHEAD, CHUNK


class CountingPool:
    """Answers at once and remembers how many rows were handed over."""

    def __init__(self):
        self.given = 0

    def submit_jobs(self, jobs, reasons=False):
        self.given += len(jobs)
        futures = [Future() for _ in jobs]
        for future in futures:
            future.set_result((Score(1.0, 1.0, "ok", "x"), None))
        return futures


def test_a_bounded_number_of_rows_is_in_flight(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"problem_type": "ocr", "answer": "x", "response": "x"})
    path.write_text((row + "\n\n") * 1000)  # blank lines are skipped and counted
    pool, args = CountingPool(), SimpleNamespace(input=str(path), workers=2)
    numbers, most = [], 0
    for number, _, score, bad in score_responses.scored(args, pool):
        numbers.append(number)
        most = max(most, pool.given - len(numbers) + 1)
        assert (score.accuracy, bad) == (1.0, None)
    assert numbers == list(range(1, 2001, 2))
    assert most == AHEAD * 2 * CHUNK


def test_a_row_late_in_the_file_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"problem_type": "ocr", "answer": "x", "response": "x"})
    path.write_text((row + "\n") * 40 + "{}\n")
    with pytest.raises(BadRow, match=r"rows\.jsonl:41: response: missing"):
        list(score_responses.chunks(str(path)))
