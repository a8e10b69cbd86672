"""TimeLens-Bench: temporal grounding with re-checked labels in three parts (Charades, ActivityNet, QVHighlights).

    python evaluate/timelens.py --model DIR --data_dir DIR [--data FILE …]

Layouts: the release's charades-timelens.json, activitynet-timelens.json and qvhighlights-timelens.json (video id ->
duration, spans, queries), those that are there; or, with --data, rows of the dataset format: problem (the sentence or
question), answer {"time": [start, end]}, videos [path], problem_type "temporal grounding" and data_source (which of its
parts). Videos: videos/<part>/<id>.mp4. R@1 at tIoU >= 0.3, 0.5, 0.7 and mIoU, over all and per part.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import re
from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate import charades_sta, custom
from evaluate._annotations import AnnotationError, keyed_entries, release_rows, video_sample
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, recalls

PARTS = {
    "charades": "Charades-TimeLens",
    "activitynet": "ActivityNet-TimeLens",
    "qvhighlights": "QVHighlights-TimeLens",
}
HINT = (
    "The release is the dataset repository TencentARC/TimeLens-Bench; or give a file in the dataset format with --data."
)


def official_rows(row: dict) -> list[dict]:
    """One video of the release: every query with its span, in seconds."""
    spans, queries = row["spans"], row["queries"]
    if len(spans) != len(queries):
        raise ValueError(f"{len(spans)} spans for {len(queries)} queries")
    made = []
    for place, ((start, end), query) in enumerate(zip(spans, queries)):
        text = re.sub(r"\s+", " ", query).strip().strip(".").strip()
        gold = json.dumps({"time": [float(start), float(end)]})
        made.append({"problem": text, "solution": gold, "problem_type": "temporal grounding", "place": place})
    return made


def load(args: Namespace) -> list[Sample]:
    if args.data:
        return custom.load(args)
    folders = [Path(args.data_dir) / "TimeLens-Bench", Path(args.data_dir)]
    samples = []
    for part, source in PARTS.items():
        files = [folder / f"{part}-timelens.json" for folder in folders]
        file = next((file for file in files if file.is_file()), None)
        for video, row in keyed_entries(file, HINT) if file else ():
            for item in release_rows(official_rows, row, f"{file}:{video}", HINT):
                item = {**item, "path": f"videos/{part}/{video}.mp4"}
                name = f"{part}/{video}/{item.pop('place')}"
                samples.append(video_sample(item, file, source=source, sample_id=name))
    if not samples:
        raise AnnotationError(f"no {' or '.join(f'{part}-timelens.json' for part in PARTS)} in {args.data_dir}. {HINT}")
    return samples


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found = recalls(answers, draws)
    values = [answer.score or 0.0 for answer in answers]
    for source in sorted({answer.sample.source for answer in answers}):
        mine = [answer.sample.source == source for answer in answers]
        found[f"mIoU/{source}"] = draws.mean(values, mine)
        for bound in (0.3, 0.5, 0.7):
            found[f"R@{bound}/{source}"] = draws.mean([float(value >= bound) for value in values], mine)
    return found


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", help="dataset files instead of the release's")


BENCHMARK = Benchmark(
    name="timelens",
    title="TimeLens-Bench",
    load=load,
    media_roots=("TimeLens-Bench",),
    prompts={"official": charades_sta.direct},
    metrics=metrics,
    primary="mIoU",
    flags=flags,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
