"""VideoMathQA: mathematics in lecture and puzzle videos (arXiv 2506.05349).

    python evaluate/videomathqa.py --model DIR --data_dir DIR [--split mcq]

Layout: videomathqa.jsonl (toolkit and release rows: 420 five-option questions, and 1,680 two-option ones with
mbinary_id, four per question). Videos: videos/<video_id>.mp4. Official: the two are separate scores, MCQ accuracy,
and MBin, which counts a question only if all its pairs are right. Their mixture (the easyvideor1 number) has a chance
level of 44 % and means little.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import load_benchmark
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics
from evaluate._wording import CHOICE_PROMPTS


def sample_id(row: dict) -> str:
    pair = row.get("mbinary_id")
    return f"{row['problem_id']}" if pair is None else f"{row['problem_id']}/pair{pair}"


def load(args: Namespace) -> list[Sample]:
    hint = "The questions are in the dataset repository MBZUAI/VideoMathQA."
    names = ("videomathqa.jsonl", "videomathqa.json")
    samples = load_benchmark(args, names, hint=hint, source="VideoMathQA", sample_id=sample_id)
    for sample in samples:
        sample.extra["split"] = "mbin" if "mbinary_id" in sample.extra else "mcq"
    return [sample for sample in samples if args.split in ("both", sample.extra["split"])]


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    values = [answer.score or 0.0 for answer in answers]
    mcq = [answer.sample.extra["split"] == "mcq" for answer in answers]
    pairs: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if not mcq[index]:
            pairs.setdefault(answer.sample.extra["problem_id"], []).append(index)
    whole, last = [0.0] * len(answers), [False] * len(answers)
    for members in pairs.values():
        whole[members[-1]] = float(all(values[index] == 1.0 for index in members))
        last[members[-1]] = True
    found = {"MCQ": draws.mean(values, mcq), "MBin": draws.mean(whole, last)}
    found["MBin_pairs"] = draws.mean(values, [not is_mcq for is_mcq in mcq])
    return {name: estimate for name, estimate in found.items() if estimate.n}


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--split", choices=("both", "mcq", "mbin"), default="both", help="which of the two scores")


BENCHMARK = Benchmark(
    name="videomathqa",
    title="VideoMathQA",
    load=load,
    media_roots=("VideoMathQA",),
    prompts=CHOICE_PROMPTS,
    metrics=metrics,
    primary="MCQ",
    breakdown=("split", "category", "length"),
    flags=flags,
    official_n={"both": 2100, "mcq": 420, "mbin": 1680},
    variant=lambda args: args.split,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
