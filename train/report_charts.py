"""Charts of the training report as inline SVG: no script, no inline style, colours by CSS class (train/report.css).

Series are lists of (x, y) with finite numbers; labels are any text and are escaped here.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence

from train.report_data import Points

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 26  # margins of the plot inside the chart
HOVER_POINTS = 120
COLOURS = 8
# Control characters and the marks that reorder text: shown by code point, so that no text can disguise itself.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def esc(value: object) -> str:
    """Text for HTML, between tags or in a quoted attribute."""
    text = str(value).replace("\r\n", "\n")
    return html.escape(_HIDDEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text), quote=True)


def short(value: float) -> str:
    """A number in few characters: 0.5312 -> 0.531, 12345.6 -> 12,346, 1e-06 -> 1e-06."""
    if value == 0:
        return "0"
    if abs(value) >= 100_000_000:
        return f"{value:.3g}".replace("e+", "e")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}"


def nice_ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About n round numbers that cover [low, high]: 0.13, 0.87 -> 0, 0.2, 0.4, 0.6, 0.8, 1."""
    if high - low <= 1e-9 * abs(high):  # one value, up to rounding
        half = abs(low) / 2 or 0.5
        low, high = low - half, high + half
    raw = (high - low) / n
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]  # significant digits: values may be tiny


def smooth(points: Points) -> Points:
    """Exponential moving average over about a tenth of the points, corrected for its start."""
    if len(points) < 12:
        return points
    keep = 1 - 2 / (len(points) / 10 + 1)
    keep, total, weight, out = max(keep, 0.5), 0.0, 0.0, []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, total / weight))
    return out


