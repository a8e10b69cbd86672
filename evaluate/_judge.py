"""The second pass over open-ended answers: a judge sees question, gold and answer; its verdicts are kept and reused.

A verdict is stored in judgements.jsonl under a key of question, gold, answer, judge and wording, so a re-run asks only what
is new, and another judge never inherits verdicts. Prompts, retries and the reading of verdicts are `rewards.judge`'s; an
answer it could not grade scores 0 with status `judge_failed`, counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.records import Sample
from evaluate._predictions import digest, encode_row
from evaluate._scoring import FAILURES, Benchmark, plain_score, score_extra


def load_verdicts(folder: Path) -> dict[str, dict[str, Any]]:
    """Key -> row of judgements.jsonl; a last line cut by a kill is left out."""
    path, rows = folder / "judgements.jsonl", {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
        rows[row["key"]] = row
    return rows


def attach_verdicts(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Puts stored verdicts into the rows they were given for (same sample, same response)."""
    given = {(row["id"], row["answer_digest"]): row for row in load_verdicts(folder).values()}
    for row in rows.values():
        verdict = given.get((row["id"], digest(row.get("response", ""))))
        if verdict is not None:
            apply(row, verdict["verdict"])


def apply(row: dict[str, Any], verdict: int | None) -> None:
    row["judged_score"] = float(verdict or 0)
    row["judged_status"] = "ok" if verdict is not None else "judge_failed"


def judge_rows(
    benchmark: Benchmark, args: argparse.Namespace, folder: Path, samples: list[Sample], rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Asks the judge about every answer that needs one and has no stored verdict; facts for results.json."""
    from rewards.judge import Judge

    generate = None if args.judge_url else local_judge(args)
    judge = Judge(url=args.judge_url, model=args.judge_model, wording=benchmark.judge_prompt, generate=generate)
    stored = load_verdicts(folder)
    waiting: list[tuple[str, Sample, str]] = []
    for sample in samples:
        row = rows[sample.id]
        if not benchmark.judged(sample) or row["status"] in FAILURES:
            continue
        answer = plain_score(sample, row["response"], score_extra(sample, row))["extracted"]
        if answer is None:  # nothing to grade: an answer that never came, or was cut
            apply(row, 0)
            row["judged_status"] = "no_answer"
            continue
        key = digest([sample.question, str(sample.answer), answer, judge.identity])
        if key in stored:
            apply(row, stored[key]["verdict"])
        else:
            waiting.append((key, sample, answer))

    failed, many = 0, 64
    with (folder / "judgements.jsonl").open("ab") as file:
        for start in range(0, len(waiting), many):
            batch = waiting[start : start + many]
            verdicts = judge.grade_many([(sample.question, str(sample.answer), answer) for _, sample, answer in batch])
            for (key, sample, answer), verdict in zip(batch, verdicts):
                verdict = None if verdict == "failed" else verdict
                failed += verdict is None
                apply(rows[sample.id], verdict)
                record = {"key": key, "id": sample.id, "verdict": verdict, "answer": answer, "judge": judge.identity}
                file.write(encode_row({**record, "answer_digest": digest(rows[sample.id]["response"])}))
            file.flush()
            os.fsync(file.fileno())
    facts = {"identity": judge.identity, "asked": len(waiting), "without_verdict": failed}
    if args.judge_labels:
        facts["agreement"] = agreement(judge, Path(args.judge_labels))
    return facts


def local_judge(args: argparse.Namespace) -> Callable[[list[str]], list[str]]:
    """--judge_model FOLDER without an endpoint: that model in this process, greedy, through its chat template."""
    from vllm import LLM, SamplingParams

    llm = LLM(args.judge_model, tensor_parallel_size=args.tensor_parallel, trust_remote_code=args.trust_remote_code)
    sampling = SamplingParams(temperature=0.0, max_tokens=2048)

    def generate(prompts: list[str]) -> list[str]:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)
        return [output.outputs[0].text for output in outputs]

    return generate


def agreement(judge: Any, labels: Path) -> dict[str, float]:
    """Share of a labelled set {question, gold, answer, label 0 | 1} on which the judge agrees, and Cohen's kappa."""
    rows = [json.loads(line) for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
    verdicts = judge.grade_many([(row["question"], str(row["gold"]), row["answer"]) for row in rows])
    pairs = [(int(verdict), int(row["label"])) for verdict, row in zip(verdicts, rows) if verdict != "failed"]
    if not pairs:
        return {"n": 0, "failed": len(rows)}
    return {"n": len(pairs), "failed": len(rows) - len(pairs), **agreement_of(pairs)}


def agreement_of(pairs: list[tuple[int, int]]) -> dict[str, float]:
    """[(1,1),(1,0),(0,0),(0,0)] -> share 0.75, kappa 0.5 (Cohen 1960)."""
    share = sum(a == b for a, b in pairs) / len(pairs)
    ours, theirs = sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)
    expected = ours * theirs + (1 - ours) * (1 - theirs)
    return {"share": round(share, 4), "kappa": round((share - expected) / (1 - expected), 4) if expected < 1 else 1.0}
