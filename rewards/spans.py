"""Time spans (RULES section 11): reading one span or a union of spans, and the overlap by measure."""

from __future__ import annotations

import math
import re
from typing import Any

from rewards.extraction import MALFORMED, NO_ANSWER, SEVERAL, Reading, Several, Task, clean, peel, without_lead
from rewards.loose_json import NotJson, Num, Obj, find_values, from_native, read_value

Span = tuple[float, float]

SPAN_KEYS = ("time", "span", "interval", "segment", "timestamps")
PAIR_KEYS = (("start", "end"), ("start_time", "end_time"))
MAX_SPANS = 100
SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds", "秒"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes", "分", "分钟"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours", "小时"), 3600.0),
}
UNIT = r"(?:seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h)(?![A-Za-z])|秒|分钟|分|小时"
CLOCK = r"\d+:\d+(?::\d+)*(?:\.\d+)?"
PLAIN = r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?"


def _moment(name: str) -> str:
    return (
        rf"(?P<{name}>(?<![\d.:])[-+]?(?:{CLOCK}|{PLAIN}(?:\s*(?:{UNIT})(?:\s*(?:and\s+)?{PLAIN}\s*(?:{UNIT})){{0,2}})?)"
        r"(?![\d:]|\.\d))"
    )


TO = r"\s*(?:-|–|—|~|～|\bto\b|\buntil\b|\btill\b|到|至)\s*"
AT = r"\s*(?:time\s*)?(?:at|from|is|:|=)?\s*(?:around\s+|about\s+)?"
PROSE = [
    re.compile(
        rf"\bbetween\s+{_moment('a')}\s*(?:-|–|—|~|～|\band\b|\bto\b)\s*{_moment('b')}"
        rf"|{_moment('c')}{TO}{_moment('d')}"
        rf"|\bfrom\s+{_moment('e')}\s*\band\b\s*{_moment('f')}",
        re.IGNORECASE,
    ),
    re.compile(
        rf"\b(?:starts?|starting|begins?|beginning|start_time)\b{AT}{_moment('a')}"
        rf"[^\d\[\]{{}}]{{0,80}}?\b(?:ends?|ending|finish(?:es)?|stops?|end_time)\b{AT}{_moment('b')}",
        re.IGNORECASE,
    ),
]
PART = re.compile(rf"({PLAIN})\s*({UNIT})", re.IGNORECASE)
ORDER = re.compile(r"第(?=\d)|(?<!\d )\bseconds?\s(?=\d)", re.IGNORECASE)  # 第10秒, "from second 10"
OR = re.compile(r"\bor\b|或", re.IGNORECASE)


class BadSpan(ValueError):
    """What should be a time or a span is not."""


def read_moment(value: Any) -> float:
    """Seconds of a number, a numeric text, "12 s", "1 min 30 s" or a clock time. Raises BadSpan."""
    if isinstance(value, Num):
        result = value.value
    elif isinstance(value, str) and len(value) <= 400:
        result = _moment_text(value.strip().replace("−", "-"))
    else:
        raise BadSpan(f"{value!r} is no time")
    if not math.isfinite(result):
        raise BadSpan("not finite")
    return result


def _moment_text(text: str) -> float:
    sign = -1.0 if text.startswith("-") else 1.0
    text = text.lstrip("+-").strip()
    if re.fullmatch(CLOCK, text):
        parts = text.split(":")
        whole = [float(part) for part in parts]
        if (
            len(parts) > 3
            or any(len(part.split(".")[0]) != 2 for part in parts[1:])
            or any(part >= 60 for part in whole[1:])
        ):
            raise BadSpan(f"{text!r} is no clock time")
        return sign * sum(part * 60**place for place, part in enumerate(reversed(whole)))
    if re.fullmatch(PLAIN, text):
        return sign * float(text)
    parts = PART.findall(text)
    if parts and not re.sub(r"\band\b|\s", "", PART.sub("", text)):
        return sign * sum(float(amount) * SECONDS[unit.lower()] for amount, unit in parts)
    raise BadSpan(f"{text!r} is no time")


def _pair(start: Any, end: Any) -> Span:
    a, b = read_moment(start), read_moment(end)
    if b <= a:
        raise BadSpan("the end is not after the start")
    return a, b


def read_spans(value: Any) -> tuple[Span, ...]:
    """The span or union of spans of a value, sorted. Raises BadSpan, or Several when two keys disagree."""
    found: tuple[Span, ...]
    if isinstance(value, Obj):
        readings = []
        if value.repeats() and any(len(value.get(name)) > 1 for name in (*SPAN_KEYS, *sum(PAIR_KEYS, ()))):
            raise Several("repeated key")
        readings += [read_spans(item) for item in value.get(*SPAN_KEYS)]
        for start, end in PAIR_KEYS:
            if value.get(start) and value.get(end):
                readings.append((_pair(value.get(start)[0], value.get(end)[0]),))
        if not readings:
            raise BadSpan("no time key")
        if len(set(readings)) > 1:
            raise Several("two keys disagree")
        return readings[0]
    if isinstance(value, str):
        reading = _prose(value)
        if reading.value is None:
            raise Several("alternatives") if reading.status == "several_answers" else BadSpan(f"{value!r} is no span")
        return reading.value
    if not isinstance(value, list) or not value:
        raise BadSpan("no span")
    if all(isinstance(item, (list, Obj)) for item in value):
        if len(value) > MAX_SPANS:
            raise BadSpan(f"more than {MAX_SPANS} spans")
        found = tuple(span for item in value for span in _flat(item))
        return tuple(sorted(set(found)))
    if len(value) != 2:
        raise BadSpan("not two numbers")
    return (_pair(*value),)


