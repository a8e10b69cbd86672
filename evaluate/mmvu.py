"""MMVU: expert questions in 27 subjects, 625 choice and 375 open (validation; arXiv 2501.12380).

    python evaluate/mmvu.py --model DIR --data_dir DIR [--split mc] [--judge_url URL --judge_model NAME]

Layouts: mmvu-all.json / mmvu-mc.json / mmvu.json (toolkit; mmvu.json is the 625 choice items), or the release's
validation.json (id, question_type, question, choices, answer, video, metadata). Videos: videos/<Subject>/<n>.mp4.
Official: a judge reads both kinds; here the letter is read by rule and open answers by the judge, with the same
demand (the same concept, unambiguously).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import choice_row, load_benchmark
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy
from evaluate._wording import CHOICE_PROMPTS

HINT = "The release's validation.json is in the dataset repository yale-nlp/MMVU."


def official_row(row: dict) -> dict:
    path = row["video"].split("resolve/main/")[-1]
    fields = {"problem_id": row["id"]}
    if row["question_type"] == "multiple-choice":
        names = sorted(name for name, text in row["choices"].items() if text)
        texts = [row["choices"][name] for name in names]
        return choice_row(row["question"], texts, row["answer"], path, by_letter=True, **fields)
    fields |= {"problem": row["question"], "solution": row["answer"], "problem_type": "open-ended"}
    return {**fields, "path": path}


def load(args: Namespace) -> list[Sample]:
    names = ("mmvu-all.json", "validation.json", "MMVU/validation.json")
    if args.split == "mc":
        names = ("mmvu-mc.json", "mmvu.json", *names)
    samples = load_benchmark(args, names, hint=HINT, source="MMVU", official=official_row)
    for sample in samples:
        sample.extra["subject"] = Path(sample.media[0].path).parent.name
    return [sample for sample in samples if args.split == "all" or sample.options]


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = accuracy(answers, draws)
    values = [answer.score or 0.0 for answer in answers]
    found["multiple_choice"] = draws.mean(values, [bool(answer.sample.options) for answer in answers])
    found["open"] = draws.mean(values, [not a.sample.options and a.score is not None for a in answers])
    return found


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--split", choices=("all", "mc"), default="all", help="all 1,000, or the 625 choice items")


BENCHMARK = Benchmark(
    name="mmvu",
    title="MMVU (validation)",
    load=load,
    media_roots=("MMVU",),
    prompts=CHOICE_PROMPTS,
    metrics=metrics,
    breakdown=("subject",),
    official_n={"all": 1000, "mc": 625},
    flags=flags,
    variant=lambda args: args.split,
    judged=lambda sample: not sample.options,
    judge_prompt="mmvu",
    default_prompt="official_cot",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
