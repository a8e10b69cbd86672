"""Charades-STA: when in a half-minute video does a sentence happen (arXiv 1705.02101).

    python evaluate/charades_sta.py --model DIR --data_dir DIR

Layouts: charades_sta.json (toolkit; the gold stands in think tags), or the release's charades_sta_test.txt ("3MSZA 24.3
30.4##person turn a light on."). Videos: Charades_v1_480/<id>.mp4. Official: R@1 at tIoU >= 0.3, 0.5, 0.7, and mIoU.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import re
from argparse import Namespace

from data.records import Sample
from evaluate._annotations import AnnotationError, find_annotations, load_benchmark, toolkit_sample
from evaluate._run import main
from evaluate._scoring import Benchmark, recalls
from evaluate._wording import joined

HINT = "The release's charades_sta_test.txt comes with the paper's code (jiyanggao/TALL)."


def load(args: Namespace) -> list[Sample]:
    names = ("charades_sta.json", "charades_sta_test.txt", "Charades_sta/charades_sta_test.txt")
    file = find_annotations(args.data_dir, names, args.annotations, HINT)
    if file.suffix != ".txt":
        return load_benchmark(args, names, hint=HINT, source="Charades-STA")
    samples = []
    for line, text in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        found = re.fullmatch(r"(\w+)\s+([\d.]+)\s+([\d.]+)\s*##(.*)", text.strip())
        if not found:
            raise AnnotationError(f"{file}:{line}: not of the form `VIDEO START END##SENTENCE`: {text[:80]!r}")
        gold = json.dumps({"time": [float(found[2]), float(found[3])]})
        row = {"problem": found[4], "solution": gold, "path": f"{found[1]}.mp4", "_line": line, "problem_id": line}
        samples.append(toolkit_sample({**row, "problem_type": "temporal grounding"}, file, source="Charades-STA"))
    return samples


def direct(sample: Sample) -> str:
    return joined(
        f"Find when this happens in the video: {sample.question}",
        'Give its start and end in seconds, in the form "The event happens in the 2.5 - 7.1 seconds".',
    )


BENCHMARK = Benchmark(
    name="charades_sta",
    title="Charades-STA (test)",
    load=load,
    metrics=recalls,
    primary="mIoU",
    official_n=3720,
    media_roots=("Charades_sta/Charades_v1_480", "Charades_v1_480", "Charades-STA"),
    prompts={"official": direct},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
