"""LVBench: hour-long videos, six abilities (arXiv 2406.08035).

    python evaluate/lvbench.py --model DIR --data_dir DIR

Layouts: lvbench.json (toolkit; no question types), or the release's video_info.meta.jsonl (key, type, qa: uid,
question with its options, answer, question_type, time_reference). Videos: videos/<key>.mp4. Official: accuracy, and
per ability (a question can have several).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import Namespace

from data.records import Sample
from evaluate._annotations import choice_row, load_benchmark, split_lettered
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy
from evaluate._wording import CHOICE_PROMPTS

NAMES = ("lvbench.json", "video_info.meta.jsonl", "LVBench/video_info.meta.jsonl")
HINT = "The release's video_info.meta.jsonl is in the dataset repository THUDM/LVBench."


def official_row(row: dict) -> list[dict]:
    made = []
    for item in row["qa"]:
        question, options = split_lettered(item["question"])
        fields = {"problem_id": item["uid"], "abilities": list(item["question_type"]), "video_type": row["type"]}
        made.append(choice_row(question, options, item["answer"], f"videos/{row['key']}.mp4", by_letter=True, **fields))
    return made


def load(args: Namespace) -> list[Sample]:
    return load_benchmark(args, NAMES, hint=HINT, source="LVBench", official=official_row)


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found, values = accuracy(answers, draws), [answer.score or 0.0 for answer in answers]
    for name in sorted({name for answer in answers for name in answer.sample.extra.get("abilities", ())}):
        found[name] = draws.mean(values, [name in answer.sample.extra.get("abilities", ()) for answer in answers])
    return found


BENCHMARK = Benchmark(
    name="lvbench",
    title="LVBench",
    load=load,
    media_roots=("LVBench", "lvbench"),
    prompts=CHOICE_PROMPTS,
    metrics=metrics,
    breakdown=("video_type",),
    official_n=1549,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
