"""What supervision and RL brought the real model: accuracy with 95 % intervals, and example answers chosen by rule.

    python scripts/real_model/table.py runs/real [--data runs/real/data]

reads base/, supervised/ and <algorithm>-seed<k>/after/ (run folders of evaluate/custom.py over all question sets) and
writes table.md, table.json, examples.md and examples/*.png beside them. Intervals are clustered by clip; differences are paired
by question. A question about a grey file belongs to the cluster of its seeing twin.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from PIL import Image, ImageDraw

from data.decode import probe, read_frames
from evaluate._bootstrap import Estimate, Paired, Resampler, paired

SETS = {
    "heldout": "held-out",
    "unseen": "unseen combinations",
    "heldout_blind": "held-out, grey frames",
    "unseen_blind": "unseen, grey frames",
    "ability": "text-only, fixed set",
}
TARGETS = {"heldout": 0.08, "unseen": 0.05}  # RL over the supervised model, on every seed
BLIND_WITHIN = 0.03
EXAMPLES = 10
FRAMES = 4  # of a clip, in the picture of an example
GAP, LABEL = 4, 14  # pixels between two frames, and below them for their times
Scores = dict[str, float]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file. Raises SystemExit naming one that is not there."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; scripts/real_model.sh writes it")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def set_of(name: str) -> str:
    """The question set of an id: heldout_blind-00012 -> heldout_blind."""
    return name.rpartition("-")[0]


def read_scores(folder: Path) -> Scores:
    """Score per question id; an answer that could not be scored counts 0."""
    return {row["id"]: float(row["score"] or 0.0) for row in read_lines(folder / "predictions.jsonl")}


def read_questions(data: Path) -> dict[str, dict[str, Any]]:
    """Rows of every question set by id."""
    files = ("heldout", "heldout_blind", "unseen", "unseen_blind", "text_only")
    return {row["problem_id"]: row for name in files for row in read_lines(data / f"{name}.jsonl")}


def cluster_of(name: str, questions: dict[str, dict[str, Any]]) -> str:
    """The clip that a question is about: for a grey one that of its twin, for a text-only one itself."""
    row = questions[name.replace("_blind-", "-")]
    return (row.get("videos") or row.get("images") or [name])[0]


def find_runs(run: Path) -> dict[str, dict[int, Path]]:
    """algorithm -> seed -> evaluation folder of the runs that are trained and evaluated."""
    found: dict[str, dict[int, Path]] = {}
    for done in sorted(run.glob("*-seed*/after/results.json")):
        match = re.fullmatch(r"(.+)-seed(\d+)", done.parent.parent.name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = done.parent
    return found


def mean_over(runs: list[Scores]) -> Scores:
    """Per question, the mean over runs. Raises SystemExit when they answered different questions."""
    if any(set(scores) != set(runs[0]) for scores in runs):
        raise SystemExit("the runs answered different questions: delete their evaluations and make them again")
    return {name: statistics.mean(scores[name] for scores in runs) for name in runs[0]}


def estimate(scores: Scores, names: list[str], questions) -> Estimate:
    return Resampler([cluster_of(name, questions) for name in names]).mean([scores[name] for name in names])


def difference(before: Scores, after: Scores, names: list[str], questions) -> Paired:
    clusters = [cluster_of(name, questions) for name in names]
    return paired([before[name] for name in names], [after[name] for name in names], clusters)


def percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def points(found: Paired) -> str:
    return f"{100 * found.difference:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def check_answered(columns: dict[str, Scores], questions: dict[str, dict[str, Any]]) -> None:
    """Raises SystemExit naming an evaluation of other questions than the first one's or the data's (drawn anew since)."""
    first = next(iter(columns))
    for title, scores in columns.items():
        strange = len(scores.keys() - questions.keys())
        if strange or scores.keys() != columns[first].keys():
            raise SystemExit(
                f"{title}: {len(scores)} questions answered, {strange} of them not in the data; {first}: {len(columns[first])}. "
                "Give --data the folder they were asked from, or delete the evaluation and make it again"
            )


def by_seed(
    supervised: Scores, seeds: dict[int, Scores], names: dict[str, list[str]], questions
) -> dict[str, dict[int, tuple[Estimate, Paired]]]:
    """Question set -> seed -> (accuracy, difference to the supervised model)."""
    return {
        SETS[part]: {
            seed: (estimate(scores, listed, questions), difference(supervised, scores, listed, questions))
            for seed, scores in sorted(seeds.items())
        }
        for part, listed in names.items()
        if listed
    }


def mean_unseeing(shares: dict[str, float], listed: list[str], questions) -> float:
    """Mean over the questions of what the best answer to their templates scores that only reads the wording (complete.json)."""
    return statistics.mean(shares[questions[name]["data_source"]] for name in listed)


def targets(supervised: Scores, seeds: dict[int, Scores], names: dict[str, list[str]], questions) -> list[str]:
    """One sentence per target: what every seed reached, and whether that is enough."""
    lines = []
    for part, least in TARGETS.items():
        gains = [difference(supervised, scores, names[part], questions).difference for scores in seeds.values()]
        met = "met" if min(gains) >= least else "not met"
        shown = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
        lines.append(f"{SETS[part]}, at least {100 * least:+.0f} points on every seed: {met} ({shown})")
    moved = [difference(supervised, scores, names["heldout_blind"], questions).difference for scores in seeds.values()]
    met = "met" if max(map(abs, moved)) <= BLIND_WITHIN else "not met"
    lines.append(f"blind within {100 * BLIND_WITHIN:.0f} points: {met} ({', '.join(f'{100 * x:+.1f}' for x in moved)})")
    return lines


def build(run: Path, data: Path) -> tuple[str, dict[str, Any]]:
    """(table as Markdown, the same figures) of whatever is there of base, supervised and RL runs."""
    questions = read_questions(data)
    drawn = json.loads((data / "complete.json").read_text())
    majority, unseeing = drawn["majority"], drawn["best_unseeing"]
    columns: dict[str, Scores] = {}
    for name in ("base", "supervised"):
        if (run / name / "results.json").is_file():
            columns[name] = read_scores(run / name)
    seeds = {a: {s: read_scores(f) for s, f in found.items()} for a, found in find_runs(run).items()}
    each = columns | {f"{a}, seed {s}": scores for a, found in seeds.items() for s, scores in found.items()}
    if each:
        check_answered(each, questions)
    columns |= {f"{a}, {len(found)} seeds": mean_over(list(found.values())) for a, found in seeds.items()}
    if not columns:
        raise SystemExit(f"{run}: no evaluation there yet; scripts/real_model.sh makes base, supervised and RL runs")
    first = next(iter(columns.values()))
    names = {part: sorted(name for name in first if set_of(name) == part) for part in SETS}
    after = list(columns)[-1] if seeds and "supervised" in columns else None
    head = ["questions", "n", "majority", "best unseeing", *columns] + [f"{a} − supervised" for a in seeds if after]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    figures: dict[str, Any] = {"accuracy": {}, "difference": {}}

    def add(title: str, listed: list[str], known: float | None, blind: float | None) -> None:
        found = {column: estimate(scores, listed, questions) for column, scores in columns.items()}
        cells = [title, str(len(listed)), *("–" if x is None else f"{100 * x:.1f}" for x in (known, blind))]
        cells += map(percent, found.values())
        figures["accuracy"][title] = {column: value.as_dict() for column, value in found.items()}
        for algorithm, runs in seeds.items() if after else ():
            gain = difference(columns["supervised"], mean_over(list(runs.values())), listed, questions)
            cells.append(points(gain))
            figures["difference"].setdefault(title, {})[algorithm] = [
                gain.difference,
                gain.low,
                gain.high,
                gain.p_value,
            ]
        lines.append("| " + " | ".join(cells) + " |")

    known = {"ability": majority["text_only"], "heldout_blind": majority["heldout"], "unseen_blind": majority["unseen"]}
    for part, title in SETS.items():
        if names[part]:
            shares = unseeing.get(part.removesuffix("_blind"))
            best = mean_unseeing(shares, names[part], questions) if shares else None
            add(title, names[part], known.get(part, majority.get(part)), best)
    for field in ("problem_type", "data_type"):  # clips and stills apart: a gain on one is none on the other
        for kind in sorted({questions[name][field] for name in names["heldout"]}):
            listed = [n for n in names["heldout"] if questions[n][field] == kind]
            add(f"held-out: {kind}", listed, None, mean_unseeing(unseeing["heldout"], listed, questions))
    text = "Accuracy in % (95 % interval, clustered by clip); RL columns are means over seeds, differences are paired. Best "
    text += "unseeing: what the best answers score that only read the wording, without looking.\n\n"
    text += "\n".join(lines) + "\n"
    for algorithm, runs in seeds.items() if after else ():
        figures.setdefault("targets", {})[algorithm] = targets(columns["supervised"], runs, names, questions)
        text += "\n" + "\n".join(f"- {algorithm}: {line}" for line in figures["targets"][algorithm]) + "\n"
        text += f"\n| {algorithm} | seed | accuracy | − supervised, paired |\n|---|---|---|---|\n"
        found = by_seed(columns["supervised"], runs, names, questions)
        for title, listed in found.items():
            text += "".join(
                f"| {title} | {seed} | {percent(value)} | {points(gain)} |\n" for seed, (value, gain) in listed.items()
            )
        figures.setdefault("seeds", {})[algorithm] = {
            title: {
                seed: [value.as_dict(), [gain.difference, gain.low, gain.high]]
                for seed, (value, gain) in listed.items()
            }
            for title, listed in found.items()
        }
    return text, figures


def strip(path: Path, *, still: bool) -> tuple[Image.Image, list[float]]:
    """(picture, times in seconds): the frames at the middles of a clip's four quarters side by side, each with its time below
    it; a still alone and no times. Raises SystemExit for a file that is not there, MediaError for one that cannot be read."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give --data the folder that make_clips.py wrote, with its clips")
    if still:
        return Image.open(path).convert("RGB"), []
    timeline = probe(str(path))
    chosen = [(2 * i + 1) * len(timeline.times_s) // (2 * FRAMES) for i in range(FRAMES)]
    frames = dict(read_frames(str(path), timeline, chosen))
    times_s = [float(timeline.times_s[index]) for index in chosen]
    page = Image.new("RGB", (FRAMES * (timeline.width + GAP) - GAP, timeline.height + LABEL), "white")
    for i, (index, time_s) in enumerate(zip(chosen, times_s)):
        left = i * (timeline.width + GAP)
        page.paste(Image.fromarray(frames[index]), (left, 0))
        ImageDraw.Draw(page).text((left, timeline.height + 2), f"{time_s:.2f} s", fill="black")
    return page, times_s


def examples(run: Path, data: Path) -> str:
    """The first held-out questions by id, with the supervised model's answer and that of the first seed of each algorithm; their
    frames go to examples/ in the run folder."""
    questions = read_questions(data)
    folders = {"supervised": run / "supervised"}
    folders |= {f"{a}, seed {min(found)}": found[min(found)] for a, found in find_runs(run).items()}
    answers = {
        title: {row["id"]: row for row in read_lines(folder / "predictions.jsonl")}
        for title, folder in folders.items()
        if (folder / "predictions.jsonl").is_file()
    }
    (run / "examples").mkdir(exist_ok=True)
    parts = [f"The first {EXAMPLES} held-out questions by id: a rule, not a choice.\n"]
    for name in sorted(name for name in questions if set_of(name) == "heldout")[:EXAMPLES]:
        row = questions[name]
        still = not row.get("videos")
        file = row["images" if still else "videos"][0]
        picture, times_s = strip(data / file, still=still)
        picture.save(run / "examples" / f"{name}.png")
        seen = "still" if still else f"frames at {', '.join(f'{time_s:.2f}' for time_s in times_s)} s"
        parts.append(f"## {name}: {file}\n\n![{seen}](examples/{name}.png)\n")
        parts.append(f"{row['problem']} {' '.join(row.get('options', ()))}")
        parts.append(f"- gold: {row['answer']}")
        for title, rows in answers.items():
            if name in rows:
                score = rows[name]["score"]
                shown = "none" if score is None else f"{score:.3g}"
                parts.append(f"- {title} (score {shown}): {rows[name]['response']!r}")
        parts.append("")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="table of the real model", allow_abbrev=False)
    parser.add_argument("run", help="RUN of scripts/real_model.sh")
    parser.add_argument("--data", default=None, help="folder of make_clips.py (default: RUN/data)")
    args = parser.parse_args(arguments)
    run = Path(args.run)
    data = Path(args.data) if args.data else run / "data"
    text, figures = build(run, data)
    (run / "table.md").write_text(text, encoding="utf-8")
    (run / "table.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (run / "examples.md").write_text(examples(run, data), encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
