"""Held-out accuracy of runs of several algorithms, before and after: a table (Markdown) and a plot (SVG).

    python scripts/algorithm_table.py table runs/algorithms --main grpo dapo gspo
    python scripts/algorithm_table.py demonstrations train.jsonl train_demonstrations.jsonl

`table` reads runs/algorithms/before (an evaluation of the starting policy) and <algorithm>-seed<k>/after (one of the
trained policy), pairs them question by question, and writes table.md, table.json and accuracy.svg beside them.
`demonstrations` copies a dataset and adds to every row its answer as a demonstration (offline_output).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluate._bootstrap import paired
from scripts.playground_questions import answer_text

Scores = dict[str, tuple[float, str]]  # question id -> (score, video)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito: told apart by colour-blind readers
WARM_UP_STEPS = 2  # the first steps also compile and fill caches: not in the seconds per step


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_scores(folder: Path) -> Scores:
    """Scores of an evaluation's run folder; an answer that could not be scored counts 0."""
    rows = read_lines(folder / "predictions.jsonl")
    return {row["id"]: (row["score"] or 0.0, row.get("video") or row["id"]) for row in rows}


def find_runs(runs: Path) -> dict[str, dict[int, Path]]:
    """algorithm -> seed -> folder of every run that was trained and evaluated. Raises SystemExit when there is none."""
    found: dict[str, dict[int, Path]] = {}
    for done in sorted(runs.glob("*-seed*/after/results.json")):
        match = re.fullmatch(r"(.+)-seed(\d+)", done.parent.parent.name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = done.parent.parent
    if not found:
        raise SystemExit(
            f"{runs}: no <algorithm>-seed<k>/after/results.json; scripts/compare_algorithms.sh writes them"
        )
    if not (runs / "before" / "predictions.jsonl").is_file():
        raise SystemExit(f"{runs}/before holds no evaluation of the starting policy")
    return found


def summary(before: Scores, seeds: dict[int, Path]) -> dict[str, Any]:
    """Accuracy before and after (mean over seeds), the gain with its 95 % interval, seconds per step.

    The interval is over questions, paired (a question's mean over seeds minus its score before) and clustered by video.
    Raises SystemExit when a run answered other questions than the starting policy did.
    """
    after = [read_scores(folder / "after") for folder in seeds.values()]
    for folder, scores in zip(seeds.values(), after, strict=True):
        if set(scores) != set(before):
            raise SystemExit(f"{folder}/after and before hold different questions; delete both and evaluate again")
    names = sorted(before)
    old = [before[name][0] for name in names]
    new = [statistics.mean(scores[name][0] for scores in after) for name in names]
    found = paired(old, new, [before[name][1] for name in names])
    ends = [statistics.mean(score for score, _ in scores.values()) for scores in after]
    rows = [row for folder in seeds.values() for row in read_lines(folder / "metrics.jsonl")]
    times = [row["time/step_s"] for row in rows if row["step"] > min(WARM_UP_STEPS, max(r["step"] for r in rows) - 1)]
    return {
        "seeds": len(seeds),
        "steps": max(row["step"] for row in rows),
        "before": statistics.mean(old),
        "after": statistics.mean(new),
        "spread": statistics.stdev(ends) if len(ends) > 1 else None,
        "gain": found.difference,
        "low": found.low,
        "high": found.high,
        "significant": found.low > 0,
        "step_s": statistics.median(times),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, largest gain first."""
    lines = [
        "| algorithm | seeds | steps | before | after | gain | 95 % interval of the gain | significant | s / step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(found.items(), key=lambda item: -item[1]["gain"]):
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        lines.append(
            f"| {name} | {row['seeds']} | {row['steps']} | {row['before']:.3f} | {row['after']:.3f}{spread} | "
            f"{row['gain']:+.3f} | {row['low']:+.3f} to {row['high']:+.3f} | {'yes' if row['significant'] else 'no'} | "
            f"{row['step_s']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def curve_of(folder: Path, start: float) -> dict[int, float]:
    """step -> held-out accuracy of a run: the starting policy's, the run's validations, the trained policy's."""
    file = folder / "validation.jsonl"
    rows = read_lines(file) if file.is_file() else []
    between = {row["step"]: row["validate/accuracy"] for row in rows if row.get("validate/accuracy") is not None}
    last = max(row["step"] for row in read_lines(folder / "metrics.jsonl"))
    return {0: start} | between | {last: statistics.mean(score for score, _ in read_scores(folder / "after").values())}


def plot(curves: dict[str, dict[int, dict[int, float]]], main: list[str]) -> str:
    """SVG: mean over seeds with the band between the worst and the best seed for `main`, thin grey lines for others."""
    width, height, left, top, right, bottom = 900, 460, 60, 30, 190, 50
    x_high = max(step for seeds in curves.values() for curve in seeds.values() for step in curve)
    values = [value for seeds in curves.values() for curve in seeds.values() for value in curve.values()]
    y_low, y_high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values)) / 10
    y_high = max(y_high, y_low + 0.1)

    def x_of(step: float) -> float:
        return left + step / max(1, x_high) * (width - left - right)

    def y_of(accuracy: float) -> float:
        return top + (y_high - accuracy) / (y_high - y_low) * (height - top - bottom)

    def path(points: list[tuple[float, float]]) -> str:
        return " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for part in range(round(10 * (y_high - y_low)) + 1):
        y = y_of(y_low + part / 10)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{y_low + part / 10:.1f}</text>')
    for part in range(5):
        step = x_high * part / 4
        parts.append(f'<text x="{x_of(step):.1f}" y="{height - bottom + 20}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{left}" y="{top - 10}">held-out accuracy</text>')
    labels = []
    for name, seeds in sorted(curves.items(), key=lambda item: item[0] in main):
        steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
        at = {step: [curve[step] for curve in seeds.values()] for step in steps}
        mean = [(step, statistics.mean(at[step])) for step in steps]
        colour = COLOURS[main.index(name) % len(COLOURS)] if name in main else "#999"
        if name in main and len(seeds) > 1:
            around = [(s, max(at[s])) for s in steps] + [(s, min(at[s])) for s in reversed(steps)]
            parts.append(f'<polygon points="{path(around)}" fill="{colour}" opacity="0.15"/>')
        stroke = 2.5 if name in main else 1
        parts.append(f'<polyline points="{path(mean)}" fill="none" stroke="{colour}" stroke-width="{stroke}"/>')
        labels.append((y_of(mean[-1][1]), name, colour))
    last = -math.inf
    for y, name, colour in sorted(labels):
        last = max(y, last + 15)  # names never overlap
        parts.append(f'<text x="{width - right + 8}" y="{last + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def add_demonstrations(source: Path, target: Path) -> None:
    """Every row of a JSONL dataset with its answer as offline_output."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if "answer" not in row:
            raise SystemExit(f"{source}:{number}: no field 'answer' to demonstrate")
        row["offline_output"] = answer_text(str(row["answer"]))
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("table", help="table.md, table.json and accuracy.svg of a folder of runs")
    one.add_argument("runs", type=Path, help="folder that holds before/ and <algorithm>-seed<k>/")
    one.add_argument("--main", nargs="*", default=[], help="algorithms drawn in colour, with the band of their seeds")
    two = commands.add_parser("demonstrations", help="add the gold answer to every row as offline_output")
    two.add_argument("source", type=Path, help="JSONL dataset")
    two.add_argument("target", type=Path, help="JSONL dataset to write")
    args = parser.parse_args(arguments)
    if args.command == "demonstrations":
        add_demonstrations(args.source, args.target)
        return
    runs = find_runs(args.runs)
    before = read_scores(args.runs / "before")
    found = {name: summary(before, seeds) for name, seeds in runs.items()}
    start = statistics.mean(score for score, _ in before.values())
    curves = {name: {seed: curve_of(run, start) for seed, run in seeds.items()} for name, seeds in runs.items()}
    text = table(found)
    (args.runs / "table.md").write_text(text, encoding="utf-8")
    (args.runs / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.runs / "accuracy.svg").write_text(plot(curves, args.main), encoding="utf-8")
    print(text + f"plot: {args.runs / 'accuracy.svg'}")


if __name__ == "__main__":
    main()
