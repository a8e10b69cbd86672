"""Video-MMLU: lecture videos, a detailed caption and a quiz of 15 questions each (arXiv 2504.14693).

    python evaluate/videommlu.py --model DIR --data_dir DIR --judge_url URL --judge_model NAME

Layouts: videommlu.json (toolkit: captions only), or the release's rows (video_id, caption, reasoning_qa: list of question,
answer; the quiz). Videos: youtube_videos/<id>.mp4. Official: both are graded by a judge (Qwen2.5-72B there), captions by
questions that it answers from them (captions_qa); here the judge compares a caption with the reference. ROUGE-L against
the reference is given beside as a rough figure that needs no judge.
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
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy, by_field, part_means
from evaluate._wording import joined

CAPTION = "Describe this lecture video in detail: what is shown, said and derived, step by step, with every formula."


def official_row(row: dict) -> list[dict]:
    path, made = f"youtube_videos/{row['video_id']}.mp4", []
    if row.get("caption"):
        fields = {"problem_id": row["video_id"], "part": "caption", "problem_type": "caption", "problem": ""}
        made.append({**fields, "solution": row["caption"], "path": path})
    for place, item in enumerate(row["reasoning_qa"]):
        fields = {"problem_id": f"{row['video_id']}/{place}", "part": "quiz", "problem_type": "open-ended"}
        made.append({**fields, "problem": item["question"], "solution": item["answer"], "path": path})
    return made


def load(args: Namespace) -> list[Sample]:
    hint = "The release is the dataset repository Enxin/Video-MMLU."
    names = ("videommlu.json", "videommlu.jsonl", "Video-MMLU/videommlu.parquet")
    samples = load_benchmark(args, names, hint=hint, source="Video-MMLU", official=official_row)
    for sample in samples:
        sample.extra.setdefault("part", "caption")
        if not sample.question.strip():
            sample.question = CAPTION
    return samples


def direct(sample: Sample) -> str:
    return sample.question if sample.extra["part"] == "caption" else joined(sample.question, "Answer in a few words.")


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    return accuracy(answers, draws) | by_field(answers, draws, "part") | part_means(answers, draws, ("rouge_l",))


BENCHMARK = Benchmark(
    name="videommlu",
    title="Video-MMLU",
    load=load,
    media_roots=("Video-MMLU",),
    prompts={"official": direct},
    metrics=metrics,
    judged=lambda sample: True,
    judge_prompt="videommlu",
    breakdown=("part",),
    official_n=1065,
    defaults={"max_response_tokens": 2048},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
