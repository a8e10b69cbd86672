"""MotionBench (DEV): fine-grained motion in short clips, six question types (arXiv 2501.02955).

    python evaluate/motionbench.py --model DIR --data_dir DIR

Layouts: motionbench.json (toolkit), or the release's video_info.meta.jsonl (video_path, question_type, qa: uid,
question with its options, answer; questions of the TEST split have no answer and are left to the leaderboard). Clips:
self-collected/, public-dataset/; a clip named <source>_58_59.mp4 that is not there is cut from <source>.mp4, seconds
58 to 59. Official: accuracy, and per question type.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import Namespace

from data.records import Media, Sample
from evaluate._annotations import choice_row, load_benchmark, split_lettered
from evaluate._run import main
from evaluate._scoring import Benchmark
from evaluate._wording import CHOICE_PROMPTS

NAMES = ("motionbench.json", "video_info.meta.jsonl", "MotionBench/video_info.meta.jsonl")
HINT = "The release's video_info.meta.jsonl is in the dataset repository THUDM/MotionBench."


def official_row(row: dict) -> list[dict]:
    made = []
    for item in row["qa"]:
        if item["answer"] in ("NA", "", None):
            continue
        question, options = split_lettered(item["question"])
        fields = {"problem_id": item["uid"], "original_question_type": row["question_type"]}
        made.append(choice_row(question, options, item["answer"], row["video_path"], by_letter=True, **fields))
    return made


def load(args: Namespace) -> list[Sample]:
    return load_benchmark(args, NAMES, hint=HINT, source="MotionBench", official=official_row)


def cut_from_source(sample: Sample) -> list[Media]:
    found = re.match(r"(.*)_(\d+)_(\d+)(\.\w+)$", sample.media[0].path or "")
    if not found:
        return []
    return [Media("video", path=found[1] + found[4], start_s=float(found[2]), end_s=float(found[3]))]


BENCHMARK = Benchmark(
    name="motionbench",
    title="MotionBench (DEV)",
    load=load,
    prompts=CHOICE_PROMPTS,
    clips=cut_from_source,
    media_roots=("MotionBench-official/MotionBench", "MotionBench"),
    breakdown=("original_question_type",),
    official_n=4018,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
