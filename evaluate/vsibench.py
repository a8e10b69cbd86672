"""VSI-Bench: visual-spatial intelligence in room scans, eight tasks (arXiv 2412.14171).

    python evaluate/vsibench.py --model DIR --data_dir DIR

Layouts: vsibench.json (toolkit), or the release's test.jsonl / test-00000-of-00001.parquet (id, dataset, scene_name,
question_type, question, options, ground_truth). Videos: <dataset>/<scene_name>.mp4. Official: mean relative accuracy
(with <=, as in the released code) for numbers, accuracy for choices, relative direction as the mean of its three
levels, overall the mean of eight tasks.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import Namespace

from data.records import Sample
from evaluate._annotations import load_benchmark
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, by_field, macro
from evaluate._wording import joined, option_lines, reasoned_prompt

NAMES = ("vsibench.json", "test.jsonl", "test-00000-of-00001.parquet", "VSI-Bench/test.jsonl")
HINT = "The release's test.jsonl is in the dataset repository nyu-visionx/VSI-Bench."
FRAMES = "These are frames of a video."


def official_row(row: dict) -> dict:
    choice = row.get("options") is not None
    fields = {"problem_id": row["id"], "problem": row["question"], "solution": str(row["ground_truth"])}
    fields |= {"original_question_type": row["question_type"], "options": list(row["options"]) if choice else None}
    fields["problem_type"] = "multiple choice" if choice else "regression"
    return {**fields, "path": f"{row['dataset']}/{row['scene_name']}.mp4"}


def load(args: Namespace) -> list[Sample]:
    return load_benchmark(args, NAMES, hint=HINT, source="VSI-Bench", official=official_row)


def direct(sample: Sample) -> str:
    if sample.options:
        return joined(
            FRAMES, sample.question, "Options:", option_lines(sample), "Reply with the option's letter alone."
        )
    return joined(FRAMES, sample.question, "Reply with one number alone.")


def task_path(sample: Sample) -> tuple[str, ...]:
    """("object_rel_direction", "easy") for the three direction levels, ("room_size_estimation",) for the others."""
    name = sample.extra["original_question_type"]
    stem, _, level = name.rpartition("_")
    return (stem, level) if stem == "object_rel_direction" else (name,)


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = {"overall": macro(answers, draws, task_path)}
    found["object_rel_direction"] = macro(
        [answer if len(task_path(answer.sample)) == 2 else without_score(answer) for answer in answers],
        draws,
        task_path,
    )
    return found | by_field(answers, draws, "original_question_type")


def without_score(answer: Answer) -> Answer:
    return Answer(answer.sample, answer.row, None)


BENCHMARK = Benchmark(
    name="vsibench",
    title="VSI-Bench",
    load=load,
    media_roots=("VSI-Bench", "vsibench"),
    metrics=metrics,
    prompts={"official": direct, "official_cot": lambda sample: reasoned_prompt(sample, before=FRAMES)},
    primary="overall",
    groups=task_path,
    breakdown=("original_question_type",),
    official_n=5130,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
