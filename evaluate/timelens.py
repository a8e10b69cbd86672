"""TimeLens-Bench: temporal grounding with re-checked labels, in the project's dataset format.

    python evaluate/timelens.py --model DIR --data FILE [--media_dir DIR]

Layout: rows with problem (the sentence or question), answer {"time": [start, end]}, videos [path], problem_type
"temporal grounding" and data_source (which of its parts), since the release's own layout could not be checked. R@1 at
tIoU >= 0.3, 0.5, 0.7 and mIoU, over all and per source.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import ArgumentParser

from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, recalls
from evaluate.custom import load


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
    parser.add_argument("--data", nargs="+", required=True, help="dataset files")


BENCHMARK = Benchmark(
    name="timelens",
    title="TimeLens-Bench",
    load=load,
    metrics=metrics,
    primary="mIoU",
    default_prompt="direct",
    flags=flags,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
