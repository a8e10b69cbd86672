"""LongVideoBench (validation): referred reasoning in videos of 8 seconds to an hour (arXiv 2407.15754).

    python evaluate/longvideobench.py --model DIR --data_dir DIR [--subtitles]

Layouts: longvideobench.json (toolkit), or the release's lvb_val.json (id, video_path, question, candidates,
correct_choice, duration_group, question_category, topic_category, subtitle_path). Videos: videos/; subtitles:
subtitles/<id>_en.json. Official: accuracy, by duration group and category. The release interleaves subtitles with
frames; here they stand before the question with their times, since the video goes to the model whole.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import choice_row, load_benchmark, subtitle_folder
from evaluate._run import main
from evaluate._scoring import Benchmark
from evaluate._wording import CHOICE_PROMPTS

NAMES = ("longvideobench.json", "lvb_val.json", "LongVideoBench/lvb_val.json")
HINT = "The release's lvb_val.json is in the dataset repository longvideobench/LongVideoBench."
FIELDS = ("duration", "duration_group", "question_category", "topic_category")
FIELDS += ("subtitle_path", "starting_timestamp_for_subtitles")


def official_row(row: dict) -> dict:
    fields = {"problem_id": row["id"], **{name: row[name] for name in FIELDS if name in row}}
    path = f"videos/{row['video_path']}"
    return choice_row(row["question"], row["candidates"], int(row["correct_choice"]), path, **fields)


def seconds(time: object) -> float:
    """12.5 or "00:00:12.5" -> 12.5."""
    total = 0.0
    for part in str(time).split(":"):
        total = total * 60 + float(part)
    return total


def subtitle_lines(file: Path, shift_s: float, duration_s: float = float("inf")) -> str:
    """The spoken lines within the clip, which starts `shift_s` into the subtitles and lasts `duration_s`."""
    lines = []
    for item in json.loads(file.read_text(encoding="utf-8")):
        start = item["timestamp"][0] if "timestamp" in item else item["start"]
        text = item.get("text", item.get("line", ""))
        if start is not None and 0 <= seconds(start) - shift_s < duration_s:
            lines.append(f"[{seconds(start) - shift_s:.1f} s] {text}")
    return "\n".join(lines)


def load(args: Namespace) -> list[Sample]:
    samples = load_benchmark(args, NAMES, hint=HINT, source="LongVideoBench", official=official_row)
    if args.subtitles:
        folder = subtitle_folder(args.data_dir, ("LongVideoBench/subtitles", "subtitles"), "")
        for sample in samples:
            name = sample.extra.get("subtitle_path") or f"{Path(sample.media[0].path).stem}_en.json"
            if (folder / name).is_file():
                shift_s = float(sample.extra.get("starting_timestamp_for_subtitles") or 0)
                length_s = float(sample.extra.get("duration") or "inf")
                lines = subtitle_lines(folder / name, shift_s, length_s)
                sample.extra["before"] = f"The video's subtitles:\n{lines}"
    return samples


def flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--subtitles", action="store_true", help="put the subtitles with their times before the question"
    )


BENCHMARK = Benchmark(
    name="longvideobench",
    title="LongVideoBench (validation)",
    load=load,
    media_roots=("LongVideoBench",),
    prompts=CHOICE_PROMPTS,
    breakdown=("duration_group", "question_category", "topic_category"),
    official_n=1337,
    flags=flags,
    variant=lambda args: "subtitles" if args.subtitles else "",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
