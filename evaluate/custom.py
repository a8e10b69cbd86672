"""Any file in the project's dataset format as a benchmark; no code needed.

    python evaluate/custom.py --model DIR --data FILE [FILE …] [--media_dir DIR] [--name mine] [--judge_open]

Rows as for training: problem, answer, problem_type, options, videos / images, data_source. The table has a line per
problem type and per source; numerical rows (counting sets) also get the mean absolute error and the share within one.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
import re
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from data.dataset import BadDataset
from data.dataset import load as load_dataset
from data.records import Sample
from evaluate._annotations import AnnotationError
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy
from rewards import check_gold


def load_rows(files: list[str], media_dir: str | None) -> list[Sample]:
    """Every row of dataset files, also where a video is missing or empty: its answer fails with that reason, and the others
    are given. Raises BadDataset naming all rows that can be no question, or ValueError."""
    read: list[Sample] = []

    def note(sample: Sample) -> str | None:
        problem = check_gold(sample)
        if problem is None:
            read.append(sample)
        return problem

    try:
        return load_dataset(files, media_dir=media_dir, check_gold=note)
    except BadDataset as error:
        places = {(sample.file, sample.line) for sample in read}
        if unusable := [problem for problem in error.problems if (problem["file"], problem["line"]) not in places]:
            raise BadDataset(unusable) from None
    seen: set[str] = set()
    for sample in read:  # ids and paths as they are when all files are there
        sample.id = f"{sample.id}@{sample.file}:{sample.line}" if sample.id in seen else sample.id
        seen.add(sample.id)
        sample.media = tuple(replace(m, path=os.path.abspath(m.path)) if m.path else m for m in sample.media)
    return read


def load(args: Namespace) -> list[Sample]:
    try:
        samples = load_rows(args.data, args.media_dir)
    except (BadDataset, ValueError) as error:
        raise AnnotationError(str(error)) from error
    for sample in samples:
        sample.extra["source"] = sample.source
        if sample.problem_type == "open-ended" and getattr(args, "judge_open", False):
            sample.extra["judge"] = True
    return samples


def counting_error(answer: Answer) -> float | None:
    """|predicted - gold| of a numerical answer whose reading is a plain number; None where there is none."""
    read = re.fullmatch(r"-?\d+(?:\.\d+)?", str(answer.row.get("extracted") or ""))
    gold = re.fullmatch(r"-?\d+(?:\.\d+)?", str(answer.sample.answer).strip())
    return abs(float(read[0]) - float(gold[0])) if read and gold else None


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = accuracy(answers, draws)
    errors = [counting_error(answer) if answer.sample.problem_type == "numerical" else None for answer in answers]
    if any(error is not None for error in errors):
        numerical = [answer.sample.problem_type == "numerical" for answer in answers]
        found["count_within_1"] = draws.mean([float(e is not None and e <= 1) for e in errors], numerical)
        found["count_mae_of_read"] = draws.mean([e or 0.0 for e in errors], [e is not None for e in errors])
    return found


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", required=True, help="dataset files")
    parser.add_argument("--name", default="custom", help="name of the set in tables and comparisons")
    parser.add_argument("--judge_open", action="store_true", help="open-ended answers wait for a judge (else ROUGE-L)")


BENCHMARK = Benchmark(
    name="custom",
    title="Custom benchmark",
    load=load,
    metrics=metrics,
    default_prompt="direct",
    breakdown=("source",),
    judged=lambda sample: bool(sample.extra.get("judge")),
    flags=flags,
    variant=lambda args: args.name,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