def _flat(value: Any) -> tuple[Span, ...]:
    if isinstance(value, list) and (len(value) != 2 or any(isinstance(item, list) for item in value)):
        if len(value) == 2 or not all(isinstance(item, list) for item in value) or not value:
            raise BadSpan("not two numbers")
        return tuple(span for item in value for span in _flat_once(item))
    return read_spans(value)


def _flat_once(value: Any) -> tuple[Span, ...]:
    if not isinstance(value, list) or len(value) != 2:
        raise BadSpan("not two numbers")
    return (_pair(*value),)


def read_span_text(text: str, place: str = "block") -> Reading:
    """The spans of an answer: one JSON value, or one span in prose. Alternatives are several answers (TG8)."""
    try:
        text = without_lead(peel(clean(text)))
        values = [(value, a, b) for value, a, b in find_values(text) if not _aside(value)]
        objects = [(value, a, b) for value, a, b in values if isinstance(value, Obj)]
        values = objects or values
        if not values:
            return _prose(text)
        readings = {read_spans(value) for value, _, _ in values}
        if len(readings) > 1:
            return SEVERAL
        outside = text
        for _, a, b in reversed(values):
            outside = outside[:a] + " " + outside[b:]
        if OR.search(outside) and re.search(r"\d", outside):
            return SEVERAL
        spoken = _prose(outside)
        spans = readings.pop()
        if spoken.value is not None and spoken.value != spans:
            return SEVERAL
        return Reading(spans, key=spans)
    except Several:
        return SEVERAL
    except (BadSpan, NotJson):
        return MALFORMED


def _aside(value: Any) -> bool:
    """A remark in brackets, "(about 3 s)" or "[10 s]": no list of a span."""
    return isinstance(value, list) and len(value) < 2 and not (value and isinstance(value[0], (list, Obj)))


def _prose(text: str) -> Reading:
    text = ORDER.sub("", " ".join(text[:100_000].replace("−", "-").split()))
    if not re.search(r"\d", text):
        return NO_ANSWER
    found: set[tuple[Span, ...]] = set()
    for pattern in PROSE:
        for match in pattern.finditer(text):
            groups = [group for group in match.groups() if group is not None]
            before, after = text[max(0, match.start() - 3) : match.start()], text[match.end() : match.end() + 8]
            if re.match(r"\s*(?:-|–|—|~|\bto\b)\s*\d", after) or re.search(r"\d\s*[-–—~]\s*\Z", before):
                return MALFORMED
            try:
                found.add((_pair(*_shared_unit(groups[0], groups[1])),))
            except BadSpan:
                return MALFORMED
            if len(found) > 1:
                return SEVERAL
        if found:
            break
    if not found:
        return NO_ANSWER
    if OR.search(text) and len(re.findall(r"\d+(?:[.:]\d+)*", text)) > 2:
        return SEVERAL
    spans = found.pop()
    return Reading(spans, key=spans)


def _shared_unit(start: str, end: str) -> tuple[str, str]:
    """ "1 to 2 minutes": a single unit at the end holds for both."""
    unit = re.search(rf"(?:{UNIT})\s*\Z", end, re.IGNORECASE)
    if unit and re.fullmatch(rf"[-+]?{PLAIN}", start.strip()) and len(PART.findall(end)) == 1:
        return start + " " + unit[0], end
    return start, end


SPAN_TASK = Task(read=read_span_text, kind="long")


def read_gold_spans(gold: Any) -> tuple[Span, ...]:
    """Raises ValueError for a gold that is no span, or a negative, empty or reversed one."""
    try:
        if isinstance(gold, str):
            reading = read_span_text(gold, "gold")
            if reading.value is None:
                raise BadSpan(reading.status)
            spans = reading.value
        elif isinstance(gold, (list, dict)):
            spans = read_spans(from_native(gold))
        else:
            raise BadSpan("neither text, list nor object")
    except (ValueError, NotJson) as error:
        raise ValueError(f"answer {gold!r} is no span of seconds [start, end] with start < end: {error}") from error
    if any(start < 0 for start, _ in spans):
        raise ValueError(f"answer {gold!r} starts before 0")
    return spans


def merged(spans: tuple[Span, ...]) -> list[Span]:
    """Disjoint spans with the same union, in order."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def span_iou(one: tuple[Span, ...], other: tuple[Span, ...]) -> float:
    """Measure of the intersection over measure of the union of two unions of spans (TG1).

    >>> span_iou(((10, 20),), ((12, 22),))
    0.6666666666666666
    """
    a, b = merged(one), merged(other)
    both, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        both += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    union = sum(end - start for start, end in a) + sum(end - start for start, end in b) - both
    if not math.isfinite(union) or union <= 0:
        return 0.0
    return min(1.0, max(0.0, both / union))


def read_time_point(value: Any) -> float:
    """One moment: a number, a clock, "12 s", or a list of one of these (S4). Raises BadSpan."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return read_moment(value)


__all__ = ["SPAN_TASK", "read_gold_spans", "read_span_text", "read_spans", "read_value", "span_iou"]
