"""Models side by side on the benchmarks they both ran: scores, paired differences with their significance, a picture.

    python scripts/compare_runs.py RUN_A RUN_B [RUN_C …] [--plot compare.svg]

A RUN is a run folder of an evaluation program, or any folder above some. The first one is the baseline. Differences are
paired by sample id and clustered by video; a protocol or set of questions that differs is said, never averaged over.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import html
import json
from dataclasses import dataclass

from evaluate._bootstrap import paired


@dataclass
class Run:
    """One run folder: what it was, its scores per sample id, the video of each."""

    name: str
    folder: Path
    results: dict
    scores: dict[str, float]
    videos: dict[str, str]
    groups: dict[str, tuple[str, ...]]  # of the questions whose row says where it stands in a mean of means

    @property
    def benchmark(self) -> str:
        variant = self.results["settings"].get("variant")
        return self.results["benchmark"] + (f" ({variant})" if variant else "")


def read_results(path: Path) -> dict:
    """A results.json of an evaluation program. Raises SystemExit naming a file that is none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(
            f"{path}: not JSON ({error}); run the evaluation again, it goes on from its predictions"
        ) from None
    missing = {"benchmark", "metrics", "primary", "settings"} - set(results if isinstance(results, dict) else ())
    if missing:
        raise SystemExit(f"{path}: has no {', '.join(sorted(missing))}; is it of an evaluation program of ReelRL?")
    return results


