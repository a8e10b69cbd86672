"""VideoReasonBench: latent states through long operation sequences, six demonstrations (arXiv 2505.23359).

    python evaluate/videoreasonbench.py --model DIR --data_dir DIR --judge_url URL --judge_model NAME

Layout: videoreasonbench.json (toolkit). Videos: <demonstration>/<state>_op<n>_<start|end>.mp4. The question text
itself asks for a summary after "Final Answer:", so it is sent as it is. Official: a judge sees question, answer and
reference. 244 records carry no reference ("None"; officially a simulator decides 240 of them) and are excluded by
name.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import Namespace

from data.records import Sample
from evaluate._annotations import load_benchmark
from evaluate._run import main
from evaluate._scoring import Benchmark

HINT = "The toolkit's file is videoreasonbench.json."


def load(args: Namespace) -> list[Sample]:
    samples = load_benchmark(args, ("videoreasonbench.json",), hint=HINT, source="VideoReasonBench")
    for sample in samples:
        found = re.match(r"(\w+)/state(\w+)_op(\d+)_(\w+)\.", sample.media[0].path)
        demonstration, state, operations, given = found.groups()
        sample.extra |= {"demonstration": demonstration, "state_size": state, "state_given_at": given}
        sample.extra["operations"] = "5-9" if int(operations) < 10 else "10-14"
    return samples


BENCHMARK = Benchmark(
    name="videoreasonbench",
    title="VideoReasonBench",
    load=load,
    media_roots=("VideoReasonBench/videos", "videos"),
    prompts={"official": lambda sample: sample.question},
    judged=lambda sample: True,
    judge_prompt="videoreasonbench",
    breakdown=("demonstration", "operations", "state_size", "state_given_at"),
    official_n=1440,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
