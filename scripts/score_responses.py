"""Scores a file of responses with the rewards of training and evaluation; needs no torch and no GPU.

    python scripts/score_responses.py --input rows.jsonl --output scores.jsonl [--on_bad_gold score] [--mode think]

A row is a dataset sample plus `response`, or a case row (`ground_truth`, `extra`, `response_expr`). The output has one row
per input row, in order: id, problem_type, extracted, accuracy, format, reward, status. A table per type goes to stdout.
Files may be larger than memory. Exit status: 0, 1 when golds were bad and --on_bad_gold is score, 2 on an error (a bad
gold with --on_bad_gold error, a line that is no row): then nothing is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rewards.mix import check_weights, overall
from rewards.pool import ScoringPool, workers_for_all_cores
from rewards.rows import BadRow, job_of_row

CHUNK = 16  # rows that go to a worker together
AHEAD = 8  # chunks in flight per worker
SHOWN = 20


@dataclass
class Total:
    """Sums of one problem type."""

    rows: int = 0
    accuracy: float = 0.0
    format: float = 0.0
    reward: float = 0.0
    answered: int = 0
    bad: int = 0


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="score a file of responses")
    parser.add_argument("--input", required=True, help="JSON lines: dataset samples plus response")
    parser.add_argument("--output", required=True, help="JSON lines: one scored row per input row, in order")
    parser.add_argument(
        "--on_bad_gold",
        choices=("error", "score"),
        default="error",
        help="error: write nothing, name file and line, exit 2; score: accuracy 0, status bad_ground_truth, exit 1",
    )
    parser.add_argument("--mode", choices=("auto", "think", "direct", "open"), default="auto", help="format asked for")
    parser.add_argument("--accuracy_weight", type=float, default=0.9, help="weight of accuracy in reward")
    parser.add_argument("--format_weight", type=float, default=0.1, help="weight of format in reward")
    parser.add_argument("--reward", default=None, help="own reward instead: path.py:function")
    parser.add_argument("--reward_args", default=None, help="JSON object passed to --reward as keyword arguments")
    parser.add_argument(
        "--workers", type=int, default=workers_for_all_cores(), help="scoring processes (default: cores)"
    )
    parser.add_argument("--timeout_s", type=float, default=60.0, help="limit per response; beyond it scores 0")
    args = parser.parse_args(given)
    check_weights(args.accuracy_weight, args.format_weight)
    return args


def chunks(path: str) -> Iterator[list[tuple[int, dict[str, Any], dict[str, Any]]]]:
    """Lists of (line number, row, job). Raises BadRow naming the line; blank lines are skipped."""
    chunk = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                chunk.append((number, row, job_of_row(row)))
            except UnicodeDecodeError as error:
                raise BadRow(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                raise BadRow(f"{path}:{number}: not JSON ({error.msg}); write one object per line") from error
            except BadRow as error:
                raise BadRow(f"{path}:{number}: {error}") from error
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def scored(args: argparse.Namespace, pool: ScoringPool) -> Iterator[tuple[int, dict[str, Any], Any, str | None]]:
    """(line number, row, score, why the gold is bad) in file order; a bounded number of chunks is in flight."""
    waiting: deque = deque()
    for chunk in chunks(args.input):
        waiting.append((chunk, pool.submit_jobs([job for _, _, job in chunk], reasons=True)))
        if len(waiting) >= AHEAD * args.workers:
            yield from _results(*waiting.popleft())
    while waiting:
        yield from _results(*waiting.popleft())


def _results(chunk, futures) -> Iterator[tuple[int, dict[str, Any], Any, str | None]]:
    for (number, row, _), future in zip(chunk, futures):
        score, bad = future.result()
        yield number, row, score, bad


def identity(row: dict[str, Any], number: int) -> Any:
    return next((row[name] for name in ("id", "problem_id") if row.get(name) is not None), number)


def write(args: argparse.Namespace, pool: ScoringPool, partial: str) -> tuple[dict[str, Total], list[str]]:
    """Writes the scores to `partial`; (sums per type, problems). Ends early when a bad gold is an error."""
    totals: dict[str, Total] = {}
    problems: list[str] = []
    with open(partial, "w", encoding="utf-8") as out:
        for number, row, score, bad in scored(args, pool):
            if bad is not None:
                problems.append(f"{args.input}:{number}: sample {identity(row, number)}: {bad}")
                if args.on_bad_gold == "error" and len(problems) >= SHOWN:
                    break
            reward = overall(score.accuracy, score.format, args.accuracy_weight, args.format_weight)
            kind = row.get("problem_type")
            result = {
                "id": identity(row, number),
                "problem_type": kind,
                "extracted": score.extracted,
                "accuracy": score.accuracy,
                "format": score.format,
                "reward": reward,
                "status": score.status,
            }
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            total = totals.setdefault(str(kind).strip().lower(), Total())
            total.rows += 1
            total.accuracy += score.accuracy
            total.format += score.format
            total.reward += reward
            total.answered += score.status == "ok"
            total.bad += bad is not None
    return totals, problems


def table(totals: dict[str, Total]) -> str:
    lines = [f"{'problem type':28} {'rows':>8} {'accuracy':>9} {'format':>7} {'reward':>7} {'ok':>7} {'bad gold':>9}"]
    for kind in sorted(totals):
        total = totals[kind]
        means = [value / total.rows for value in (total.accuracy, total.format, total.reward, total.answered)]
        lines.append(
            f"{kind:28} {total.rows:8} {means[0]:9.4f} {means[1]:7.3f} {means[2]:7.4f} {means[3]:7.1%} {total.bad:9}"
        )
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    partial = None
    try:
        args = arguments(given)
        if not os.path.isfile(args.input):
            raise BadRow(f"--input {args.input}: no such file")
        if not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
            raise BadRow(f"--output {args.output}: its folder does not exist")
        partial = f"{args.output}.partial"
        with ScoringPool(args.workers, args.timeout_s, args.mode, args.reward, args.reward_args) as pool:
            totals, problems = write(args, pool, partial)
    except ValueError as error:
        if partial and os.path.exists(partial):
            os.remove(partial)
        print(error, file=sys.stderr)
        return 2
    for problem in problems[:SHOWN]:
        print(problem, file=sys.stderr)
    if problems and args.on_bad_gold == "error":
        os.remove(partial)
        print("nothing written; correct these golds, or use --on_bad_gold score", file=sys.stderr)
        return 2
    os.replace(partial, args.output)
    print(table(totals))
    if problems:
        print(f"{len(problems)} rows with a bad gold scored 0 (status bad_ground_truth)", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
