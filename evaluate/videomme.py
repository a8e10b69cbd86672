"""Video-MME: 2,700 four-option questions on 900 short, medium and long videos (arXiv 2405.21075).

    python evaluate/videomme.py --model DIR --data_dir DIR [--subtitles]

Layouts: videomme.json (toolkit), or the release's parquet (video_id, duration, domain, sub_category, videoID,
question_id, task_type, question, options, answer). Videos: videos/<videoID>.mp4; subtitles: subtitle/<videoID>.srt.
Official: one letter; overall and by duration, without and with subtitles.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import field_of, load_benchmark, put_srt_before, subtitle_folder
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy
from evaluate._wording import CHOICE_PROMPTS

NAMES = ("videomme.json", "videomme/test-00000-of-00001.parquet", "test-00000-of-00001.parquet")


def official_row(row: dict) -> dict:
    keep = ("video_id", "duration", "domain", "sub_category", "task_type", "videoID", "question_id")
    fields = {name: row[name] for name in keep}
    return {
        **fields,
        "problem_id": row["question_id"],
        "problem": row["question"],
        "options": list(row["options"]),
        "solution": row["answer"],
        "path": f"videos/{row['videoID']}.mp4",
    }


def load(args: Namespace) -> list[Sample]:
    hint = "Video-MME's test parquet is in the dataset repository lmms-lab/Video-MME."
    samples = load_benchmark(
        args,
        NAMES,
        hint=hint,
        source="Video-MME",
        official=official_row,
        sample_id=lambda row: row.get("question_id", ""),
    )
    if args.subtitles:  # about a sixth of the videos have no speech and no file
        names = ("Video-MME/subtitle", "subtitle", "subtitles")
        folder = subtitle_folder(args.data_dir, names, " (the release's .srt files)")
        put_srt_before(samples, folder, lambda sample: field_of(sample, "videoID"))
    return samples


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = accuracy(answers, draws)
    values = [answer.score or 0.0 for answer in answers]
    for duration in ("short", "medium", "long"):
        found[duration] = draws.mean(values, [answer.sample.extra.get("duration") == duration for answer in answers])
    return found


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--subtitles", action="store_true", help="put the whole subtitles before the question")


BENCHMARK = Benchmark(
    name="videomme",
    title="Video-MME",
    load=load,
    media_roots=("Video-MME", "videomme"),
    prompts=CHOICE_PROMPTS,
    metrics=metrics,
    breakdown=("duration", "domain", "task_type", "sub_category"),
    official_n=2700,
    flags=flags,
    variant=lambda args: "subtitles" if args.subtitles else "",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
