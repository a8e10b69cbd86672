"""Held-out accuracy of runs of several algorithms: a table (Markdown) and a plot (SVG).

    python scripts/algorithm_table.py table runs/algorithms --main grpo dapo gspo
    python scripts/algorithm_table.py demonstrations train.jsonl train_demonstrations.jsonl

`table` reads runs/algorithms/<algorithm>-seed<k>/validation.jsonl and writes table.md and accuracy.svg beside them.
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

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.playground_questions import answer_text

Curve = dict[int, tuple[float, float]]  # step -> (accuracy, number of questions)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito: told apart by colour-blind readers


def read_curves(runs: Path) -> dict[str, dict[int, Curve]]:
    """algorithm -> seed -> curve. Raises SystemExit when the folder holds no validated run."""
    curves: dict[str, dict[int, Curve]] = {}
    for file in sorted(runs.glob("*-seed*/validation.jsonl")):
        match = re.fullmatch(r"(.+)-seed(\d+)", file.parent.name)
        if not match:
            continue
        curve = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("validate/accuracy") is not None:
                curve[row["step"]] = (row["validate/accuracy"], row["validate/samples"])
        if len(curve) >= 2:
            curves.setdefault(match[1], {})[int(match[2])] = curve
    if not curves:
        raise SystemExit(f"{runs}: no <algorithm>-seed<k>/validation.jsonl with two validations or more")
    return curves


def summary(seeds: dict[int, Curve]) -> dict[str, float]:
    """Mean accuracy at the first and last validation, gain, its z value, and the spread of the last over seeds.

    z = gain / standard error of a difference of two shares over the questions of one seed: unpaired and without credit
    for further seeds, which answer the same questions, so on the careful side.
    """
    first = [curve[min(curve)] for curve in seeds.values()]
    last = [curve[max(curve)] for curve in seeds.values()]
    start, end = (statistics.mean(accuracy for accuracy, _ in part) for part in (first, last))
    questions = max(number for _, number in last)
    error = math.sqrt(max(1e-12, (start * (1 - start) + end * (1 - end)) / questions))
    spread = statistics.stdev([accuracy for accuracy, _ in last]) if len(last) > 1 else math.nan
    steps = max(max(curve) for curve in seeds.values())
    return {"start": start, "end": end, "gain": end - start, "z": (end - start) / error, "spread": spread, "steps": steps}


def table(curves: dict[str, dict[int, Curve]]) -> str:
    """Markdown, best last accuracy first."""
    found = {name: summary(seeds) for name, seeds in curves.items()}
    lines = [
        "| algorithm | seeds | steps | accuracy at the start | at the end | gain | learned (z > 1.96) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(found.items(), key=lambda item: -item[1]["end"]):
        spread = "" if math.isnan(row["spread"]) else f" ± {row['spread']:.3f}"
        learned = f"{'yes' if row['z'] > 1.96 else 'no'} ({row['z']:.1f})"
        lines.append(
            f"| {name} | {len(curves[name])} | {row['steps']:g} | {row['start']:.3f} | {row['end']:.3f}{spread} | "
            f"{row['gain']:+.3f} | {learned} |"
        )
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, dict[int, Curve]], main: list[str]) -> str:
    """SVG: mean over seeds with the band between the worst and the best seed for `main`, thin grey lines for others."""
    width, height, left, top, right, bottom = 900, 460, 60, 30, 190, 50
    x_high = max(step for seeds in curves.values() for curve in seeds.values() for step in curve)

    def x_of(step: float) -> float:
        return left + step / max(1, x_high) * (width - left - right)

    def y_of(accuracy: float) -> float:
        return top + (1 - accuracy) * (height - top - bottom)

    def path(points: list[tuple[float, float]]) -> str:
        return " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = y_of(tick)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for part in range(5):
        step = x_high * part / 4
        parts.append(f'<text x="{x_of(step):.1f}" y="{height - bottom + 20}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{left}" y="{top - 10}">held-out accuracy</text>')
    labels = []
    for name, seeds in sorted(curves.items(), key=lambda item: item[0] in main):
        steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
        values = {step: [curve[step][0] for curve in seeds.values()] for step in steps}
        mean = [(step, statistics.mean(values[step])) for step in steps]
        colour = COLOURS[main.index(name) % len(COLOURS)] if name in main else "#aaa"
        if name in main and len(seeds) > 1:
            around = [(s, max(values[s])) for s in steps] + [(s, min(values[s])) for s in reversed(steps)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("table", help="table.md and accuracy.svg of a folder of runs")
    one.add_argument("runs", type=Path, help="folder that holds <algorithm>-seed<k> run folders")
    one.add_argument("--main", nargs="*", default=[], help="algorithms drawn in colour, with the band of their seeds")
    two = commands.add_parser("demonstrations", help="add the gold answer to every row as offline_output")
    two.add_argument("source", type=Path, help="JSONL dataset")
    two.add_argument("target", type=Path, help="JSONL dataset to write")
    args = parser.parse_args()
    if args.command == "demonstrations":
        add_demonstrations(args.source, args.target)
        return
    curves = read_curves(args.runs)
    text = table(curves)
    (args.runs / "table.md").write_text(text, encoding="utf-8")
    (args.runs / "accuracy.svg").write_text(plot(curves, args.main), encoding="utf-8")
    print(text + f"plot: {args.runs / 'accuracy.svg'}")


if __name__ == "__main__":
    main()
