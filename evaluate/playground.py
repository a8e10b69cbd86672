"""The playground's held-out questions, with their blind twins (the same questions about grey clips).

    python evaluate/playground.py --model playground/seed0/model --data_dir playground/seed0

Reads heldout.jsonl and, if it is there, heldout_blind.jsonl (scripts/make_playground.py writes both). A policy that
has learned to see answers the first better than the second. The table gives, per problem type, the share of readable
answers, accuracy with its 95 % interval, accuracy among the readable ones and the score of the best constant answer.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import ArgumentParser, Namespace
from collections import Counter

from data.dataset import BadDataset, load
from data.records import Sample
from evaluate._annotations import AnnotationError
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, table, video_of
from rewards import check_gold, score


def load_playground(args: Namespace) -> list[Sample]:
    folder, samples = Path(args.data_dir), []
    seeing = Path(args.annotations) if args.annotations else folder / "heldout.jsonl"
    files = {"seeing": seeing, "blind": folder / "heldout_blind.jsonl"}
    if args.no_blind or not files["blind"].is_file():
        del files["blind"]
    if not seeing.is_file():
        raise AnnotationError(f"{seeing} is missing; scripts/make_playground.py writes it")
    for split, file in files.items():
        try:
            rows = load([str(file)], check_gold=check_gold)
        except BadDataset as error:
            raise AnnotationError(str(error)) from error
        for sample in rows:
            sample.extra |= {"split": split, "question_id": sample.id, "template": sample.source.split("/")[-1]}
            sample.extra["outside_primary"] = split == "blind"
            sample.id += "" if split == "seeing" else "/blind"
        samples += rows
    clip_of = {sample.id: video_of(sample) for sample in samples}
    for sample in samples:  # a grey file is shared by many clips: draws go by the clip it stands for
        sample.extra["cluster"] = clip_of.get(sample.extra["question_id"], video_of(sample))
    return samples


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    values = [answer.score or 0.0 for answer in answers]
    seeing = [answer.sample.extra["split"] == "seeing" for answer in answers]
    video = [answer.sample.data_type == "video" for answer in answers]
    found = {"accuracy": draws.mean(values, seeing)}
    if all(seeing):
        return found
    blind = [not is_seeing for is_seeing in seeing]
    found["accuracy_blind"] = draws.mean(values, blind)
    found["video_accuracy"] = draws.mean(values, [a and b for a, b in zip(seeing, video)])
    found["video_accuracy_blind"] = draws.mean(values, [a and b for a, b in zip(blind, video)])
    twin = {a.sample.extra["question_id"]: a.score or 0.0 for a in answers if a.sample.extra["split"] == "blind"}
    gain = [value - twin.get(answer.sample.extra["question_id"], 0.0) for value, answer in zip(values, answers)]
    found["video_seeing_minus_blind"] = draws.mean(gain, [a and b for a, b in zip(seeing, video)])
    return found


def best_constant(samples: list[Sample]) -> float:
    """Mean score of the most frequent gold given as the answer to every question."""
    gold = Counter(str(sample.answer) for sample in samples).most_common(1)[0][0]
    answer = f"<answer>{gold}</answer>"
    scores = [score(s.problem_type, answer, s.answer, {**s.extra, "options": list(s.options)}) for s in samples]
    return sum(got.accuracy for got in scores) / len(scores)


def tables(answers: list[Answer], draws: Resampler) -> dict:
    found = {}
    for split in ("seeing", "blind"):
        for field in ("problem_type", "template") if split == "seeing" else ("problem_type",):

            def label(answer: Answer, field=field, split=split) -> str | None:
                if answer.sample.extra["split"] != split:
                    return None
                return answer.sample.problem_type if field == "problem_type" else answer.sample.extra["template"]

            lines = table(answers, draws, label)
            for name, line in lines.items():
                line["majority"] = round(best_constant([a.sample for a in answers if label(a) == name]), 4)
            if lines:
                found[field if split == "seeing" else f"{field} (blind)"] = lines
    return found


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--no_blind", action="store_true", help="leave the blind twins out")


BENCHMARK = Benchmark(
    name="playground",
    title="Playground: held-out questions about moving, appearing and changing shapes",
    load=load_playground,
    default_prompt="direct",
    metrics=metrics,
    tables=tables,
    flags=flags,
    variant=lambda args: "no_blind" if args.no_blind else "",
    defaults={  # frames as in training and preprocessing, so that they share one cache
        "max_frames": 128,
        "total_pixels": None,
        "max_response_tokens": 128,
        "max_model_len": 1024,
        "dtype": "float32",
    },
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
