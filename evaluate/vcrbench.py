"""VCR-Bench: video chain-of-thought reasoning, 510 choice and 524 open questions (arXiv 2504.07956).

    python evaluate/vcrbench.py --model DIR --data_dir DIR [--judge_url URL --judge_model NAME]

Layouts: vcrbench.json (toolkit), or the release's list (id, video_path, question, multiple-choice, choices, answer,
dimension, duration in seconds). Videos: v1/videos/… Of the open answers 66 are intervals (right if tIoU > 0.7) and 144 boxes in
source pixels (right if IoU > 0.5): checked here; numbers too; the others wait for a judge. The step scores of the
release need its reasoning notes and a judge per step; they are not computed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import Namespace

from data.records import Sample
from evaluate._annotations import letter, load_benchmark
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy
from evaluate._sources import boxes_as_share, source_size
from evaluate._wording import CHOICE_PROMPTS

NAMES = ("vcrbench.json", "VCR-Bench/v1/meta_info_video.json", "meta_info_video.json")
HINT = "The release's meta_info_video.json is in the dataset repository VLM-Reasoning/VCR-Bench."
NUMBERS = r"\s*-?\d+(?:\.\d+)?\s*"


def answer_kind(answer: str) -> str:
    """interval "[5, 85]", box "[0, 432, 1027, 646]", number "12", else text."""
    if re.fullmatch(rf"\[{NUMBERS},{NUMBERS}\]", answer):
        return "interval"
    if re.fullmatch(rf"\[(?:{NUMBERS},){{3}}{NUMBERS}\]", answer):
        return "box"
    return "number" if re.fullmatch(NUMBERS, answer) else "text"


def official_row(row: dict) -> dict:
    choices, question = row["choices"] or {}, row["question"]
    if isinstance(choices, list):
        choices = {letter(place): text for place, text in enumerate(choices)}
    chosen = {name: choices[name] for name in sorted(choices) if choices[name]} if row["multiple-choice"] else {}
    texts = [f"{name}. {text}" for name, text in chosen.items()]
    # The release's questions end in their own options, which the prompt writes anyway.
    if texts and texts[0] in question:
        question = question[: question.index(texts[0])].strip()
    fields = {"problem_id": row["id"], "dimension": row.get("dimension"), "duration": row.get("duration")}
    kind = "multiple choice" if row["multiple-choice"] else "open-ended"
    fields |= {"problem": question, "options": texts, "solution": str(row["answer"]), "problem_type": kind}
    return {**fields, "path": row["video_path"]}


def duration_group(seconds: float) -> str:
    """Official groups: up to a minute, up to five, longer."""
    return "0-60 s" if seconds <= 60 else "60-300 s" if seconds <= 300 else "over 300 s"


def load(args: Namespace) -> list[Sample]:
    samples = load_benchmark(args, NAMES, hint=HINT, source="VCR-Bench", official=official_row)
    for sample in samples:
        sample.extra["kind"] = "choice" if sample.options else answer_kind(str(sample.answer).strip())
        if sample.extra["kind"] in ("interval", "box", "number"):
            sample.extra["answer_kind"] = sample.extra["kind"]
        if isinstance(sample.extra.get("duration"), (int, float)):
            sample.extra["duration_group"] = duration_group(sample.extra["duration"])
    return samples


def score(sample: Sample, response: str, extra: dict) -> dict:
    from evaluate._scoring import plain_score

    if sample.extra["kind"] == "box":
        sample, extra = boxes_as_share(sample, extra)
    return plain_score(sample, response, extra)


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = accuracy(answers, draws)
    for kind in ("choice", "interval", "box", "number", "text"):
        keep = [answer.sample.extra["kind"] == kind and answer.score is not None for answer in answers]
        found[kind] = draws.mean([answer.score or 0.0 for answer in answers], keep)
    return found


BENCHMARK = Benchmark(
    name="vcrbench",
    title="VCR-Bench",
    load=load,
    media_roots=("VCR-Bench/v1/videos", "v1/videos"),
    prompts=CHOICE_PROMPTS,
    score=score,
    metrics=metrics,
    breakdown=("kind", "dimension", "duration_group"),
    official_n=1034,
    watch=source_size,
    judged=lambda sample: sample.extra["kind"] == "text",
    judge_prompt="vcrbench",
    default_prompt="official_cot",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
