"""MLVU: multiple-choice tasks on videos of minutes to hours, dev and test (arXiv 2406.04264).

    python evaluate/mlvu.py --model DIR --data_dir DIR [--split test]

Layouts: mlvu-dev.json, mlvu-test.json or mlvu.json (toolkit; the task follows from the file name of the video, except
that plot questions and topic reasoning share theirs and form one task), or the release's MLVU/json/<n>_<task>.json
(video, question, candidates, answer, question_type). Official: M-Avg, the mean of the task accuracies.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import choice_row, load_benchmark, read_rows, release_rows, video_sample
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy, macro
from evaluate._wording import letter_prompt, reasoned_prompt

HINT = "The release has MLVU/json/1_plotQA.json … and MLVU/video/."
TASK_OF = {"needle": "needle", "ego": "ego", "order": "order", "count": "count", "surveil": "anomaly"}
TASK_OF |= {"sports": "sports", "tutorial": "tutorial"}  # the two tasks that only the test split has


def task_of(path: str) -> str:
    prefix = re.match(r"(?:test_)?([A-Za-z]+)", Path(path).name)
    return TASK_OF.get(prefix[1] if prefix else "", "plot_and_topic")


def load(args: Namespace) -> list[Sample]:
    folders = [Path(args.data_dir) / name for name in ("MLVU/json", "json")]
    folder = next((folder for folder in folders if any(folder.glob("[0-9]_*.json"))), None)
    if folder is not None and args.annotations is None and args.split == "dev":
        samples = []
        for file in sorted(folder.glob("[0-9]_*.json")):

            def as_choice(row: dict, place: str = file.stem) -> dict:
                fields = {"task": row["question_type"], "problem_type": "multiple choice"}
                path = f"video/{place}/{row['video']}"
                return choice_row(row["question"], row["candidates"], row["answer"], path, **fields)

            rows = [row for row in read_rows(file) if "candidates" in row]  # the others are generation tasks
            for line, row in enumerate(rows, 1):
                made = {"_line": row["_line"], **release_rows(as_choice, row, file, HINT)[0]}
                samples.append(video_sample(made, file, source="MLVU", sample_id=f"{file.stem}-{line}"))
        return samples
    names = ("mlvu-dev.json",) if args.split == "dev" else ("mlvu-test.json", "mlvu.json")
    samples = load_benchmark(args, names, hint=HINT, source="MLVU")
    for sample in samples:
        sample.extra.setdefault("task", task_of(sample.media[0].path))
    return samples


def task(sample: Sample) -> tuple[str, ...]:
    return (sample.extra["task"],)


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = {"M-Avg": macro(answers, draws, task)}
    return found | accuracy(answers, draws, "micro_accuracy")


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="dev: 4 options; test: 6 options")


BENCHMARK = Benchmark(
    name="mlvu",
    title="MLVU",
    load=load,
    media_roots=("MLVU_dev/MLVU_dev", "MLVU_Test", "MLVU/MLVU", "MLVU"),
    prompts={"official": lambda sample: letter_prompt(sample, cue="Best option: ("), "official_cot": reasoned_prompt},
    metrics=metrics,
    primary="M-Avg",
    groups=task,
    breakdown=("task",),
    official_n={"dev": 2174, "test": 502},
    flags=flags,
    variant=lambda args: args.split,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
