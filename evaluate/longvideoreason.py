"""LongVideo-Reason: reasoning over long videos, multiple choice (arXiv 2507.07966).

    python evaluate/longvideoreason.py --model DIR --data_dir DIR

Layouts: longvideoreason.json (toolkit), or rows with videos, problem (options in its last lines) and answer (a
letter). 23 of the toolkit's option lists hold pieces of a rationale and are excluded; 133 stand in a wrong order,
gold mostly first, and are put back in the order of their letters. Official: accuracy of the letter inside answer
tags.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import Namespace

from data.records import Sample
from evaluate._annotations import choice_row, gold_of, load_benchmark, split_lettered
from evaluate._run import main
from evaluate._scoring import Benchmark
from evaluate._wording import CHOICE_PROMPTS

HINT = "The release's evaluation file is in the dataset repository LongVideo-Reason."


def official_row(row: dict) -> dict:
    question, options = split_lettered(row["problem"])
    gold, fields = gold_of(row["answer"]), {"problem_id": row["id"]} if "id" in row else {}
    return choice_row(question, options, gold, row["videos"], by_letter=True, **fields)


def load(args: Namespace) -> list[Sample]:
    names = ("longvideoreason.json", "longvideo_reason_eval.json")
    return load_benchmark(args, names, hint=HINT, source="LongVideo-Reason", official=official_row)


BENCHMARK = Benchmark(
    name="longvideoreason",
    title="LongVideo-Reason",
    load=load,
    media_roots=("longvila_videos", "LongVideo-Reason"),
    prompts=CHOICE_PROMPTS,
    official_n=1000,
    default_prompt="think",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
