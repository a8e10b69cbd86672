"""ODV-Bench: online driving video, multiple choice about a window of the drive (StreamForest, arXiv 2509.24871).

    python evaluate/odvbench.py --model DIR --data_dir DIR

Layouts: odvbench.json (toolkit shape as its code reads it: path <index>_<stem>_s<start>_e<end>.mp4, odv_task,
odv_subtask), or the release's rows (question, candidates, answer, video, start, end, task, subtask). A pre-cut clip is used if
it is there; else the source video <stem>.mp4 is cut to [start, end) by timestamps while decoding. Official: accuracy
per task, sub-task and sub-sub-task; the release leaves unanswered items out, here they are wrong and counted.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import Namespace
from dataclasses import replace

from data.records import Media, Sample
from evaluate._annotations import choice_row, load_benchmark
from evaluate._run import main
from evaluate._scoring import Benchmark
from evaluate._wording import CHOICE_PROMPTS

HINT = "The release's question files are in the StreamForest repository."


def official_row(row: dict) -> dict:
    fields = {"odv_task": row["task"], "odv_subtask": row.get("subtask"), "odv_subsubtask": row.get("subsubtask")}
    if "start" in row:
        fields |= {"start": float(row["start"]), "end": float(row["end"])}
    return choice_row(row["question"], row["candidates"], row["answer"], row["video"], **fields)


def load(args: Namespace) -> list[Sample]:
    names = ("odvbench.json", "ODV-Bench/odvbench.json")
    samples = load_benchmark(args, names, hint=HINT, source="ODV-Bench", official=official_row)
    for sample in samples:
        if "start" in sample.extra:
            window = {"start_s": sample.extra["start"], "end_s": sample.extra["end"]}
            sample.media = (replace(sample.media[0], **window),)
    return samples


def cut_from_source(sample: Sample) -> list[Media]:
    found = re.match(r"(?:.*/)?\d+_(.+)_s([\d.]+)_e([\d.]+)(\.\w+)$", sample.media[0].path or "")
    if not found:
        return []
    return [Media("video", path=found[1] + found[4], start_s=float(found[2]), end_s=float(found[3]))]


BENCHMARK = Benchmark(
    name="odvbench",
    title="ODV-Bench",
    load=load,
    media_roots=("ODV-Bench/clips", "ODV-Bench", "clips", "videos"),
    prompts=CHOICE_PROMPTS,
    clips=cut_from_source,
    breakdown=("odv_task", "odv_subtask", "odv_subsubtask"),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
