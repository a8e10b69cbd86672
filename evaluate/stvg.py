"""STVG of the ST-Align benchmark: when and where is what a sentence names (LLaVA-ST, arXiv 2501.08282).

    python evaluate/stvg.py --model DIR --data_dir DIR [--coord norm1000]

Layout: stvg.json (toolkit: {time: [s, e], boxes: {second: box in source pixels}}). Videos: <id>.mp4. The prompt names
the system that boxes are asked for in (--coord; the family's own if left out), and they are compared as shares of the
frame, with the source's size read from the file. Official: m_tIoU, tIoU@k, m_sIoU (over common seconds), m_vIoU (over
the union), vIoU@k, with >= as in LLaVA-ST.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from argparse import ArgumentParser, Namespace

from data.records import Sample
from evaluate._annotations import load_benchmark
from evaluate._bootstrap import Resampler
from evaluate._run import main
from evaluate._scoring import Answer, Benchmark, Metrics, accuracy, plain_score
from evaluate._sources import boxes_as_share, source_size
from rewards.geometry import box_iou, scale_of, scaled
from rewards.metrics import tube_parts

HINT = "The toolkit's file is stvg.json; the release is the ST-Align benchmark of LLaVA-ST."


def load(args: Namespace) -> list[Sample]:
    samples = load_benchmark(args, ("stvg.json",), hint=HINT, source="ST-Align")
    for sample in samples:
        sample.extra |= {
            "boxed": "boxes" if json.loads(sample.answer).get("boxes") else "time only",
            "gt_coord": "pixel",
        }
        if args.coord:
            sample.extra["coord"] = args.coord
    return samples


def score(sample: Sample, response: str, extra: dict) -> dict:
    """rewards' score, and the official parts: tIoU, sIoU over common seconds, vIoU over the union of seconds."""
    sample, extra = boxes_as_share(sample, extra)
    scored = plain_score(sample, response, extra)
    gold, guess = json.loads(sample.answer), json.loads(scored["extracted"] or "{}")
    parts = tube_parts(response, sample.answer, extra)
    scored["parts"] = {"tIoU": parts["tiou"]}
    if gold.get("boxes"):
        ours, theirs = scale_of(extra)
        boxes = {float(key): scaled(box, theirs) for key, box in gold["boxes"].items()}
        guessed = {float(key): scaled(box, ours) for key, box in (guess.get("boxes") or {}).items()}
        overlaps = [box_iou(boxes[second], guessed[second]) for second in boxes.keys() & guessed.keys()]
        scored["parts"] |= {"sIoU": sum(overlaps) / len(overlaps) if overlaps else 0.0, "vIoU": parts["viou"]}
    return scored


def metrics(answers: list[Answer], draws: Resampler) -> Metrics:
    found: Metrics = {}
    for name in ("tIoU", "sIoU", "vIoU"):
        keep = [name == "tIoU" or a.sample.extra["boxed"] == "boxes" for a in answers]
        found[f"m_{name}"] = draws.mean([a.parts.get(name, 0.0) for a in answers], keep)
        for bound in (0.3, 0.5, 0.7) if name != "sIoU" else ():
            found[f"{name}@{bound}"] = draws.mean([float(a.parts.get(name, 0.0) >= bound) for a in answers], keep)
    return found | accuracy(answers, draws, "half_tIoU_half_box")


def flags(parser: ArgumentParser) -> None:
    parser.add_argument("--coord", choices=("norm1000", "norm1", "pixel"), help="system that boxes are asked for in")


BENCHMARK = Benchmark(
    name="stvg",
    title="STVG (ST-Align)",
    load=load,
    media_roots=("ST-Align-Benchmark", "stvg"),
    score=score,
    metrics=metrics,
    primary="m_vIoU",
    breakdown=("boxed",),
    official_n=2000,
    flags=flags,
    variant=lambda args: args.coord or "",
    watch=source_size,
    defaults={"max_response_tokens": 4096},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
