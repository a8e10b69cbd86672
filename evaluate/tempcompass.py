"""TempCompass: direction, speed, order and change, asked in four ways about the same clips (arXiv 2403.00476).

    python evaluate/tempcompass.py --model DIR --data_dir DIR [--tasks multi-choice yes_no]

Layouts: tempcompass.json (toolkit), or the release's questions/{multi-choice,yes_no,caption_matching,captioning}.json
(video -> dimension -> list of question, answer). Videos: videos/<id>.mp4. Captions need a judge and wait for one; it
compares them with the right piece of information (officially it answers the multiple-choice question from the caption).
Official: accuracy per task and per dimension.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import (
    AnnotationError,
    choice_row,
    keyed_entries,
    load_benchmark,
    release_rows,
    split_lettered,
    video_sample,
)
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy, by_field
from evaluate._wording import joined, letter_prompt, reasoned_prompt

TASKS = ("multi-choice", "yes_no", "caption_matching", "captioning")
HINT = "The release has questions/<task>.json; the toolkit has tempcompass.json."


def row_of(task: str, video: str, dimension: str, item: dict) -> dict:
    """One question of the release in the toolkit shape."""
    fields = {"task": task, "dimension": dimension}
    path, question = f"videos/{video}.mp4", item["question"]
    if task == "yes_no":
        return {"problem": question, "solution": item["answer"], "problem_type": "boolean", "path": path, **fields}
    if task == "captioning":
        return {"problem": question, "solution": item["answer"], "problem_type": "open-ended", "path": path, **fields}
    stem, options = split_lettered(question)
    if not options:  # caption matching names its choices "Option 1: …", "Caption A: …"
        found = list(re.finditer(r"^(?:Option|Caption|Sentence)\s*\w+:\s*(.*)$", question, re.MULTILINE))
        stem, options = question[: found[0].start()].strip(), [match[1].strip() for match in found]
    gold = re.sub(r"^(?:(?:Option|Caption|Sentence)\s*\w+:|\(?[A-Z][.):])\s*", "", item["answer"]).strip()
    return choice_row(stem, options, gold, path, **fields)


def load(args: Namespace) -> list[Sample]:
    folders = [Path(args.data_dir) / name for name in ("questions", "TempCompass/questions")]
    folder = next((folder for folder in folders if any((folder / f"{task}.json").is_file() for task in TASKS)), None)
    if folder is None or args.annotations:
        samples = load_benchmark(args, ("tempcompass.json",), hint=HINT, source="TempCompass")
    else:
        samples = []
        for task in TASKS:
            file = folder / f"{task}.json"
            for video, dimensions in keyed_entries(file, HINT):

                def rows_of(dimensions: dict, task: str = task, video: str = video) -> list[dict]:
                    return [
                        {**row_of(task, video, dimension, item), "name": f"{task}/{video}/{dimension}/{place}"}
                        for dimension, items in dimensions.items()
                        for place, item in enumerate(items)
                    ]

                for row in release_rows(rows_of, dimensions, f"{file}:{video}", HINT):
                    row = {"problem_type": "multiple choice", **row}
                    samples.append(video_sample(row, file, source="TempCompass", sample_id=row.pop("name")))
    if args.tasks and not any("task" in sample.extra for sample in samples):
        raise AnnotationError(f"--tasks needs the release's questions/, where tasks are named. {HINT}")
    return [sample for sample in samples if not args.tasks or sample.extra.get("task") in args.tasks]


def direct(sample: Sample) -> str:
    if sample.problem_type == "boolean":
        return joined(sample.question, "Answer with yes or no only.")
    return sample.question if sample.problem_type == "open-ended" else letter_prompt(sample)


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    return accuracy(answers, draws) | by_field(answers, draws, "task") | by_field(answers, draws, "dimension")


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these tasks (release layout)")


BENCHMARK = Benchmark(
    name="tempcompass",
    title="TempCompass",
    load=load,
    media_roots=("TempCompass",),
    metrics=metrics,
    flags=flags,
    prompts={"official": direct, "official_cot": reasoned_prompt},
    breakdown=("task", "dimension"),
    official_n=7540,
    judged=lambda sample: sample.problem_type == "open-ended",
    variant=lambda args: "+".join(args.tasks or ()),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
