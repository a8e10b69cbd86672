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

import json
from argparse import Namespace
from dataclasses import replace

from data.records import Media, Sample
from evaluate._annotations import choice_row, load_benchmark, toolkit_sample
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
        if not file.is_file():
            continue
        for line, row in enumerate(json.loads(file.read_text(encoding="utf-8")), 1):
            fields = {"task": task, "_line": line, "data_type": "video", "problem_type": "multiple choice"}
            fields |= {name: row[name] for name in ("start", "end") if row.get(name) is not None}
            made = choice_row(row["question"], row["candidates"], row["answer"], f"{place}/{row['video']}", **fields)
            sample = toolkit_sample(made, file, source="MVBench", sample_id=f"{task}-{line}")
            frames = (
                sorted((folder.parent / "video" / place / row["video"]).glob("*.jpg")) if place[:4] == "tvqa" else []
            )
            if frames:
                sample.media = (Media("video", frames=tuple(map(str, frames)), fps=3.0),)
            samples.append(sample)
    return samples


def load(args: Namespace) -> list[Sample]:
    folders = [Path(args.data_dir) / name for name in ("json", "MVBench/json", "mvbench/json")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is not None and args.annotations is None:
        samples = release_samples(folder)
    else:
        samples = load_benchmark(args, ("mvbench.json",), hint=HINT, source="MVBench")
        for sample in samples:
            sample.extra["task"] = list(TASKS)[(int(sample.extra["problem_id"]) - 1) // 200]
    for sample in samples:
        if args.protocol == "official" and "start" in sample.extra:
            window = {"start_s": float(sample.extra["start"]), "end_s": float(sample.extra["end"])}
            sample.media = (replace(sample.media[0], **window),)
    return samples


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = {"macro_accuracy": macro(answers, draws, lambda answer: (answer.sample.extra["task"],))}
    return found | accuracy(answers, draws, "micro_accuracy")


BENCHMARK = Benchmark(
    name="mvbench",
    title="MVBench",
    load=load,
    media_roots=("MVBench", "mvbench/video", "video"),
    prompts={"official": lambda sample: letter_prompt(sample, cue="Best option: ("), "official_cot": reasoned_prompt},
    metrics=metrics,
    primary="macro_accuracy",
    breakdown=("task",),
    official_n=4000,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
