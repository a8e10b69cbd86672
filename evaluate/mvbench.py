"""MVBench: 20 tasks of 200 multiple-choice questions about short clips (arXiv 2311.17005).

    python evaluate/mvbench.py --model DIR --data_dir DIR

Layouts: mvbench.json (toolkit; the task follows from problem_id), or the release's folder json/<task>.json (video,
question, candidates, answer, start, end). Clips of STAR, STA and TVQA questions are cut to [start, end) by timestamps
while decoding (the easyvideor1 protocol shows whole videos, as that toolkit does). Official: mean over the task
accuracies.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import Namespace
from dataclasses import replace

from data.records import Media, Sample
from evaluate._annotations import (
    AnnotationError,
    choice_row,
    field_of,
    load_benchmark,
    read_rows,
    release_rows,
    video_sample,
)
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy, macro
from evaluate._wording import letter_prompt, reasoned_prompt

# In the order of problem_id, 200 each; the folder of each task's videos in the release.
TASKS = {
    "action_antonym": "ssv2_video", "action_count": "perception/videos", "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480", "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos", "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation", "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480", "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video", "state_change": "perception/videos", "unexpected_action": "FunQA_test/test",
}  # fmt: skip
HINT = "The release has json/<task>.json for its 20 tasks and video/ beside it."


def release_samples(folder: Path) -> list[Sample]:
    samples = []
    for task, place in TASKS.items():
        file = folder / f"{task}.json"
        # NTU RGB+D and TVQA cannot be had by everybody; the table says how many of 4,000 there are.
        if not file.is_file():
            continue

        def as_choice(row: dict, task: str = task, place: str = place) -> dict:
            fields = {name: row[name] for name in ("start", "end") if row.get(name) is not None}
            path = f"{place}/{row['video']}"
            return choice_row(row["question"], row["candidates"], row["answer"], path, task=task, **fields)

        for row in read_rows(file):
            made = {
                "problem_type": "multiple choice",
                "_line": row["_line"],
                **release_rows(as_choice, row, file, HINT)[0],
            }
            sample = video_sample(made, file, source="MVBench", sample_id=f"{task}-{row['_line']}")
            shots = folder.parent / "video" / made["path"]
            frames = sorted(map(str, shots.glob("*.jpg"))) if place[:4] == "tvqa" else []
            if frames:
                sample.media = (Media("video", frames=tuple(frames), fps=3.0),)
            samples.append(sample)
    return samples


def load(args: Namespace) -> list[Sample]:
    folders = [Path(args.data_dir) / name for name in ("json", "MVBench/json", "mvbench/json")]
    folder = next((folder for folder in folders if any((folder / f"{task}.json").is_file() for task in TASKS)), None)
    if folder is not None and args.annotations is None:
        samples = release_samples(folder)
    else:
        samples = load_benchmark(args, ("mvbench.json",), hint=HINT, source="MVBench")
        for sample in samples:
            place = str(field_of(sample, "problem_id"))
            if not (place.isdecimal() and 1 <= int(place) <= 4000):
                raise AnnotationError(f"{sample.file}:{sample.line}: field 'problem_id' must be 1 to 4000, got {place}")
            sample.extra["task"] = list(TASKS)[(int(place) - 1) // 200]
    for sample in samples:
        if args.protocol == "official" and "start" in sample.extra:
            window = {"start_s": float(sample.extra["start"]), "end_s": float(field_of(sample, "end"))}
            sample.media = (replace(sample.media[0], **window),)
    return samples


def task(sample: Sample) -> tuple[str, ...]:
    return (sample.extra["task"],)


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = {"macro_accuracy": macro(answers, draws, task)}
    return found | accuracy(answers, draws, "micro_accuracy")


BENCHMARK = Benchmark(
    name="mvbench",
    title="MVBench",
    load=load,
    media_roots=("MVBench", "mvbench/video", "video"),
    prompts={"official": lambda sample: letter_prompt(sample, cue="Best option: ("), "official_cot": reasoned_prompt},
    metrics=metrics,
    primary="macro_accuracy",
    groups=task,
    breakdown=("task",),
    official_n=4000,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
