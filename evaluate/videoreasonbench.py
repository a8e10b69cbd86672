"""VideoReasonBench: latent states through long operation sequences, six demonstrations (arXiv 2505.23359).

    python evaluate/videoreasonbench.py --model DIR --data_dir DIR --judge_url URL --judge_model NAME

Layouts: videoreasonbench.json (toolkit), or the release's questions/<demonstration>.json (id -> video, question, answer,
dim, num_state, num_operation, visible_time). Videos: <demonstration>/state<n>_op<n>_<start|end>.mp4. The question text
itself asks for a summary after "Final Answer:", so it is sent as it is. Official: a judge sees question, reference and
what stands after "Final Answer" (nothing there is wrong); by skill (release layout), operations and state size. 244
records carry no reference (officially a simulator decides 240 of them) and are excluded by name.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from argparse import Namespace

from data.records import Sample
from evaluate._annotations import AnnotationError, keyed_entries, load_benchmark, release_rows, video_sample
from evaluate._run import main
from evaluate._scoring import Benchmark, plain_score

HINT = "The toolkit's file is videoreasonbench.json; the release has questions/card.json and five others."
DEMONSTRATIONS = ("card", "chip", "cup", "file_sys", "grid", "hrd")
STATE_SIZE = {"1": "1", "2": "2", "3": "1", "4": "2"}  # boards of 3 x 3 and 4 x 4 count as one and two piles do
SUMMARY = re.compile(r"Final Answer[\s:：*]*")
SKILL = {"order_state": "infer_state", "counting_state": "infer_state"}


def official_row(row: dict) -> dict:
    fields = {"dimension": SKILL.get(row["dim"], row["dim"]), "problem": row["question"], "problem_type": "open-ended"}
    return {**fields, "solution": row["answer"] or "None", "path": row["video"].removeprefix("videos/")}


def release_samples(folder: Path) -> list[Sample]:
    samples = []
    for name in DEMONSTRATIONS:
        file = folder / f"{name}.json"
        for key, row in keyed_entries(file, HINT):
            made = release_rows(official_row, row, f"{file}:{key}", HINT)[0]
            samples.append(video_sample(made, file, source="VideoReasonBench", sample_id=f"{name}/{key}"))
    return samples


def load(args: Namespace) -> list[Sample]:
    folders = [Path(args.data_dir) / name for name in ("VideoReasonBench/questions", "questions")]
    folder = next((folder for folder in folders if (folder / "card.json").is_file()), None)
    if folder is not None and args.annotations is None:
        samples = release_samples(folder)
    else:
        samples = load_benchmark(args, ("videoreasonbench.json",), hint=HINT, source="VideoReasonBench")
    for sample in samples:
        found = re.search(r"(\w+)/state(\w+?)_op(\d+)_(\w+)\.", sample.media[0].path)
        if found is None:
            raise AnnotationError(
                f"{sample.file}:{sample.line}: field 'path' must be <demonstration>/state<n>_op<n>_<start|end>.mp4, "
                f"got {sample.media[0].path!r}"
            )
        demonstration, state, operations, given = found.groups()
        sample.extra |= {"demonstration": demonstration, "state_given_at": given}
        sample.extra |= {"state_size": STATE_SIZE.get(state, state)}
        sample.extra["operations"] = "5-9" if int(operations) < 10 else "10-14"
    return samples


def score(sample: Sample, response: str, extra: dict) -> dict:
    """rewards' reading, cut to what follows "Final Answer"; None without it (answer tags stand for it)."""
    scored = plain_score(sample, response, extra)
    said = scored["extracted"]
    if said is not None and (found := SUMMARY.search(said)):
        said = said[found.end() :].strip() or None
    elif not SUMMARY.search(response) and "<answer>" not in response:
        said = None
    return {**scored, "extracted": said}


BENCHMARK = Benchmark(
    name="videoreasonbench",
    title="VideoReasonBench",
    load=load,
    media_roots=("VideoReasonBench/videos", "videos"),
    prompts={"official": lambda sample: sample.question},
    score=score,
    judged=lambda sample: True,
    judge_prompt="videoreasonbench",
    breakdown=("dimension", "demonstration", "operations", "state_size", "state_given_at"),
    official_n=1440,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