def read_predictions(path: Path) -> list[dict]:
    """The scored rows of a run. Raises SystemExit naming the file and line that cannot be read."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; the paired difference needs it, run the evaluation again")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # splitlines() would cut at U+2028
        if not line:
            continue
        try:
            row = json.loads(line)
            rows.append({**row, "id": row["id"], "score": row["score"]})
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number}: no scored prediction ({error}); run the evaluation again") from None
    return rows


def find_runs(place: Path) -> list[Run]:
    """Every run folder at or below a place. Raises SystemExit naming a place that holds none."""
    folders = sorted(path.parent for path in place.rglob("results.json") if (path.parent / "run.json").is_file())
    if not folders:
        raise SystemExit(f"{place}: no results.json with its run.json in it or below; is it a run folder?")
    runs = []
    for folder in folders:
        results = read_results(folder / "results.json")
        scores, videos, groups = {}, {}, {}
        for row in read_predictions(folder / "predictions.jsonl"):
            if row["score"] is not None and not row.get("outside_primary"):
                scores[row["id"]], videos[row["id"]] = row["score"], row.get("video") or row["id"]
                if "primary_group" in row:
                    groups[row["id"]] = tuple(row["primary_group"])
        runs.append(Run(place.name, folder, results, scores, videos, groups))
    return runs


def latest(runs: list[Run]) -> tuple[dict[str, Run], list[str]]:
    """Benchmark -> its newest run, and notes that say which was taken where a place holds several."""
    newest: dict[str, Run] = {}
    count: dict[str, int] = {}
    for run in sorted(runs, key=lambda run: (run.folder / "results.json").stat().st_mtime):
        newest[run.benchmark] = run
        count[run.benchmark] = count.get(run.benchmark, 0) + 1
    notes = [f"{name}: {n} runs, the newest is {newest[name].folder}" for name, n in count.items() if n > 1]
    return newest, notes


def percent(line: dict | None) -> str:
    if not line or line.get("value") is None:
        return "–"
    if line.get("low") is None:
        return f"{100 * line['value']:.1f}"
    return f"{100 * line['value']:.1f} ({100 * line['low']:.1f} to {100 * line['high']:.1f})"


def compare(base: Run, other: Run) -> dict:
    """Paired difference other - base over the questions that both scored: of the mean of means where both runs are about
    one and place these questions alike, else of the plain mean."""
    common = [name for name in base.scores if name in other.scores]
    result = {"common": len(common), "only_base": len(base.scores) - len(common)}
    result["only_other"] = len(other.scores) - len(common)
    if common:
        a, b = [base.scores[name] for name in common], [other.scores[name] for name in common]
        alike = all(name in base.groups and base.groups[name] == other.groups.get(name) for name in common)
        paths = [base.groups[name] for name in common] if alike else None
        result["paired"] = paired(a, b, [base.videos[name] for name in common], paths)
        result["of_means"] = alike
    return result


def differing_settings(base: Run, other: Run) -> list[str]:
    """Settings, besides the model itself, in which two runs differ."""
    ours, theirs = base.results["settings"], other.results["settings"]
    changed = {name for name in ours.keys() | theirs.keys() if name != "model" and ours.get(name) != theirs.get(name)}
    judges = [run.results.get("engine", {}).get("judge", {}).get("identity") for run in (base, other)]
    return sorted(changed | ({"judge"} if judges[0] != judges[1] else set()))


def mean_is_primary(run: Run) -> bool:
    """Whether the primary metric is the mean of the scores that are compared, which the paired difference is about."""
    value = run.results["metrics"].get(run.results["primary"], {}).get("value")
    return bool(run.scores) and value is not None and abs(sum(run.scores.values()) / len(run.scores) - value) < 1e-6


def picture(names: list[str], rows: list[tuple[str, list[dict | None]]]) -> str:
    """An SVG of bars with 95 % intervals, one group per benchmark, one colour per run."""
    colours = ("#3a6ea5", "#d0792f", "#4a9a5b", "#9a5aa5", "#777777", "#b8433a")
    bar, gap, left, width = 16, 26, 190, 560
    height = 60 + sum(len(names) * bar + gap for _ in rows)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" '
             'font-family="sans-serif" font-size="12">']  # fmt: skip
    for place, name in enumerate(names):
        x = left + place * 150
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colours[place % 6]}"/>')
        parts.append(f'<text x="{x + 17}" y="20">{html.escape(name[:20])}</text>')
    y = 40
    for label, lines in rows:
        parts.append(
            f'<text x="{left - 10}" y="{y + len(names) * bar / 2 + 4}" text-anchor="end">{html.escape(label)}</text>'
        )
        for place, line in enumerate(lines):
            if line and line.get("value") is not None:
                top = y + place * bar
                parts.append(f'<rect x="{left}" y="{top + 2}" width="{width * line["value"]:.1f}" height="{bar - 4}" '
                             f'fill="{colours[place % 6]}"/>')  # fmt: skip
                if line.get("low") is not None:
                    low, high = left + width * line["low"], left + width * line["high"]
                    parts.append(f'<path d="M{low:.1f} {top + bar / 2}H{high:.1f}" stroke="#222" stroke-width="1.5"/>')
                parts.append(f'<text x="{left + width * max(line["value"], line.get("high") or 0) + 6:.1f}" '
                             f'y="{top + bar - 4}">{100 * line["value"]:.1f}</text>')  # fmt: skip
        y += len(names) * bar + gap
    return "\n".join([*parts, "</svg>"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compare evaluation runs", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="run folders, or folders above them; the first is the baseline")
    parser.add_argument("--plot", help="write the picture here (SVG)")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args(arguments)
    if len(args.runs) < 2:
        parser.error("give two runs or more")
    found_in = [latest(find_runs(Path(place))) for place in args.runs]
    places = [newest for newest, _ in found_in]
    names = short_names(args.runs)
    benchmarks = [name for name in places[0] if any(name in place for place in places[1:])]
    if not benchmarks:
        raise SystemExit(f"no benchmark in common: {[sorted(place) for place in places]}")

    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False)
    table = Table(title="scores in % (95 % interval); differences to the first run, paired", title_justify="left")
    for heading in ("benchmark", "metric", *names):
        table.add_column(heading)
    for name in names[1:]:
        table.add_column(f"{name} − {names[0]}")
    rows, figures, notes = [], {}, [note for _, several in found_in for note in several]
    for benchmark in benchmarks:
        runs = [place.get(benchmark) for place in places]
        base = runs[0]
        primary = base.results["primary"]
        for metric in base.results["metrics"]:
            lines = [run and run.results["metrics"].get(metric) for run in runs]
            differences = []
            for name, run in zip(names[1:], runs[1:]):
                if run is None or metric != primary:
                    differences.append("")
                    continue
                protocols = [each.results.get("protocol") for each in (base, run)]
                if protocols[0] != protocols[1]:  # the scores of one and the same answer are other numbers
                    differences.append("not compared")
                    notes.append(f"{benchmark}: {name} was scored with protocol {protocols[1]}, {names[0]} with "
                                 f"{protocols[0]}: no difference is given")  # fmt: skip
                    continue
                found = compare(base, run)
                differences.append(describe(found))
                figures[f"{benchmark}: {name}"] = figure_of(found)
                changed = differing_settings(base, run)
                if changed:
                    notes.append(f"{benchmark}: {name} was run with other {', '.join(changed)}")
                if not found.get("of_means") and not (mean_is_primary(base) and mean_is_primary(run)):
                    notes.append(
                        f"{benchmark}: {primary} is not the mean score per question; the difference is of that mean"
                    )
                if found["only_base"] or found["only_other"]:
                    notes.append(f"{benchmark}: {found['only_base']} questions only in {names[0]}, "
                                 f"{found['only_other']} only in {name}; the difference is over the rest")  # fmt: skip
            table.add_row(
                benchmark if metric == primary else "", metric, *(percent(line) for line in lines), *differences
            )
            if metric == primary:
                rows.append((benchmark, lines))
    console.print(table)
    console.print(
        "difference: of the primary score unless a note says otherwise, 95 % interval and p by sign flips per video"
    )
    for note in notes:
        console.print(f"note: {note}")
    if args.plot:
        Path(args.plot).write_text(picture(names, rows), encoding="utf-8")
        console.print(f"picture: {args.plot}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def short_names(places: list[str]) -> list[str]:
    """The shortest ends of the paths that differ: runs/a/x, runs/b/x -> a/x, b/x."""
    parts = [Path(place).resolve().parts for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} #{place}" for place, part in enumerate(parts, 1)]


def describe(found: dict) -> str:
    if "paired" not in found:
        return "no common questions"
    got = found["paired"]
    star = " *" if got.p_value < 0.05 else ""
    return f"{100 * got.difference:+.1f} ({100 * got.low:+.1f} to {100 * got.high:+.1f}), p {got.p_value:.3f}{star}"


def figure_of(found: dict) -> dict:
    got = found.pop("paired", None)
    if got is None:
        return found
    return {**found, **{name: getattr(got, name) for name in got.__slots__}}


if __name__ == "__main__":
    sys.exit(main())
