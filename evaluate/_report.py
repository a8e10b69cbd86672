"""What people look at after a run: a table in the terminal and one self-contained HTML page.

The page shows model output and annotation text, so every string is escaped, there is no script at all and the content
policy forbids everything but inline style and data: images. Nothing is loaded from a network.
"""

from __future__ import annotations

import base64
import html
import io
import random
import sys
from pathlib import Path
from typing import Any

from evaluate._scoring import Answer

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2430}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;margin:.5rem 0 1rem}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #e3e7ee}
td.bars,td:first-child,th:first-child{text-align:left}
.bar{display:inline-block;height:.65rem;background:#3a6ea5;vertical-align:middle}.muted{color:#667}
article{border:1px solid #dfe4ec;border-left:6px solid #999;border-radius:6px;padding:.6rem 1rem;margin:1rem 0}
article.right{border-left-color:#2f9e5b}article.wrong{border-left-color:#c8473d}article.failed{border-left-color:#b08a1e}
article img{height:110px;margin:2px;border-radius:3px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f7fa;
padding:.5rem;border-radius:4px;max-height:22rem;overflow:auto}summary{cursor:pointer}code{background:#f5f7fa}
"""


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def interval(line: dict[str, Any]) -> str:
    if line.get("low") is None or line.get("high") is None:
        return ""
    return f"{100 * line['low']:.1f} to {100 * line['high']:.1f}"


def counts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The counts a reader needs to trust a score, as (name, text) pairs."""
    of = f" of {results['n_official']} official" if results.get("n_official") else ""
    failures = ", ".join(f"{n} {status}" for status, n in results["failures"].items())
    excluded = "; ".join(f"{n} {reason}" for reason, n in results["excluded"].items())
    repaired = "; ".join(f"{n} {reason}" for reason, n in results["repaired"].items())
    pairs = [
        ("questions", f"{results['n']}{of}"),
        ("without an answer yet", str(results["n_missing"])),
        ("unanswered (no readable answer, counted wrong)", str(results["n_unanswered"])),
        ("failed (counted wrong)", f"{results['n_failed']}" + (f" ({failures})" if failures else "")),
        ("cut by the token limit", str(results["n_truncated"])),
        ("waiting for a judge (not in the score)", str(results["n_unjudged"])),
        ("excluded", f"{results['n_excluded']}" + (f" ({excluded})" if excluded else "")),
        ("repaired", repaired or "0"),
        ("chance level", percent(results["chance"])),
    ]
    return [pair for pair in pairs if pair[1] not in ("0", "")] if results["n"] else pairs


def print_results(results: dict[str, Any], folder: Path) -> None:
    """Metrics, tables and counts on the terminal (plain text when there is none)."""
    from rich.console import Console
    from rich.table import Table

    # Labels come from annotation files: "[/x]" in one is no markup.
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False, emoji=False)
    grid = Table(title=f"{results['title']} · {results['protocol']} · {results['model']}", title_justify="left")
    for name in ("metric", "%", "95 % interval", "n"):
        grid.add_column(name, justify="left" if name == "metric" else "right")
    for name, line in results["metrics"].items():
        grid.add_row(
            name + (" *" if name == results["primary"] else ""), percent(line["value"]), interval(line), str(line["n"])
        )
    console.print(grid)
    for name, lines in results["breakdown"].items():
        if len(lines) > 40:
            console.print(f"{name}: {len(lines)} rows, in {folder / 'results.json'}")
            continue
        console.print(breakdown_table(name, lines, Table))
    console.print("; ".join(f"{name}: {text}" for name, text in counts(results)))
    console.print(f"results: {folder / 'results.json'}   report: {folder / 'report.html'}", soft_wrap=True)


def columns_of(lines: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(key, heading) of the columns a table has values for."""
    known = [
        ("value", "score"),
        ("", "95 % interval"),
        ("n", "n"),
        ("parsed", "parsed"),
        ("among_parsed", "among parsed"),
    ]
    known += [("chance", "chance"), ("majority", "best constant")]
    return [(key, heading) for key, heading in known if key == "" or any(key in line for line in lines.values())]


def cell(line: dict[str, Any], key: str) -> str:
    if key == "":
        return interval(line)
    return str(line.get(key, "")) if key == "n" else percent(line.get(key))


def breakdown_table(name: str, lines: dict[str, dict[str, Any]], table_class: Any) -> Any:
    grid = table_class(title=name, title_justify="left")
    grid.add_column(name)
    columns = columns_of(lines)
    for _, heading in columns:
        grid.add_column(heading, justify="right")
    for label, line in lines.items():
        grid.add_row(label, *(cell(line, key) for key, _ in columns))
    return grid


def html_table(name: str, lines: dict[str, dict[str, Any]]) -> str:
    columns = columns_of(lines)
    head = "".join(f"<th>{html.escape(heading)}</th>" for _, heading in columns)
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>"
        + "".join(f"<td>{html.escape(cell(line, key))}</td>" for key, _ in columns)
        + f"<td class=bars><span class=bar style='width:{90 * (line.get('value') or 0):.0f}px'></span></td></tr>"
        for label, line in lines.items()
    )
    return f"<h2>{html.escape(name)}</h2><table><tr><th></th>{head}<th></th></tr>{body}</table>"


def thumbnails(sample: Any, count: int = 6) -> list[str]:
    """data: URIs of a few small frames of the sample's media; empty when the files cannot be read any more."""
    from PIL import Image

    from data.video import ImageSettings, MediaError, VideoSettings, read_image, read_video

    uris = []
    for medium in sample.media:
        try:
            if medium.kind == "image":
                pictures = [read_image(medium, ImageSettings(max_pixels=65536))]
            else:
                small = VideoSettings(fps=1.0, min_frames=2, max_frames=count, max_pixels=24576, resize="native")
                pictures = list(read_video(medium, small).pixels)
        except (MediaError, OSError):
            continue
        for picture in pictures:
            buffer = io.BytesIO()
            Image.fromarray(picture.transpose(1, 2, 0)).save(buffer, "JPEG", quality=70)
            uris.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris


def answer_html(answer: Answer, with_frames: bool) -> str:
    """One question: frames, text, options, gold, the model's words, what was read in them, the score; long texts cut."""
    sample, row = answer.sample, answer.row
    kind = "failed" if answer.failed else "right" if (answer.score or 0) >= 0.5 else "wrong"
    unreadable = row["status"] in ("media_error", "load_timeout")  # decoding again would fail, or hang, again
    shown = thumbnails(sample) if with_frames and not unreadable else []
    pictures = "".join(f"<img src='{uri}' alt=''>" for uri in shown)
    options = "<br>".join(html.escape(option[:1000]) for option in sample.options)
    media = ", ".join(
        f"{medium.path}"
        + (f" [{medium.start_s}, {medium.end_s}) s" if medium.start_s is not None or medium.end_s else "")
        for medium in sample.media
    )
    got = "not scored" if answer.score is None else f"{answer.score:.3f}"
    reason = f" · {row['reason']}" if row.get("reason") else ""
    facts = (
        f"score <b>{got}</b> · {html.escape(str(row['status']) + reason)} · {int(row.get('response_tokens', 0))} tokens"
    )
    return (
        f"<article class={kind}><div class=muted>{html.escape(sample.id)} · {html.escape(sample.problem_type)} · "
        f"{html.escape(media)}</div><div>{pictures}</div><p>{html.escape(sample.question[:6000])}</p><p>{options}</p>"
        f"<p>gold <code>{html.escape(str(sample.answer)[:400])}</code> · read "
        f"<code>{html.escape(str(row.get('extracted'))[:400])}</code> · {facts}, "
        f"{html.escape(str(row.get('finish_reason')))}</p><details open><summary>answer</summary>"
        f"<pre>{html.escape(row.get('response', '')[:6000])}</pre></details></article>"
    )


def choose(answers: list[Answer], count: int = 60) -> list[Answer]:
    """Failures, unreadable, wrong and right answers, each kind in a fixed random order, mixed evenly."""
    kinds: dict[str, list[Answer]] = {"failed": [], "unread": [], "wrong": [], "right": []}
    for answer in answers:
        kind = "failed" if answer.failed else "right" if (answer.score or 0) >= 0.5 else "wrong"
        kinds["unread" if kind == "wrong" and not answer.answered else kind].append(answer)
    for group in kinds.values():
        random.Random(0).shuffle(group)
    chosen: list[Answer] = []
    while len(chosen) < count and any(kinds.values()):
        for group in kinds.values():
            if group:
                chosen.append(group.pop())
    return chosen[:count]


def write_report(folder: Path, results: dict[str, Any], answers: list[Answer], frames_for: int = 24) -> None:
    """report.html in the run folder. Frames of at most `frames_for` questions keep it small (well under 20 MB)."""
    lines = "".join(
        f"<tr><td>{html.escape(name)}{' *' if name == results['primary'] else ''}</td><td>{percent(line['value'])}</td>"
        f"<td>{interval(line)}</td><td>{line['n']}</td></tr>"
        for name, line in results["metrics"].items()
    )
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in counts(results)
    )
    settings = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in {**results["settings"], **results.get("engine", {})}.items()
    )
    tables = "".join(html_table(name, table) for name, table in results["breakdown"].items())
    examples = "".join(answer_html(answer, place < frames_for) for place, answer in enumerate(choose(answers)))
    title = html.escape(f"{results['title']} · {results['model']}")
    (folder / "report.html").write_text(
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
        f'content="{POLICY}"><meta name=viewport content="width=device-width"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><p class=muted>protocol {html.escape(results['protocol'])}"
        f"</p><table><tr><th>metric</th><th>%</th><th>95 % interval</th><th>n</th></tr>{lines}</table>"
        f"<table>{facts}</table>{tables}<h2>Questions and answers</h2>{examples}"
        f"<details><summary>settings</summary><table>{settings}</table></details></body></html>",
        encoding="utf-8",
    )
