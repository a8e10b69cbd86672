"""runs/<name>/report.html: what a run did, as one page that opens anywhere and fetches nothing.

Reads what the run folder holds (metrics.jsonl, rollouts.jsonl and frames/, run.json, before.json, after.json); what is
missing is left out, what cannot be read is named on the page. The page shows what a model wrote, so all of it is
treated as hostile: every text is escaped, images are JPEG data only, and the content policy allows no script, no
network and only this page's own style sheet (by hash). Importable without torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from train.report_charts import COLOURS, dumbbells, esc, line_chart, short, sparkline, stacked_bars
from train.report_data import Points, RunFiles, as_dict, as_list, number, points, read_run, result_file
from train.report_examples import examples

CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
# frames per example, characters per text, examples: tried in this order until the page is small enough
BUDGETS = (
    (8, 6000, 12),
    (4, 6000, 12),
    (2, 6000, 12),
    (1, 6000, 12),
    (0, 6000, 12),
    (0, 1000, 12),
    (0, 300, 3),
    (0, 0, 0),
)

AS_MEASURED = ("Learning rate", "Memory", "Validation")  # not noisy: drawn without a moving average

# title, metric names with their labels, hint, value always on the axis: (lowest, highest)
CURVES: tuple[tuple[str, dict[str, str], str, tuple[float | None, float | None]], ...] = (
    ("Reward", {"reward/mean": "reward"}, "Mean over all sampled responses of a step.", (None, None)),
    ("Accuracy part", {"reward/accuracy": "accuracy"}, "The reward's accuracy part alone.", (None, None)),
    ("Format part", {"reward/format": "format"}, "The reward's format part alone.", (0, 1)),
    (
        "Groups that teach nothing",
        {
            "group/zero_variance_share": "equal rewards",
            "group/all_right_share": "all right",
            "group/all_wrong_share": "all wrong",
        },
        "Share of groups; equal rewards give no gradient.",
        (0, 1),
    ),
    (
        "Response length",
        {"response/length_mean": "mean", "response/length_max": "longest"},
        "Tokens per sampled response.",
        (0, None),
    ),
    ("Truncated", {"response/truncated_share": "share"}, "Share of responses that hit the length limit.", (0, None)),
    ("Entropy", {"policy/entropy": "entropy"}, "Nats per token; near zero means no exploration is left.", (0, None)),
    ("KL to the reference", {"policy/ref_kl": "KL"}, "Per response token.", (0, None)),
    ("Policy loss", {"loss/policy": "loss"}, "Not a measure of progress in RL.", (None, None)),
    (
        "Clipped tokens",
        {"policy/clipped_high": "ratio too high", "policy/clipped_low": "ratio too low"},
        "Share of tokens whose ratio left the trust region.",
        (0, None),
    ),
    ("Gradient norm", {"policy/grad_norm": "norm"}, "Before clipping.", (0, None)),
    ("Learning rate", {"policy/learning_rate": "rate"}, "", (0, None)),
    (
        "Sampler against trainer",
        {"mismatch/mean": "mean difference", "mismatch/k3": "k3"},
        "Log-probs of the same tokens: flat and small is right.",
        (0, None),
    ),
    (
        "Throughput",
        {"perf/tokens_per_s": "tokens/s"},
        "Prompts counted once per group.",
        (0, None),
    ),
    (
        "Model-FLOPs utilisation",
        {"perf/mfu": "utilisation"},
        "Useful FLOPs of the update over the bf16 peak.",
        (0, None),
    ),
    (
        "Memory",
        {
            "memory/reserved_max_gib": "GPU reserved",
            "memory/allocated_max_gib": "GPU allocated",
            "memory/host_rss_gib": "host",
        },
        "GiB on the fullest rank.",
        (0, None),
    ),
)


def write_report(
    folder: str | Path,
    *,
    before: str | Path | None = None,
    after: str | Path | None = None,
    out: str | Path | None = None,
    max_bytes: int = 20_000_000,
) -> Path:
    """Write the report of a run folder and return its path (default: report.html in the folder).

    `before` and `after` are results of the held-out evaluation (default: before.json and after.json in the folder).
    Frames are dropped first, then text, until the page has at most `max_bytes`; the page says what it left out.
    Raises FileNotFoundError if the folder does not exist, ValueError if not even the bare page fits.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no run folder; give the --output_dir of a training run")
    run = read_run(
        folder,
        Path(before) if before else result_file(folder, "before"),
        Path(after) if after else result_file(folder, "after"),
    )
    for budget in BUDGETS:
        page = render(run, *budget).encode("utf-8")
        if len(page) <= max_bytes:
            break
    else:
        raise ValueError(f"the report of {folder} has {len(page)} bytes even without examples; allowed: {max_bytes}")
    path = Path(out) if out else folder / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(page)
    os.replace(temporary, path)
    return path


