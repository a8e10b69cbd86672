"""One row of a file -> what score() takes, and back: shared by the pool's workers and scripts/score_responses.py."""

from __future__ import annotations

from typing import Any

from data.records import canonical_problem_type
from rewards import Score, clean_gold, killable, read_gold, sandbox, score_against, text
from rewards.extraction import find_answer
from rewards.format import format_mode, format_reward
from rewards.judge import parse_verdict

GOLD_FIELDS = ("ground_truth", "answer", "solution")
HEAVY = {"math": "math", "svg-code": "svg", "html-code": "html", "code": "code", "open-ended": "text"}


class BadRow(ValueError):
    """A row that is no sample with a response."""


def expand(expression: Any) -> Any:
    """The text of a `response_expr`: {"repeat": [text, n]} or {"concat": [text or expression, …]}. Raises BadRow."""
    if isinstance(expression, str):
        return expression
    if isinstance(expression, dict) and len(expression) == 1:
        kind, parts = next(iter(expression.items()))
        if kind == "repeat" and isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], int):
            return expand(parts[0]) * min(parts[1], 10_000_000)
        if kind == "concat" and isinstance(parts, list):
            return "".join(expand(part) for part in parts)
    raise BadRow(f"response_expr: cannot be read: {expression!r:.100}")


def job_of_row(row: Any) -> dict[str, Any]:
    """{"problem_type", "response", "gold", "extra", "benchmark"} of a dataset row or a case row. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow("the row is no JSON object")
    if "response" not in row and "response_expr" not in row:
        raise BadRow("response: missing; a row is a dataset sample plus response")
    response = row["response"] if "response" in row else expand(row["response_expr"])
    gold = next((row[name] for name in GOLD_FIELDS if row.get(name) is not None), None)
    nested = row.get("extra")
    used = {*GOLD_FIELDS, "extra", "response", "response_expr", "problem_type"}
    extra = {name: value for name, value in row.items() if name not in used} if not isinstance(nested, dict) else {}
    extra |= nested if isinstance(nested, dict) else {}
    if "options" not in extra and row.get("options") is not None:
        extra["options"] = row["options"]
    benchmark = row.get("benchmark")
    return {
        "problem_type": row.get("problem_type"),
        "response": response,
        "gold": gold,
        "extra": extra,
        "benchmark": benchmark if isinstance(benchmark, str) else "",
    }


def warm(problem_type: Any) -> str | None:
    """Starts what the type needs (a child, a slow import), so that it is not counted in the response's time."""
    try:
        kind = HEAVY.get(canonical_problem_type(problem_type))
    except ValueError:
        return None
    if kind == "code":
        sandbox.isolation()
    elif kind == "text":
        text.stemmer()
    elif kind:
        killable.ensure(kind)
    return kind


def score_job(job: dict[str, Any], mode: str = "auto") -> tuple[Score, str | None]:
    """(score, why the gold is bad or None)."""
    problem_type, response, extra = job["problem_type"], job["response"], job["extra"]
    special = _judge_rows(job)
    if special:
        return special
    prefilled = extra.get("think_prefilled") is True
    try:
        form = format_reward(response, format_mode(extra, mode), prefilled)
    except ValueError:
        form = 0.0
    try:
        gold = read_gold(problem_type, job["gold"], extra)
    except ValueError as error:
        return Score(0.0, form, "bad_ground_truth"), str(error)
    return score_against(canonical_problem_type(problem_type), response, gold, extra, form, prefilled), None


def _judge_rows(job: dict[str, Any]) -> tuple[Score, str | None] | None:
    """Rows about a judge's reading: its verdict, what is extracted for it, how a gold is cleaned."""
    name, response = job["problem_type"], job["response"]
    if isinstance(name, str) and name.strip().lower() == "judge verdict":
        verdict = parse_verdict(response)
        status = "no_answer" if verdict is None else "ok"
        return Score(float(verdict or 0), 0.0, status, None if verdict is None else str(verdict)), None
    if job.get("benchmark") == "judge.extract_model_answer":
        reading = find_answer(response, text.text_task(""))
        return Score(0.0, 0.0, reading.status, reading.value), None
    if job.get("benchmark") == "judge.extract_ground_truth":
        value = clean_gold(response)
        try:
            read_gold(name, value, {})
        except ValueError as error:
            return Score(0.0, 0.0, "bad_ground_truth"), str(error)
        return Score(0.0, 0.0, "ok", value), None
    return None
