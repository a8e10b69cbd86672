"""Video-Holmes: reasoning over suspense short films, seven question types, six options (arXiv 2505.21374).

    python evaluate/videoholmes.py --model DIR --data_dir DIR

Layouts: holmes.json (toolkit; no question types), or the release's test_Video-Holmes.json ("video ID", "Question ID",
"Question Type", "Question", "Options", "Answer"). Videos: videos_cropped/<video ID>.mp4 or videos/.
Official: accuracy, and per type (SR IMC TCI TA MHR PAR CTI); direct and reasoning prompts.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ast
from argparse import Namespace

from data.records import Media, Sample
from evaluate._annotations import choice_row, load_benchmark
from evaluate._run import main
from evaluate._scoring import Benchmark
from evaluate._wording import CHOICE_PROMPTS

NAMES = ("holmes.json", "videoholmes.json", "test_Video-Holmes.json", "Video-Holmes/test_Video-Holmes.json")
HINT = "The release's test_Video-Holmes.json is in the dataset repository TencentARC/Video-Holmes."


def official_row(row: dict) -> dict:
    options = ast.literal_eval(row["Options"]) if isinstance(row["Options"], str) else row["Options"]
    texts = [options[name] for name in sorted(options)]
    fields = {"problem_id": row["Question ID"], "question_type": row["Question Type"]}
    path = f"videos_cropped/{row['video ID']}.mp4"
    return choice_row(row["Question"], texts, row["Answer"], path, by_letter=True, **fields)


def load(args: Namespace) -> list[Sample]:
    return load_benchmark(args, NAMES, hint=HINT, source="Video-Holmes", official=official_row)


def uncropped(sample: Sample) -> list[Media]:
    return [Media("video", path=sample.media[0].path.replace("videos_cropped/", "videos/"))]


BENCHMARK = Benchmark(
    name="videoholmes",
    title="Video-Holmes",
    load=load,
    media_roots=("Video-Holmes", "Video-Holmes/Benchmark", "Benchmark"),
    prompts=CHOICE_PROMPTS,
    clips=uncropped,
    breakdown=("question_type",),
    official_n=1837,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
