"""LiveSports-3K QA: questions about a window of a sports broadcast (LiveCC, arXiv 2504.16030).

    python evaluate/livesports.py --model DIR --data_dir DIR

Layouts: livesports3k_qa.json (toolkit: path <video>_<start>_<end>.mp4), or the release's rows (video_id, video_start,
video_end, question_id, question, options or option_A to option_D, answer, q_type, OCR). A pre-cut clip is used if it is
there; else the source video <video>.mp4 is cut to [start, end) by timestamps while decoding. Official: accuracy, per
question type, and on OCR questions; the release takes the likeliest letter, here the model answers in words.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import Namespace

from data.prompts import split_options
from data.records import Media, Sample
from evaluate._annotations import choice_row, field_of, load_benchmark
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy
from evaluate._wording import CHOICE_PROMPTS

HINT = "The release is the dataset repository stdKonjac/LiveSports-3K."


def official_row(row: dict) -> dict:
    options = row["options"] if "options" in row else [row[f"option_{name}"] for name in "ABCD"]
    options = [text for _, text in split_options(options)]
    path = f"{row['video_id']}_{row['video_start']}_{row['video_end']}.mp4"
    fields = {"q_type_livesports": row["q_type"], "ocr_livesports": int(row["OCR"] if "OCR" in row else row["ocr"])}
    fields |= {"problem_id": row["question_id"]} if "question_id" in row else {}
    return choice_row(row["question"], options, row["answer"], path, by_letter=True, **fields)


def load(args: Namespace) -> list[Sample]:
    names = ("livesports3k_qa.json", "livesports.json", "sports3k-qa.jsonl")
    samples = load_benchmark(args, names, hint=HINT, source="LiveSports-3K-QA", official=official_row)
    for sample in samples:
        field_of(sample, "q_type_livesports"), field_of(sample, "ocr_livesports")
    return samples


def cut_from_source(sample: Sample) -> list[Media]:
    found = re.match(r"(.+)_([\d.]+)_([\d.]+)(\.\w+)$", sample.media[0].path or "")
    if not found:
        return []
    return [Media("video", path=found[1] + found[4], start_s=float(found[2]), end_s=float(found[3]))]


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    values = [answer.score or 0.0 for answer in answers]
    found = accuracy(answers, draws)
    for name in ("What", "Who", "When"):
        found[name] = draws.mean(values, [answer.sample.extra["q_type_livesports"] == name for answer in answers])
    ocr = [int(answer.sample.extra["ocr_livesports"]) == 1 for answer in answers]
    return found | {"OCR": draws.mean(values, ocr), "non_OCR": draws.mean(values, [not flag for flag in ocr])}


BENCHMARK = Benchmark(
    name="livesports",
    title="LiveSports-3K QA",
    load=load,
    prompts=CHOICE_PROMPTS,
    metrics=metrics,
    clips=cut_from_source,
    media_roots=("LiveSports-3K-QA/clips", "LiveSports-3K-QA", "videos"),
    official_n=1174,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
