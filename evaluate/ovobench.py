"""OVO-Bench: online video understanding, twelve tasks asked at a moment of the stream (arXiv 2501.05510).

    python evaluate/ovobench.py --model DIR --data_dir DIR

Layouts: ovobench.json (toolkit: one row per query, clips chunked_videos/<id>.mp4 or <id>_<k>.mp4 that end at the
query), or the release's ovo_bench_new.json (id, task, video, realtime, question, options, gt, test_info). With the
release's file a chunked clip is used if it is there; else the source video is cut to [0, query time) by timestamps
while decoding. Official: mean of the task accuracies per category, then of the three categories (the paper's
overall figure; task_mean is the mean of the twelve tasks, which the release's code prints as total). Counting reads one
number and yes / no one word (the release joins all digits, or looks for the gold anywhere in the answer: the same on a
bare answer).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import Namespace
from dataclasses import replace

from data.records import Media, Sample
from evaluate._annotations import choice_row, field_of, load_benchmark
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy, macro
from evaluate._wording import joined, letter_prompt, reasoned_prompt

NAMES = ("ovobench.json", "ovo_bench_new.json", "OVO-Bench/ovo_bench_new.json")
HINT = "The release's ovo_bench_new.json is in the repository JoeLeelyf/OVO-Bench."
CATEGORY = {
    "EPM": "backward",
    "ASI": "backward",
    "HLD": "backward",
    "REC": "forward",
    "SSR": "forward",
    "CRR": "forward",
}
FORWARD = {
    "REC": "People in the video may do one kind of action again and again. Count how often they have done it so far, all "
    "people together, one complete motion counting once: {}\nAnswer with the number alone.",
    "SSR": "The video is a tutorial made of steps. Is the person doing this step right now, at the end of the video: {}\n"
    "Answer with yes or no only.",
    "CRR": "Does the video shown so far, its last frames above all, already hold what is needed to answer this: {}\n"
    "Answer with yes or no only.",
}


def official_row(row: dict) -> dict | list[dict]:
    task, number = row["task"], row["id"]
    fields = {"ovo_task": task, "ovo_category": CATEGORY.get(task, "realtime"), "ovo_id": number}
    if task not in FORWARD:
        fields |= {"problem_id": f"ovo_{number}", "query_s": float(row["realtime"]), "source_video": row["video"]}
        return choice_row(row["question"], row["options"], int(row["gt"]), f"{number}.mp4", **fields)
    made = []
    for place, test in enumerate(row["test_info"]):
        text = (
            row["question"]
            if task == "CRR"
            else test["step"]
            if task == "SSR"
            else f"How many times did they {row['activity']}?"
        )
        gold = str(test["count"]) if task == "REC" else "Yes" if test["type"] == 1 else "No"
        query = {"query_s": float(test["realtime"]), "source_video": row["video"], "ovo_test_idx": place}
        query |= {"problem": text, "solution": gold, "problem_type": task, "problem_id": f"ovo_{number}_{place}"}
        if task != "REC":
            query["ovo_type"] = test["type"]
        made.append({**fields, **query, "path": f"{number}_{place}.mp4"})
    return made


def load(args: Namespace) -> list[Sample]:
    samples = load_benchmark(args, NAMES, hint=HINT, source="OVO-Bench", official=official_row)
    for sample in samples:
        field_of(sample, "ovo_task"), field_of(sample, "ovo_category")
    return samples


def cut_from_source(sample: Sample) -> list[Media]:
    if "source_video" not in sample.extra:
        return []
    return [Media("video", path=sample.extra["source_video"], end_s=sample.extra["query_s"])]


def direct(sample: Sample) -> str:
    wording = FORWARD.get(sample.extra["ovo_task"])
    return wording.format(sample.question) if wording else letter_prompt(sample)


def reasoned(sample: Sample) -> str:
    wording = FORWARD.get(sample.extra["ovo_task"])
    if wording is None:
        return reasoned_prompt(sample)
    question = re.sub(r"\nAnswer with .*", "", wording).format(sample.question)
    return joined(reasoned_prompt(replace(sample, question=question)))


def path(sample: Sample) -> tuple[str, ...]:
    return (sample.extra["ovo_category"], sample.extra["ovo_task"])


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = {"total": macro(answers, draws, path)}
    for category in ("backward", "realtime", "forward"):
        only = [a if path(a.sample)[0] == category else Answer(a.sample, a.row, None) for a in answers]
        found[category] = macro(only, draws, path)
    found["task_mean"] = macro(answers, draws, lambda sample: path(sample)[1:])
    return found | accuracy(answers, draws, "micro_accuracy")


BENCHMARK = Benchmark(
    name="ovobench",
    title="OVO-Bench",
    load=load,
    media_roots=("OVO-Bench/chunked_videos", "chunked_videos", "src_videos"),
    prompts={"official": direct, "official_cot": reasoned},
    metrics=metrics,
    primary="total",
    groups=path,
    clips=cut_from_source,
    breakdown=("ovo_category", "ovo_task"),
    official_n=3035,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