def thin(points: Points, n: int) -> Points:
    """At most n points: the averages of equal runs of neighbours."""
    if len(points) <= n:
        return points
    size = math.ceil(len(points) / n)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[len(run) // 2][0], sum(y for _, y in run) / len(run)) for run in runs]


def _num(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _path(points: Points, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    return "M" + "L".join(f"{_num(x_of(x))} {_num(y_of(y))}" for x, y in points)


def _axes(
    x_ticks: list[float], y_ticks: list[float], x_of: Callable, y_of: Callable, form: Callable[[float], str]
) -> str:
    out = []
    for y in y_ticks:
        at = _num(y_of(y))
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{_num(y_of(y) + 3.5)}" text-anchor="end">{form(y)}</text>')
    for x in x_ticks:
        out.append(f'<text class="tick" x="{_num(x_of(x))}" y="{HEIGHT - 8}" text-anchor="middle">{short(x)}</text>')
    return "".join(out)


def line_chart(
    series: Sequence[tuple[str, Points]],
    *,
    form: Callable[[float], str] = short,
    floor: float | None = None,
    ceiling: float | None = None,
    label: str = "",
    smoothed: bool = True,
) -> str:
    """Lines over steps: faint as measured, strong as a moving average. Values appear where the pointer is.

    `floor` and `ceiling` are values that the y axis shows in any case.
    """
    series = [(name, points) for name, points in series if points]
    strong = [(name, smooth(points) if smoothed else points) for name, points in series]
    drawn = series if len(series) == 1 else strong
    xs = [x for _, points in series for x, _ in points]
    ys = sorted(y for _, points in drawn for _, y in points)
    ys = ys[len(ys) // 100 : len(ys) - len(ys) // 100]  # one spike in a hundred must not flatten the rest
    low, high = min(ys), max(ys)
    low = low if floor is None else min(low, floor)
    high = high if ceiling is None else max(high, ceiling)
    y_ticks = nice_ticks(low, high)
    low, high = y_ticks[0], y_ticks[-1]
    x_low, x_high = min(xs), max(xs)
    x_span = (x_high - x_low) or 1.0

    def x_of(x: float) -> float:
        return LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT) if x_high > x_low else (LEFT + WIDTH - RIGHT) / 2

    def y_of(y: float) -> float:
        return TOP + (high - min(max(y, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    x_ticks = [x for x in nice_ticks(x_low, x_high, 5) if x_low <= x <= x_high and x == int(x)] or [x_low]
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(label)}">']
    parts.append(_axes(x_ticks, y_ticks, x_of, y_of, form))
    for i, (_, points) in enumerate(strong):
        raw = series[i][1]
        if len(series) == 1 and points is not raw:
            parts.append(f'<path class="raw s{i % COLOURS}" d="{_path(thin(raw, 400), x_of, y_of)}"/>')
        if len(points) == 1:
            at = points[0]
            parts.append(
                f'<circle class="dot f{i % COLOURS}" cx="{_num(x_of(at[0]))}" cy="{_num(y_of(at[1]))}" r="3"/>'
            )
        else:
            parts.append(f'<path class="line s{i % COLOURS}" d="{_path(thin(points, 400), x_of, y_of)}"/>')
    parts.append(_hover(series, drawn, x_of, y_of, form))
    parts.append("</svg>")
    return "".join(parts)


def _hover(
    series: Sequence[tuple[str, Points]],
    drawn: Sequence[tuple[str, Points]],
    x_of: Callable,
    y_of: Callable,
    form: Callable,
) -> str:
    """Invisible columns over the plot; the one under the pointer shows a guide, dots on the drawn lines, and the
    values as measured (CSS :hover)."""
    heights = [dict(points) for _, points in drawn]
    tables = [dict(points) for _, points in series]
    steps = sorted({x for table in tables for x in table})
    stride = math.ceil(len(steps) / HOVER_POINTS)
    steps = steps[::-1][::stride][::-1]
    out = []
    for i, x in enumerate(steps):
        left = (x_of(steps[i - 1]) + x_of(x)) / 2 if i else LEFT
        right = (x_of(x) + x_of(steps[i + 1])) / 2 if i + 1 < len(steps) else WIDTH - RIGHT
        here = [(j, series[j][0], table[x]) for j, table in enumerate(tables) if x in table]
        many = len(series) > 1
        lines = [f"step {short(x)}" + ("" if many else f" · {form(here[0][2])}")]
        lines += [f"{form(y)} {name}" for _, name, y in here] if many else []
        width = max(len(line) for line in lines) * 5.6 + 14
        box_x = x_of(x) + 8 if x_of(x) + 8 + width < WIDTH else max(x_of(x) - 8 - width, 0)
        out.append(f'<g class="hit"><rect class="area" x="{_num(left)}" y="{TOP}"')
        out.append(f' width="{_num(max(right - left, 0.5))}" height="{HEIGHT - TOP - BOTTOM}"/>')
        out.append(f'<line class="guide" x1="{_num(x_of(x))}" x2="{_num(x_of(x))}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        for j, _, _ in here:
            at = _num(y_of(heights[j][x]))
            out.append(f'<circle class="dot f{j % COLOURS}" cx="{_num(x_of(x))}" cy="{at}" r="3"/>')
        out.append(
            f'<rect class="tip" x="{_num(box_x)}" y="{TOP}" width="{_num(width)}" height="{14 * len(lines) + 6}"'
        )
        out.append(' rx="4"/>')
        for j, line in enumerate(lines):
            y = TOP + 14 + 14 * j
            out.append(f'<text class="tiptext" x="{_num(box_x + 7)}" y="{y}">{esc(line)}</text>')
        out.append("</g>")
    return "".join(out)


def stacked_bars(steps: list[float], phases: Sequence[tuple[str, list[float]]], *, label: str) -> str:
    """One bar per step, one block per phase, seconds upwards; neighbours are averaged beyond 100 bars."""
    size = math.ceil(len(steps) / 100)
    runs = [range(i, min(i + size, len(steps))) for i in range(0, len(steps), size)]
    bars = [[sum(values[i] for i in run) / len(run) for _, values in phases] for run in runs]
    wide, high = 820, 240
    ticks = nice_ticks(0, max(sum(bar) for bar in bars) or 1.0)
    slot = (wide - LEFT - RIGHT) / len(bars)
    colours = [COLOURS - 1 if name == "other" else j % COLOURS for j, (name, _) in enumerate(phases)]
    width = min(slot * (0.82 if len(bars) < 60 else 0.94), 56)

    def y_of(value: float) -> float:
        return TOP + (1 - value / ticks[-1]) * (high - TOP - BOTTOM)

    out = [f'<svg class="chart wide" viewBox="0 0 {wide} {high}" role="img" aria-label="{esc(label)}">']
    for tick in ticks:
        at = _num(y_of(tick))
        out.append(f'<line class="grid" x1="{LEFT}" x2="{wide - RIGHT}" y1="{at}" y2="{at}"/>')
        out.append(
            f'<text class="tick" x="{LEFT - 6}" y="{_num(y_of(tick) + 3.5)}" text-anchor="end">{short(tick)} s</text>'
        )
    every = math.ceil(len(bars) / 12)
    for i, (run, bar) in enumerate(zip(runs, bars, strict=True)):
        x, below = LEFT + slot * i + (slot - width) / 2, 0.0
        name = short(steps[run[0]]) if len(run) == 1 else f"{short(steps[run[0]])} to {short(steps[run[-1]])}"
        told = ", ".join(f"{phase} {short(value)} s" for (phase, _), value in zip(phases, bar, strict=True) if value)
        out.append(f'<g class="bar"><title>{esc(f"step {name}: {short(sum(bar))} s ({told})")}</title>')
        for j, value in enumerate(bar):
            if value > 0:
                top = y_of(below + value)
                out.append(f'<rect class="f{colours[j]}" x="{_num(x)}" y="{top:.2f}" width="{_num(width)}"')
                out.append(f' height="{max(y_of(below) - top, 0):.2f}"/>')
                below += value
        out.append("</g>")
        if i % every == 0:
            out.append(f'<text class="tick" x="{_num(x + width / 2)}" y="{high - 8}" text-anchor="middle">')
            out.append(f"{short(steps[run[0]])}</text>")
    return "".join(out) + "</svg>"


def dumbbells(rows: Sequence[tuple[str, tuple | None, tuple | None, float | None]], *, label: str) -> str:
    """Before and after per row on one 0 to 100 % axis: (name, (value, low, high) or None, the same, baseline).

    Dots with their 95 % intervals as bars; a short upright mark is the baseline (always the commonest answer).
    """
    left, right, line, wide = 190, 50, 30, 820
    high = TOP + line * len(rows) + BOTTOM

    def x_of(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * (wide - left - right)

    out = [f'<svg class="chart wide" viewBox="0 0 {wide} {high}" role="img" aria-label="{esc(label)}">']
    for i in range(6):
        at = _num(x_of(i / 5))
        out.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{high - BOTTOM}"/>')
        out.append(f'<text class="tick" x="{at}" y="{high - 8}" text-anchor="middle">{i * 20} %</text>')
    for i, (name, before, after, baseline) in enumerate(rows):
        y = TOP + line * i + line / 2
        whole = "strong" if i == 0 else ""
        cut = name if len(name) <= 28 else name[:27] + "…"
        out.append(f'<text class="name {whole}" x="{left - 14}" y="{_num(y + 4)}" text-anchor="end">{esc(cut)}</text>')
        if baseline is not None:
            at = _num(x_of(baseline))
            out.append(f'<line class="baseline" x1="{at}" x2="{at}" y1="{_num(y - 8)}" y2="{_num(y + 8)}"/>')
        if before and after:
            out.append(
                f'<line class="link" x1="{_num(x_of(before[0]))}" x2="{_num(x_of(after[0]))}" y1="{y}" y2="{y}"/>'
            )
        for kind, point, shift in (("before", before, -4), ("after", after, 4)):
            if point:
                value, low, top = point
                out.append(f'<line class="interval {kind}" x1="{_num(x_of(low))}" x2="{_num(x_of(top))}"')
                out.append(f' y1="{y + shift}" y2="{y + shift}"/>')
                out.append(f'<circle class="{kind}" cx="{_num(x_of(value))}" cy="{y + shift}" r="5"><title>')
                out.append(f"{esc(kind)}: {value:.1%} ({low:.1%} to {top:.1%})</title></circle>")
        if before and after:
            change = (after[0] - before[0]) * 100
            out.append(f'<text class="tick" x="{wide - right + 10}" y="{_num(y + 4)}">{change:+.1f}</text>')
    return "".join(out) + "</svg>"


def sparkline(points: Points) -> str:
    """A line without axes for a table row."""
    points = thin(points, 60)
    low, high = min(y for _, y in points), max(y for _, y in points)
    span, n = (high - low) or 1.0, max(len(points) - 1, 1)
    flat = [(i / n * 96 + 2, 20 - (y - low) / span * 16) for i, (_, y) in enumerate(points)]
    return f'<svg class="spark" viewBox="0 0 100 24"><path class="line s0" d="{_path(flat, float, float)}"/></svg>'