# ---- page -----------------------------------------------------------------------------------------------------------


def render(run: RunFiles, n_frames: int, n_characters: int, n_examples: int) -> str:
    """The whole page with at most this many frames and examples, and characters per text."""
    style_hash = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; base-uri 'none'; form-action 'none'"
    sections = [
        ("results", "Held-out results", results(run)),
        ("curves", "Learning curves", curves(run)),
        ("time", "Where the time goes", phase_times(run)),
        ("examples", "What the model saw and said", examples(run, n_frames, n_characters, n_examples)),
        ("metrics", "All metrics", all_metrics(run)),
        ("run", "The run", run_details(run)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, title, text in sections)
    title = esc(run.folder.resolve().name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="referrer" content="no-referrer"><meta name="viewport" content="width=device-width">\n'
        f"<title>{title} · ReelRL</title>\n<style>{CSS}</style></head>\n<body>"
        f'<header class="top"><div class="kicker">ReelRL training report</div><h1>{title}</h1>{summary(run)}'
        f"<nav>{links}</nav>{notices(run)}</header>\n<main>{body}"
        f"<footer>Made by scripts/make_report.py. Opens offline; runs no script.</footer></main></body></html>\n"
    )


def summary(run: RunFiles) -> str:
    """One line of what was trained, then tiles with the figures people ask for first."""
    start = as_dict((as_list(run.info.get("starts")) or [{}])[-1])
    flags = as_dict(start.get("arguments"))
    told = [str(flags[name]) for name in ("algorithm", "model") if flags.get(name)]
    told += [f"{start['ranks']} rank{'s' * (start['ranks'] != 1)}"] if number(start.get("ranks")) else []
    told += [str(start["device"])] if start.get("device") else []
    told += [str(start["started"])[:10]] if start.get("started") else []
    tiles = []
    before, after = _score(run.before.get("overall")), _score(run.after.get("overall"))
    if before and after:
        tiles.append(_change_tile("Held-out accuracy", before[0], after[0], percent=True))
    for title, name, percent in (("Reward", "reward/mean", False), ("Accuracy in training", "reward/accuracy", True)):
        line = points(run.rows, name)
        if len(line) >= 2:
            tenth = max(len(line) // 10, 1)
            first, last = (sum(y for _, y in part) / len(part) for part in (line[:tenth], line[-tenth:]))
            tiles.append(_change_tile(title, first, last, " over the run", percent=percent))
    if run.rows:
        spent = sum(y for _, y in points(run.rows, "time/step_s"))
        tiles.append(_tile("Steps", short(run.rows[-1]["step"]), f"{_duration(spent)} in steps" if spent else ""))
    speed = points(run.rows, "perf/tokens_per_s")
    if speed:
        mfu = points(run.rows, "perf/mfu")
        more = f"utilisation of the update {sum(y for _, y in mfu) / len(mfu):.1%}" if mfu else "prompt counted once"
        tiles.append(_tile("Tokens per second", short(sum(y for _, y in speed) / len(speed)), more))
    return f'<p class="lead">{esc(" · ".join(told))}</p><div class="tiles">{"".join(tiles)}</div>'


def _tile(what: str, big: str, more: str) -> str:
    parts = "".join(
        f'<div class="{name}">{text}</div>' for name, text in (("what", what), ("big", big), ("more", more))
    )
    return f'<div class="tile">{parts}</div>'


def _swatch(shape: str) -> str:
    """A sign in a legend: an SVG shape on 10 by 10."""
    return f'<svg class="swatch" viewBox="0 0 10 10">{shape}</svg>'


def _square(i: int) -> str:
    return _swatch(f'<rect class="f{i % COLOURS}" width="10" height="10" rx="3"/>')


def _change_tile(what: str, first: float, last: float, note: str = "", *, percent: bool) -> str:
    change = last - first
    told = f"{change * 100:+.1f} points" if percent else f"{change:+.3f}"
    a, b = (f"{value * 100:.1f}" if percent else short(value) for value in (first, last))
    big = f'<span class="from">{a} →</span> {b}{" %" if percent else ""}'
    way = "up" if change > 0 else "down" if change < 0 else ""
    return _tile(what, big, f'<span class="{way}">{told}</span>{note}')


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def notices(run: RunFiles) -> str:
    """Warnings of the last rows, and what could not be read."""
    warnings: dict[str, list[float]] = {}
    for row in run.rows:
        for text in as_list(row.get("warnings")):
            kind = re.sub(r"[\d.,]+(e[-+]?\d+)?", "…", str(text)[:300])
            warnings.setdefault(kind, [row["step"], row["step"], str(text)[:300]])[1:] = [row["step"], str(text)[:300]]
    lines = [
        f"steps {short(first)} to {short(last)}: {esc(text)}" for first, last, text in list(warnings.values())[:12]
    ]
    lines += [esc(note) for note in run.notes]
    if not lines:
        return ""
    return '<div class="warn"><b>To look at</b><ul>' + "".join(f"<li>{line}</li>" for line in lines) + "</ul></div>"


# ---- held-out results -----------------------------------------------------------------------------------------------


def _score(part: Any) -> tuple[float, float, float] | None:
    """(accuracy, low, high) of one entry of a result; the interval is the point itself where it is missing."""
    accuracy, interval = number(as_dict(part).get("accuracy")), as_list(as_dict(part).get("ci95"))
    if accuracy is None:
        return None
    if len(interval) == 2 and all(number(bound) is not None for bound in interval):
        return accuracy, interval[0], interval[1]
    return accuracy, accuracy, accuracy


def results(run: RunFiles) -> str:
    if not (_score(run.before.get("overall")) or _score(run.after.get("overall"))):
        return ""
    names = [("all", run.before.get("overall"), run.after.get("overall"))]
    types = as_dict(run.before.get("per_type")), as_dict(run.after.get("per_type"))
    names += [
        (name, types[0].get(name), types[1].get(name)) for name in list(dict.fromkeys([*types[0], *types[1]]))[:40]
    ]
    drawn = []
    for name, old, new in names:
        baseline = number(as_dict(old or new).get("majority"))
        drawn.append((name, _score(old), _score(new), baseline))
    blind = as_dict(run.before.get("blind")), as_dict(run.after.get("blind"))
    dot = '<circle class="{}" cx="5" cy="5" r="5"/>'
    upright = '<line class="baseline" x1="5" x2="5" y1="0" y2="10"/>'
    rows = [_result_row(name, old, new, "all" if i == 0 else "") for i, (name, old, new) in enumerate(names)]
    if any(blind):
        whole = [as_dict(part.get("overall")) or part for part in blind]
        rows.append(_result_row("blind run: frames replaced by grey", whole[0], whole[1], "blind"))
    return (
        '<p class="lead">Questions on clips that training never saw, greedy decoding, before and after training. '
        "Bars are 95&nbsp;% intervals; the upright mark is what always giving the commonest answer would score.</p>"
        f'<div class="card"><div class="scroll">{dumbbells(drawn, label="held-out accuracy before and after")}</div>'
        f'<ul class="legend"><li>{_swatch(dot.format("before"))}before</li><li>{_swatch(dot.format("after"))}after</li>'
        f"<li>{_swatch(upright)}commonest answer</li></ul></div>"
        '<div class="card wide"><div class="scroll"><table><thead><tr><th>problem type</th><th>questions</th>'
        "<th>commonest answer</th><th>before</th><th>after</th><th>change</th><th>answers parsed, before → after</th>"
        f"<th>right among parsed</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _result_row(name: str, old: Any, new: Any, kind: str) -> str:
    old, new = as_dict(old), as_dict(new)
    first, last = _score(old), _score(new)
    n = number(new.get("n", old.get("n")))
    change = f"{(last[0] - first[0]) * 100:+.1f}" if first and last else "–"
    way = "" if not (first and last) else "up" if last[0] > first[0] else "down" if last[0] < first[0] else ""

    def cell(score: tuple | None) -> str:
        if not score:
            return "<td>–</td>"
        interval = f' <span class="ci">{score[1] * 100:.1f}–{score[2] * 100:.1f}</span>' if score[1] < score[2] else ""
        return f"<td>{score[0] * 100:.1f} %{interval}</td>"

    def both(key: str) -> str:
        pair = [number(part.get(key)) for part in (old, new)]
        return " → ".join("–" if value is None else f"{value * 100:.1f}" for value in pair)

    majority = number(new.get("majority", old.get("majority")))
    return (
        f'<tr class="{kind}"><td>{esc(name)}</td><td>{"–" if n is None else short(n)}</td>'
        f"<td>{'–' if majority is None else f'{majority * 100:.1f} %'}</td>{cell(first)}{cell(last)}"
        f'<td class="{way}">{change}</td><td>{both("parsed")}</td><td>{both("accuracy_among_parsed")}</td></tr>'
    )


# ---- curves and times -----------------------------------------------------------------------------------------------


def curves(run: RunFiles) -> str:
    cards = []
    for title, names, hint, (floor, ceiling) in CURVES:
        series = [(label, points(run.rows, name)) for name, label in names.items()]
        cards.append(_curve(title, [item for item in series if item[1]], hint, floor, ceiling))
    by_type = [_by_type(run.rows, "reward/accuracy", {}), _by_type(run.rows, "reward/mean", {})]
    kind, series = ("Accuracy", by_type[0]) if by_type[0] else ("Reward", by_type[1])
    cards.insert(2, _curve(f"{kind} by problem type", series, "On the training prompts of a step.", None, None))
    series = _by_type(run.validation or run.rows, "validate/accuracy", {"validate/accuracy": "all"})
    cards.insert(1, _curve("Validation", series, "Accuracy on held-out samples during training.", None, None))
    cards = [card for card in cards if card]
    return f'<div class="charts">{"".join(cards)}</div>' if cards else ""


def _by_type(rows: list[dict[str, Any]], prefix: str, more: dict[str, str]) -> list[tuple[str, Points]]:
    """One line per <prefix>/<problem type>, after those of `more` (name -> label)."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix + "/"))
    labels = more | {name: name.removeprefix(prefix + "/") for name in names}
    return [(label, points(rows, name)) for name, label in labels.items() if points(rows, name)][:COLOURS]


def _curve(title: str, series: list[tuple[str, Points]], hint: str, floor: float | None, ceiling: float | None) -> str:
    if not series or all(y == 0 for _, line in series for _, y in line):
        return ""
    now = ""
    if len(series) == 1:
        now = f'<span class="now">{short(series[0][1][-1][1])}</span>'
    legend = "".join(
        f"<li>{_square(i)}{esc(name)} <b>{short(line[-1][1])}</b></li>" for i, (name, line) in enumerate(series)
    )
    return (
        f'<div class="card"><div class="cardhead"><h3>{title}</h3>{now}</div><p class="hint">{hint}</p>'
        + line_chart(series, floor=floor, ceiling=ceiling, label=title, smoothed=title not in AS_MEASURED)
        + (f'<ul class="legend">{legend}</ul>' if len(series) > 1 else "")
        + "</div>"
    )


def phase_times(run: RunFiles) -> str:
    """Bars of time/<phase>_s per step; what no phase claims is "other". Phases inside phases are left to the table."""
    rows = [row for row in run.rows if number(row.get("time/step_s")) is not None]
    names = dict.fromkeys(name for row in rows for name in row if re.fullmatch(r"time/[^/]+_s", name))
    names.pop("time/step_s", None)
    if not rows:
        return ""
    columns = {name[5:-2]: [max(number(row.get(name)) or 0.0, 0.0) for row in rows] for name in names}
    ranked = sorted(columns.items(), key=lambda item: -sum(item[1]))
    shown, rest = ranked[: COLOURS - 1], ranked[COLOURS - 1 :]
    claimed = [sum(values[i] for _, values in shown) for i in range(len(rows))]
    other = [max(row["time/step_s"] - claimed[i], 0.0) for i, row in enumerate(rows)]
    if sum(other) > 0.005 * sum(row["time/step_s"] for row in rows) or rest:
        shown.append(("other", other))
    whole = sum(sum(values) for _, values in shown) or 1.0
    lines = []
    for i, (name, values) in enumerate(shown):
        share, colour = sum(values) / whole, COLOURS - 1 if name == "other" else i
        times = f"<td>{short(sum(values) / len(values))} s</td><td>{share:.0%}</td>"
        lines.append(f"<tr><td>{_square(colour)}{esc(name)}</td>{times}</tr>")
    steps = [row["step"] for row in rows]
    return (
        '<p class="lead">Seconds per step by phase, on the slowest rank.</p>'
        '<div class="card"><div class="split"><div class="scroll">'
        + stacked_bars(steps, shown, label="seconds per step by phase")
        + "</div><table><thead><tr><th>phase</th><th>mean</th><th>share</th></tr></thead><tbody>"
        + "".join(lines)
        + f'</tbody><tfoot><tr class="all"><td>step</td><td>{short(whole / len(rows))} s</td><td></td></tr></tfoot>'
        + "</table></div></div>"
    )


def all_metrics(run: RunFiles) -> str:
    names = sorted(
        {name for row in run.rows for name in row} - {"step", "schema_version", "unix_s", "warnings", "non_finite"}
    )
    lines = []
    for name in names[:500]:
        line = points(run.rows, name)
        if line:
            values = [y for _, y in line]
            cells = "".join(f"<td>{short(value)}</td>" for value in (values[0], min(values), max(values), values[-1]))
            lines.append(f"<tr><td><code>{esc(name[:120])}</code></td><td>{sparkline(line)}</td>{cells}</tr>")
    if not lines:
        return ""
    left_out = f'<p class="note">{len(names) - 500} more are in metrics.jsonl.</p>' if len(names) > 500 else ""
    return (
        f"<details><summary>{len(lines)} metrics of {len(run.rows)} steps</summary>"
        '<div class="card"><div class="scroll"><table><thead><tr><th>name</th><th></th><th>first</th><th>lowest</th>'
        f"<th>highest</th><th>last</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div></div></details>{left_out}"
    )


def run_details(run: RunFiles) -> str:
    """Arguments, versions and git id of every start of the run, the latest first."""
    out = []
    starts = [as_dict(start) for start in as_list(run.info.get("starts"))][-5:]
    for i, start in enumerate(reversed(starts)):
        facts = {name: start[name] for name in ("started", "git", "device", "ranks") if name in start}
        facts["command"] = " ".join(str(word) for word in as_list(start.get("command")))
        facts["versions"] = ", ".join(f"{name} {value}" for name, value in as_dict(start.get("versions")).items())
        flags = as_dict(start.get("arguments"))
        title = "Latest start" if i == 0 else f"Start {len(starts) - i}"
        out.append(
            f'<div class="card wide"><h3>{title}</h3>{_keys(facts)}<details{" open" if len(flags) <= 30 else ""}>'
            f"<summary>{len(flags)} arguments</summary>{_keys(flags)}</details></div>"
        )
    return "".join(out)


def _keys(values: dict[str, Any]) -> str:
    rows = []
    for name, value in list(values.items())[:400]:
        text = value if isinstance(value, str) else json.dumps(value)
        text = text if len(text) <= 2000 else text[:2000] + f" … ({len(text) - 2000} characters more)"
        rows.append(f'<tr><td>{esc(str(name)[:200])}</td><td class="mono">{esc(text)}</td></tr>')
    return f'<div class="scroll"><table class="keys"><tbody>{"".join(rows)}</tbody></table></div>'
