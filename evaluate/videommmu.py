"""Video-MMMU: learning from lecture videos, three tracks of 300 (arXiv 2501.13826).

    python evaluate/videommmu.py --model DIR --data_dir DIR [--no_image]

Layouts: videommmu_with_image.json, or videommmu.json with --no_image (toolkit: records 1 to 300 Adaptation, 301 to
600 Comprehension, 601 to 900 Perception), or the release's three parquet files (id, question, options, answer, image)
under Adaptation/, Comprehension/ and Perception/. Videos: <id>.mp4, also in the release's folders Art/ to Engineering/;
images: images/<id>.png, shown after the video as the question's image. Official: accuracy per track and their mean, and
per subject; 18 open answers of Adaptation are read as one number (officially: any number of the reply, to two places).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import ArgumentParser, Namespace

from data.records import Media, Sample
from evaluate._annotations import (
    AnnotationError,
    choice_row,
    field_of,
    find_annotations,
    load_benchmark,
    read_rows,
    release_rows,
    video_sample,
)
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, by_field, macro
from evaluate._wording import joined, letter_prompt, reasoned_prompt

TRACKS = ("adaptation", "comprehension", "perception")
DOMAINS = ("Art", "Science", "Humanities", "Engineering", "Medicine", "Business")  # folders of the release's videos
HINT = "The release's parquet files are in the dataset repository lmms-lab/VideoMMMU."
QUIZ = "Leave aside the quiz that the last frame of the video shows."
IMAGE = "Learn from the video and apply it to the question. The image after the video belongs to the question."


def release_row(row: dict) -> dict:
    """One row of a release's parquet, without its image."""
    path = f"{row['id']}.mp4"
    if row["options"]:
        return choice_row(row["question"], row["options"], row["answer"], path, by_letter=True)
    return {"problem": row["question"], "solution": str(row["answer"]), "problem_type": "numerical", "path": path}


def release_samples(args: Namespace) -> list[Sample]:
    samples = []
    for track in TRACKS:
        names = (f"{track.title()}/test-00000-of-00001.parquet",)
        file = find_annotations(Path(args.data_dir), names, None, HINT)
        for row in read_rows(file):
            made = release_rows(release_row, row, file, HINT)[0]
            made = {"track": track, "_line": row["_line"], "problem_type": "multiple choice", **made}
            sample = video_sample(made, file, source="Video-MMMU", sample_id=f"{track}/{row['id']}")
            if track == "adaptation" and row.get("image"):
                sample.media += (Media("image", data=row["image"]["bytes"]),)
            samples.append(sample)
    return samples


def load(args: Namespace) -> list[Sample]:
    if args.annotations is None and (Path(args.data_dir) / "Adaptation").is_dir():
        samples = release_samples(args)
    else:
        names = ("videommmu.json",) if args.no_image else ("videommmu_with_image.json",)
        samples = load_benchmark(args, names, hint=HINT, source="Video-MMMU")
        for sample in samples:
            place = str(field_of(sample, "problem_id"))
            if not (place.isdecimal() and 1 <= int(place) <= 900):
                raise AnnotationError(f"{sample.file}:{sample.line}: field 'problem_id' must be 1 to 900, got {place}")
            sample.extra["track"] = TRACKS[(int(place) - 1) // 300]
    for sample in samples:
        named = re.match(r"[^_]+_(.+)_\d+$", Path(sample.media[0].path).stem)
        sample.extra["subject"] = named[1] if named else "unknown"
        adaptation = sample.extra["track"] == "adaptation"
        if args.no_image:
            sample.media = tuple(item for item in sample.media if item.kind == "video")
        elif adaptation:
            sample.question = re.sub(r"<image \d+>", "[the image]", sample.question).strip()
        with_image = any(item.kind == "image" for item in sample.media)
        sample.extra["before"] = IMAGE if with_image else "" if adaptation else QUIZ
    return samples


def direct(sample: Sample) -> str:
    if sample.options:
        return letter_prompt(sample)
    return joined(sample.extra["before"], sample.question, "Answer with a number alone.")


def track(sample: Sample) -> tuple[str, ...]:
    return (sample.extra["track"],)


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = {"overall": macro(answers, draws, track)}
    return found | by_field(answers, draws, "track")


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--no_image", action="store_true", help="without the questions' images (videommmu.json)")


BENCHMARK = Benchmark(
    name="videommmu",
    title="Video-MMMU",
    load=load,
    media_roots=(
        "VideoMMMU",
        "Video-MMMU",
        *(root + name for root in ("VideoMMMU/", "Video-MMMU/", "") for name in DOMAINS),
    ),
    metrics=metrics,
    prompts={"official": direct, "official_cot": reasoned_prompt},
    primary="overall",
    groups=track,
    breakdown=("track", "subject"),
    official_n=900,
    flags=flags,
    variant=lambda args: "no_image" if args.no_image else "with_image",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
