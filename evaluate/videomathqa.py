"""VideoMathQA: mathematics in lecture and puzzle videos (arXiv 2506.05349).

    python evaluate/videomathqa.py --model DIR --data_dir DIR [--split mcq] [--subtitles]

Layouts: videomathqa.jsonl (toolkit: 420 five-option rows, and 1,680 two-option ones with mbinary_id, four per
question), or rows of the release (question_id, videoID, question, options, answer, category, length; its two parts are
told apart by the number of options). Videos: videos/<videoID>.mp4; subtitles: subtitles/<videoID>.srt. Official: the two
are separate scores, MCQ accuracy, and MBin, which counts a question only if all its pairs are right, each by category
and length, without and with subtitles. Their mixture (the easyvideor1 number) has a chance level of 44 % and means
little.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
from argparse import ArgumentParser, Namespace
from typing import Any

from data.records import Sample
from evaluate._annotations import field_of, load_benchmark, put_srt_before, subtitle_folder
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, chance, label_of, table
from evaluate._wording import CHOICE_PROMPTS

HINT = "The questions are in the dataset repository MBZUAI/VideoMathQA."
NAMES = ("videomathqa.jsonl", "videomathqa.json")


def official_row(row: dict) -> dict:
    fields = {"problem_id": row["question_id"], "video_id": row["videoID"], "category": row["category"]}
    fields |= {"length": row["length"], "problem": row["question"], "options": list(row["options"])}
    if len(row["options"]) == 2:
        fields["mbinary_id"] = row["_line"]
    return {**fields, "solution": row["answer"], "path": f"videos/{row['videoID']}.mp4"}


def sample_id(row: dict) -> str:
    pair = row.get("mbinary_id")
    return str(row.get("problem_id", "")) if pair is None else f"{row.get('problem_id')}/pair{pair}"


def load(args: Namespace) -> list[Sample]:
    samples = load_benchmark(args, NAMES, hint=HINT, source="VideoMathQA", official=official_row, sample_id=sample_id)
    for sample in samples:
        field_of(sample, "problem_id")
        sample.extra["split"] = "mbin" if "mbinary_id" in sample.extra else "mcq"
        # With both, the primary score is MCQ accuracy: comparisons pair what it is made of.
        mixed = args.split == "both" and args.protocol == "official"
        sample.extra["outside_primary"] = mixed and sample.extra["split"] == "mbin"
    if args.subtitles:
        folder = subtitle_folder(args.data_dir, ("VideoMathQA/subtitles", "subtitles"), " (.srt files)")
        put_srt_before(samples, folder, lambda sample: Path(sample.media[0].path).stem)
    return [sample for sample in samples if args.split in ("both", sample.extra["split"])]


def whole_questions(answers: list[Answer]) -> list[Answer]:
    """The answers with MBin's score: 1 at the last pair of a question whose pairs are all right, else 0; others None."""
    pairs: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer.sample.extra["split"] == "mbin":
            pairs.setdefault(answer.sample.extra["problem_id"], []).append(index)
    score_of = {members[-1]: float(all(answers[index].score == 1.0 for index in members)) for members in pairs.values()}
    return [Answer(answer.sample, answer.row, score_of.get(index)) for index, answer in enumerate(answers)]


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    values = [answer.score or 0.0 for answer in answers]
    mcq = [answer.sample.extra["split"] == "mcq" for answer in answers]
    whole = [answer.score for answer in whole_questions(answers)]
    found = {"MCQ": draws.mean(values, mcq)}
    found["MBin"] = draws.mean([score or 0.0 for score in whole], [score is not None for score in whole])
    found["MBin_pairs"] = draws.mean(values, [not is_mcq for is_mcq in mcq])
    return {name: estimate for name, estimate in found.items() if estimate.n}


def guessing(answers: list[Answer]) -> float:
    """Chance level of the primary score: 1/options for MCQ, else the product over a question's pairs (1/16 for four)."""
    mcq = [chance(answer.sample) for answer in answers if answer.sample.extra["split"] == "mcq"]
    if mcq:
        return sum(mcq) / len(mcq)
    pairs: dict[str, list[float]] = {}
    for answer in answers:
        pairs.setdefault(answer.sample.extra["problem_id"], []).append(chance(answer.sample))
    return sum(map(math.prod, pairs.values())) / len(pairs)


def tables(answers: list[Answer], draws: Resampler) -> dict[str, dict[str, dict[str, Any]]]:
    found = {}
    whole = whole_questions(answers)
    for name in ("category", "length"):
        read = label_of(name)
        for split, scored in (("mcq", answers), ("mbin", whole)):

            def label(answer: Answer, split: str = split, read=read) -> str | None:
                wanted = answer.sample.extra["split"] == split and answer.score is not None
                return read(answer) if wanted else None

            lines = table(scored, draws, label)
            for line in lines.values() if split == "mbin" else ():
                line["chance"] = None  # of whole questions, where the line's samples are pairs
            if lines:
                found[f"{name} ({split})"] = lines
    return found


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--split", choices=("both", "mcq", "mbin"), default="both", help="which of the two scores")
    parser.add_argument("--subtitles", action="store_true", help="put the whole subtitles before the question")


BENCHMARK = Benchmark(
    name="videomathqa",
    title="VideoMathQA",
    load=load,
    media_roots=("VideoMathQA",),
    prompts=CHOICE_PROMPTS,
    metrics=metrics,
    guessing=guessing,
    primary="MCQ",
    breakdown=("split",),
    tables=tables,
    flags=flags,
    official_n={"both": 2100, "mcq": 420, "mbin": 1680},
    variant=lambda args: args.split + (" subtitles" if args.subtitles else ""),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
