"""The second pass over open-ended answers: a judge sees question, gold and answer; its verdicts are kept and reused.

A verdict is stored in judgements.jsonl under a key of question, gold, answer, judge and wording, so a re-run asks only what
is new, and another judge never inherits verdicts. Prompts, retries and the reading of verdicts are `rewards.judge`'s. A
reply without a verdict scores 0 with status `judge_failed`, counted apart; no reply at all is no verdict: the answer goes
on waiting, and a judge that cannot be reached ends the pass.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.records import Sample
from evaluate._annotations import AnnotationError, read_rows
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


def key_of(sample: Sample, answer: str, judge: str) -> str:
    return digest([sample.question, str(sample.answer), answer, judge])


def attach_verdicts(benchmark: Benchmark, folder: Path, samples: list[Sample], rows: dict[str, dict[str, Any]]) -> None:
    """Puts stored verdicts into the rows they were given for: same question, gold and response. The last judge's count."""
    given: dict[str, list[dict[str, Any]]] = {}
    for verdict in load_verdicts(folder).values():
        given.setdefault(verdict["id"], []).append(verdict)
    for sample in samples:
        row = rows[sample.id]
        forget(row)
        for verdict in given.get(sample.id, ()):
            same = verdict["key"] == key_of(sample, verdict["answer"], verdict["judge"])
            if same and verdict["answer_digest"] == digest(row.get("response", "")):
                apply(row, verdict["verdict"])
        if row["status"] not in FAILURES and given and extracted(benchmark, sample, row) is None:
            nothing_said(row)


def apply(row: dict[str, Any], verdict: int | None) -> None:
    row["judged_score"] = float(verdict or 0)
    row["judged_status"] = "ok" if verdict is not None else "judge_failed"


def nothing_said(row: dict[str, Any]) -> None:
    """Nothing to grade: an answer that never came, or was cut."""
    row["judged_score"], row["judged_status"] = 0.0, "no_answer"


def forget(row: dict[str, Any]) -> None:
    """Takes back what an earlier pass said: the gold, the answer or the judge may be another now."""
    row.pop("judged_score", None)
    row.pop("judged_status", None)


def extracted(benchmark: Benchmark, sample: Sample, row: dict[str, Any]) -> str | None:
    """What the judge is shown of a response; None when there is nothing to grade."""
    return (benchmark.score or plain_score)(sample, row["response"], score_extra(sample, row))["extracted"]


def judge_rows(
    benchmark: Benchmark, args: argparse.Namespace, folder: Path, samples: list[Sample], rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Asks the judge about every answer that needs one and has no stored verdict; facts for results.json."""
    from rewards.judge import Judge

    labels = read_labels(args.judge_labels) if args.judge_labels else []
    generate = None if args.judge_url else local_judge(args)
    judge = Judge(url=args.judge_url, model=args.judge_model, wording=benchmark.judge_prompt, generate=generate)
    stored = load_verdicts(folder)
    waiting: list[tuple[str, Sample, str]] = []
    for sample in samples:
        row = rows[sample.id]
        forget(row)
        if row["status"] in FAILURES:
            continue
        answer = extracted(benchmark, sample, row)
        if answer is None:
            nothing_said(row)
            continue
        key = key_of(sample, answer, judge.identity)
        if key in stored:
            apply(row, stored[key]["verdict"])
        else:
            waiting.append((key, sample, answer))

    failed = lost = 0
    many = 64
    with (folder / "judgements.jsonl").open("ab") as file:
        for start in range(0, len(waiting), many):
            batch = waiting[start : start + many]
            before = no_reply(judge)
            verdicts = judge.grade_many([(sample.question, str(sample.answer), answer) for _, sample, answer in batch])
            silent = no_reply(judge) > before  # some request got no reply, so "failed" may mean just that
            for (key, sample, answer), verdict in zip(batch, verdicts):
                verdict = None if verdict == "failed" else verdict
                if verdict is None and silent:
                    lost += 1
                    continue
                failed += verdict is None
                apply(rows[sample.id], verdict)
                record = {"key": key, "id": sample.id, "verdict": verdict, "answer": answer, "judge": judge.identity}
                file.write(encode_row({**record, "answer_digest": digest(rows[sample.id]["response"])}))
            file.flush()
            os.fsync(file.fileno())
            if silent and all(verdict == "failed" for verdict in verdicts):
                lost += len(waiting) - start - len(batch)
                break
    if lost:
        print(
            f"{benchmark.name}: the judge {args.judge_url} gave no reply for {lost} of {len(waiting)} answers; they wait "
            "(n_unjudged) and are asked about again by the same command"
        )
    facts = {"identity": judge.identity, "asked": len(waiting), "without_verdict": failed, "without_reply": lost}
    if labels and not (lost and lost == len(waiting)):
        facts["agreement"] = agreement(judge, labels)
    return facts


def no_reply(judge: Any) -> int:
    return judge.counts["unreachable"] + judge.counts["refused"]


def local_judge(args: argparse.Namespace) -> Callable[[list[str]], list[str]]:
    """--judge_model FOLDER without an endpoint: that model in this process, greedy, through its chat template."""
    from vllm import LLM, SamplingParams

    llm = LLM(args.judge_model, tensor_parallel_size=args.tensor_parallel, trust_remote_code=args.trust_remote_code)
    sampling = SamplingParams(temperature=0.0, max_tokens=2048)

    def generate(prompts: list[str]) -> list[str]:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)
        return [output.outputs[0].text for output in outputs]

    return generate


def read_labels(file: str) -> list[dict[str, Any]]:
    """Rows {question, gold, answer, label 0 | 1} of --judge_labels. Raises AnnotationError naming file, line and field."""
    rows = read_rows(file)
    for row in rows:
        missing = [name for name in ("question", "gold", "answer", "label") if name not in row]
        if missing or row["label"] not in (0, 1):
            wrong = f"field {missing[0]!r} is missing" if missing else f"label must be 0 or 1, got {row['label']!r}"
            raise AnnotationError(f"--judge_labels {file}:{row['_line']}: {wrong}")
    return rows


def agreement(judge: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of a labelled set {question, gold, answer, label 0 | 1} on which the judge agrees, and Cohen's kappa."""
    verdicts = judge.grade_many([(row["question"], str(row["gold"]), str(row["answer"])) for row in rows])
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
