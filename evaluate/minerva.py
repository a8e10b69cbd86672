"""MINERVA: multi-step questions with five options on long web videos (arXiv 2505.00681).

    python evaluate/minerva.py --model DIR --data_dir DIR

Layouts: minerva.json (toolkit; no question types), or the release's minerva.json (key, video_id, question,
answer_choice_0 to answer_choice_4, answer_id, question_type (older files: "question type"), split, category). Videos:
<video_id>.mp4. Official: accuracy, and per question type, split and category. An unanswered item scores 0 here; a guess
at random would be worth 0.2.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import Namespace

from data.records import Sample
from evaluate._annotations import choice_row, load_benchmark
from evaluate._run import main
from evaluate._scoring import Benchmark
from evaluate._wording import CHOICE_PROMPTS


def official_row(row: dict) -> dict:
    options = [row[f"answer_choice_{index}"] for index in range(5)]
    kind = row.get("question_type", row.get("question type"))
    fields = {
        "problem_id": row["key"],
        "question_type": kind,
        "split": row.get("split"),
        "category": row.get("category"),
    }
    return choice_row(row["question"], options, int(row["answer_id"]), f"{row['video_id']}.mp4", **fields)


def load(args: Namespace) -> list[Sample]:
    hint = "The release's minerva.json comes from the project's page (neptune/minerva)."
    return load_benchmark(args, ("minerva.json",), hint=hint, source="MINERVA", official=official_row)


BENCHMARK = Benchmark(
    name="minerva",
    title="MINERVA",
    load=load,
    media_roots=("Minderva", "MINERVA", "minerva", "videos"),
    prompts=CHOICE_PROMPTS,
    breakdown=("question_type", "split", "category"),
    official_n=1515,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
