"""Video-MME-v2: 3,200 eight-option questions in 800 groups of four, scored non-linearly per group.

    python evaluate/videomme_v2.py --model DIR --data_dir DIR [--subtitles]

Layout: the release's parquet (video_id, question_id "001-1", question, options as one text of lines A to H, answer,
level, group_type relevance | logic, group_structure, second_head, third_head); rows of the toolkit shape with the
same fields are read too. Videos: videos/<video_id>.mp4; subtitles: subtitle/<video_id>.jsonl (one word per line).
Official: the group score below, in total, by group type, by level of the group's last question and by head.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import itertools
import math
from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import AnnotationError, field_of, load_benchmark, read_rows
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy, chance
from evaluate._wording import CHOICE_PROMPTS

NAMES = ("videomme_v2.json", "videomme_v2.jsonl", "test.parquet", "test-00000-of-00001.parquet")
HINT = "The release's parquet has question, options (lines A to H), answer, level, group_type and group_structure."
FIELDS = ("video_id", "question_id", "level", "group_type", "group_structure", "second_head", "third_head")
STRUCTURES = ("[1,2,3,4]", "[1,[2,3],4]", "[[1,2],3,4]")


def official_row(row: dict) -> dict:
    options = row["options"] if isinstance(row["options"], list) else row["options"].strip().split("\n")
    fields = {name: row[name] for name in FIELDS}
    fields |= {"problem_id": row["question_id"], "problem": row["question"], "options": options}
    return {**fields, "solution": row["answer"], "path": f"videos/{row['video_id']}.mp4"}


def load(args: Namespace) -> list[Sample]:
    samples = load_benchmark(
        args,
        NAMES,
        hint=HINT,
        source="Video-MME-v2",
        official=official_row,
        sample_id=lambda row: row.get("question_id", ""),
    )
    for sample in samples:
        field_of(sample, "video_id"), field_of(sample, "question_id")
        kind, shape = field_of(sample, "group_type"), str(sample.extra.get("group_structure")).replace(" ", "")
        if kind not in ("relevance", "logic") or (kind == "logic" and shape not in STRUCTURES):
            raise AnnotationError(
                f"{sample.file}:{sample.line}: group_type {kind!r} with group_structure {shape!r} cannot be scored; "
                f"known: relevance, and logic with {', '.join(STRUCTURES)}"
            )
    if args.subtitles:
        folder = Path(args.data_dir) / "subtitle"
        if not folder.is_dir():
            raise AnnotationError(f"--subtitles: {folder} is missing (the release's word-level JSON lines)")
        for sample in samples:
            file = folder / f"{sample.extra['video_id']}.jsonl"
            if file.is_file():
                words = [str(row.get("text", row.get("word", ""))).strip() for row in read_rows(file)]
                text = " ".join(words)
                sample.extra["before"] = f"The video's subtitles:\n{text}"
    return samples


def group_score(right: list[bool], group_type: str, structure: str = "") -> float:
    """Score in [0, 1] of four answers of one group, in order.

    relevance: 0, 1, 4, 9, 16 sixteenths by how many are right. logic, [1,2,3,4]: the same by how many are right
    before the first mistake; [1,[2,3],4]: 0, 1, 4, 7, 12 twelfths, where either of 2 and 3 is the second step;
    [[1,2],3,4]: 0, 1, 2, 5, 10 tenths, where either of 1 and 2 is the first step.
    """
    if group_type == "relevance":
        return sum(right) ** 2 / 16
    first, second, third, fourth = right
    shape = str(structure).replace(" ", "")
    if shape == "[1,[2,3],4]":
        steps = [first, second or third, second and third, fourth]
        points, whole = (0, 1, 4, 7, 12), 12
    elif shape == "[[1,2],3,4]":
        steps = [first or second, first and second, third, fourth]
        points, whole = (0, 1, 2, 5, 10), 10
    else:
        steps, points, whole = list(right), (0, 1, 4, 9, 16), 16
    reached = steps.index(False) if False in steps else 4
    return points[reached] / whole


def whole_groups(answers: list[Answer]) -> list[list[int]]:
    """Places of the four answers of each video, in the order of their question ids; a --limit may cut a group, which has
    no score then."""
    groups: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        groups.setdefault(str(answer.sample.extra["video_id"]), []).append(index)
    for members in groups.values():
        members.sort(key=lambda index: str(answers[index].sample.extra["question_id"]))
    return [members for members in groups.values() if len(members) == 4]


def guessing(answers: list[Answer]) -> float:
    """Mean group score of random letters: every outcome of four guesses, weighted by its probability."""
    total, groups = 0.0, whole_groups(answers)
    for members in groups:
        extra = answers[members[-1]].sample.extra
        odds = [chance(answers[index].sample) for index in members]
        for right in itertools.product([True, False], repeat=4):
            weight = math.prod(p if hit else 1 - p for p, hit in zip(odds, right))
            total += weight * group_score(list(right), extra["group_type"], extra["group_structure"])
    return total / len(groups) if groups else 0.0


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    values, last = [0.0] * len(answers), [False] * len(answers)
    for members in whole_groups(answers):
        extra = answers[members[-1]].sample.extra
        right = [answers[index].score == 1.0 for index in members]
        values[members[-1]] = group_score(right, extra["group_type"], extra["group_structure"])
        last[members[-1]] = True
    found = {"group_score": draws.mean(values, last)}
    for field in ("group_type", "level", "second_head", "third_head"):
        names = sorted(
            {str(a.sample.extra[field]) for a, is_last in zip(answers, last) if is_last and a.sample.extra.get(field)}
        )
        for name in names:
            keep = [is_last and str(a.sample.extra.get(field)) == name for a, is_last in zip(answers, last)]
            found[f"group_score/{field}/{name}"] = draws.mean(values, keep)
    return found | accuracy(answers, draws)


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--subtitles", action="store_true", help="put the spoken words before the question")


BENCHMARK = Benchmark(
    name="videomme_v2",
    title="Video-MME-v2",
    load=load,
    media_roots=("Video-MME-v2", "videomme_v2"),
    prompts=CHOICE_PROMPTS,
    metrics=metrics,
    guessing=guessing,
    primary="group_score",
    breakdown=("level", "group_type", "second_head", "third_head"),
    official_n=3200,
    flags=flags,
    variant=lambda args: "subtitles" if args.subtitles else "",
    defaults={"max_frames": 64, "fps": 1.0},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
