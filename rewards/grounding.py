"""Spatial-temporal grounding, tracking and segmentation (RULES 13, 14, 19): structured answers of several parts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from rewards.extraction import MALFORMED, NO_ANSWER, SEVERAL, Reading, Several, Task, clean, peel, without_lead
from rewards.geometry import (
    BOX_KEYS,
    FRAME_KEY,
    MAX_POINTS,
    BadShape,
    Box,
    Point,
    box_iou,
    number,
    only_object,
    read_box_text,
    read_boxes,
    read_gold_track,
    read_track,
    scale_of,
    scaled,
    track_iou,
)
from rewards.loose_json import NotJson, Obj, from_native
from rewards.spans import BadSpan, Span, read_span_text, read_spans, read_time_point, span_iou


@dataclass(frozen=True)
class Tube:
    """A time span and a box per second; either part may be missing (None)."""

    spans: tuple[Span, ...] | None
    track: dict[float, Box] | None


@dataclass(frozen=True)
class Region:
    """A box with positive and negative points and, in video, the second they belong to."""

    box: Box
    points: dict[str, tuple[Point, ...]] = field(default_factory=dict)
    time: float | None = None
    asks_time: bool = False


def native_text(gold: Any) -> Any:
    """A gold as a parsed value: JSON types as they are, text through the loose reader. Raises ValueError."""
    try:
        if isinstance(gold, (list, dict)):
            return from_native(gold)
        if isinstance(gold, str):
            return only_object(peel(gold))
    except (NotJson, Several) as error:
        raise ValueError(f"answer {gold!r:.200} cannot be read: {error}") from error
    raise ValueError(f"answer must be JSON, got {gold!r:.200}")


def read_tube(text: str, place: str = "block") -> Reading:
    """Time and boxes of an answer; a part that cannot be read is missing (ST2, ST5)."""
    try:
        text = without_lead(peel(clean(text)))
        value = only_object(text)
    except Several:
        return SEVERAL
    except NotJson:
        return MALFORMED
    if not isinstance(value, Obj):
        reading = read_span_text(text, place)
        return Reading(Tube(reading.value, None), key=(reading.value, ())) if reading.value else reading
    if value.repeats() and any(len(value.get(name)) > 1 for name in ("time", "boxes")):
        return SEVERAL
    spans, track = None, None
    try:
        spans = read_spans(value)
    except Several:
        return SEVERAL
    except (BadSpan, NotJson):
        pass
    held = value.get("boxes")
    if held:
        try:
            track = read_track(held[0])
        except BadShape:
            track = None
    if spans is None and not track:
        return MALFORMED
    return Reading(Tube(spans, track), key=(spans, tuple(sorted((track or {}).items()))))


TUBE_TASK = Task(read=read_tube, kind="long")


def read_gold_tube(gold: Any) -> Tube:
    """Raises ValueError for a gold without a readable time, or with a frame that has no valid box (ST5)."""
    value = native_text(gold)
    if not isinstance(value, Obj):
        raise ValueError(f'answer {gold!r:.200} must be {{"time": [start, end], "boxes": {{second: box}}}}')
    try:
        spans = read_spans(value)
    except (ValueError, NotJson) as error:
        raise ValueError(f"answer {gold!r:.200} has no readable time: {error}") from error
    if any(start < 0 for start, _ in spans):
        raise ValueError(f"answer {gold!r:.200} starts before 0")
    held = [item for item in value.get("boxes") if item is not None]
    track = read_gold_track(held[0]) if held and not (isinstance(held[0], list) and not held[0]) else {}
    return Tube(spans, track)


def score_tube(predicted: Tube, gold: Tube, extra: dict[str, Any]) -> float:
    """ST1: half time IoU, half the mean box IoU over the gold's frames; time alone when the gold has no boxes."""
    time_part = span_iou(predicted.spans, gold.spans) if predicted.spans else 0.0
    if not gold.track:
        return time_part
    return 0.5 * time_part + 0.5 * (track_iou(predicted.track, gold.track, extra) if predicted.track else 0.0)


def read_track_text(text: str, place: str = "block") -> Reading:
    """{"boxes": {second: box}} or an object whose keys are all numbers (TR3)."""
    try:
        value = only_object(without_lead(peel(clean(text))))
        if not isinstance(value, Obj):
            return MALFORMED if value is not None else NO_ANSWER
        track = read_track(_frames(value))
    except Several:
        return SEVERAL
    except (BadShape, NotJson):
        return MALFORMED
    if not track:
        return MALFORMED
    return Reading(track, key=tuple(sorted(track.items())))


def _frames(value: Obj) -> Any:
    held = value.get("boxes")
    if len(held) > 1:
        raise Several("boxes twice")
    if held:
        return held[0]
    if value.pairs and all(FRAME_KEY.fullmatch(key) for key, _ in value.pairs):
        return value
    raise BadShape("no boxes")


TRACK_TASK = Task(read=read_track_text, kind="long")


def read_gold_tracking(gold: Any) -> dict[float, Box]:
    """Raises ValueError for a gold without any box or with a frame whose box is not valid."""
    value = native_text(gold)
    if not isinstance(value, Obj):
        raise ValueError(f'answer {gold!r:.200} must be {{"boxes": {{second: [x1, y1, x2, y2]}}}}')
    track = read_gold_track(_frames(value))
    if not track:
        raise ValueError("answer has no box")
    return track


def read_region(text: str, place: str = "block") -> Reading:
    """One box, optional points and time (S1). Point lists that do not parse count as empty."""
    try:
        text = without_lead(peel(clean(text)))
        value = only_object(text)
        if isinstance(value, Obj):
            region = _region(value)
        else:
            reading = read_box_text(text, place)
            if reading.value is None:
                return reading
            region = Region(_one([*reading.value]))
    except Several:
        return SEVERAL
    except (BadShape, NotJson):
        return MALFORMED
    return Reading(region, key=(region.box, tuple(sorted(region.points.items())), region.time))


def _one(found: list[Box]) -> Box:
    if len(found) != 1:
        raise Several("several boxes")
    return found[0]


def _region(value: Obj, strict: bool = False) -> Region:
    if value.repeats() and any(
        len(value.get(n)) > 1 for n in ("positive_points", "negative_points", "time", *BOX_KEYS)
    ):
        raise Several("repeated key")
    box = _one(read_boxes(Obj(tuple(pair for pair in value.pairs if pair[0].strip().lower() not in ("time",)))))
    points = {}
    for kind in ("positive_points", "negative_points"):
        held = [item for item in value.get(kind) if item is not None]
        if held:
            points[kind] = _points(held[0], strict)
    time, asked = None, [item for item in value.get("time") if item is not None]
    if asked:
        try:
            time = read_time_point(asked[0])
        except BadSpan as error:
            if strict:
                raise ValueError(f"time {asked[0]!r} cannot be read") from error
    return Region(box, points, time, bool(asked))


def _points(value: Any, strict: bool) -> tuple[Point, ...]:
    try:
        if not isinstance(value, list) or len(value) > MAX_POINTS:
            raise BadShape("no list of points")
        if len(value) == 2 and not any(isinstance(item, list) for item in value):
            value = [value]  # a single point without its list
        if any(not isinstance(item, list) or len(item) != 2 for item in value):
            raise BadShape("a point is [x, y]")
        return tuple((number(x), number(y)) for x, y in value)
    except BadShape:
        if strict:
            raise
        return ()


REGION_TASK = Task(read=read_region, kind="long")


def read_gold_region(gold: Any) -> Region:
    """Raises ValueError when the gold's one box, its points or its time cannot be read."""
    value = native_text(gold)
    try:
        if isinstance(value, Obj):
            return _region(value, strict=True)
        if value is None and isinstance(gold, str):
            reading = read_box_text(gold, "gold")
            if reading.value is None:
                raise BadShape(reading.status)
            return Region(_one([*reading.value]))
        return Region(_one(read_boxes(value)))
    except (ValueError, NotJson) as error:
        raise ValueError(f"answer {gold!r:.200} must hold one box, points [x, y] and a time: {error}") from error


def score_region(predicted: Region, gold: Region, extra: dict[str, Any]) -> float:
    """S1, S2, S4: box IoU, half of it points when the gold has points; times 0 when the gold's second is missed."""
    ours, theirs = scale_of(extra)
    box, target = scaled(predicted.box, ours), scaled(gold.box, theirs)
    overlap = box_iou(box, target)
    if overlap == 0:
        return 0.0
    if gold.time is not None and (predicted.time is None or not abs(predicted.time - gold.time) <= 1):
        return 0.0
    kinds = {kind: points for kind, points in gold.points.items() if points}
    if not kinds:
        return overlap
    radius = 0.1 * math.hypot(target[2] - target[0], target[3] - target[1])
    shares = []
    for kind, wanted in kinds.items():
        given = [scaled(point, ours) for point in predicted.points.get(kind, ())]
        wanted = [scaled(point, theirs) for point in wanted]
        shares.append(matched_points(given, wanted, radius) / max(len(given), len(wanted)))
    return 0.5 * overlap + 0.5 * math.fsum(shares) / len(shares)


def matched_points(given: list[Point], wanted: list[Point], radius: float) -> int:
    """Size of the largest one-to-one matching of points at most `radius` apart (augmenting paths)."""
    near = [
        [place for place, point in enumerate(given) if math.hypot(point[0] - x, point[1] - y) <= radius]
        for x, y in wanted
    ]
    owner: dict[int, int] = {}

    def place_of(row: int, tried: set[int]) -> bool:
        for place in near[row]:
            if place not in tried:
                tried.add(place)
                if place not in owner or place_of(owner[place], tried):
                    owner[place] = row
                    return True
        return False

    return sum(place_of(row, set()) for row in range(min(len(wanted), 500)))


def describe(value: Any) -> str:
    """A tube, track or region as JSON text, for the extracted column."""
    if isinstance(value, Tube):
        return json.dumps({"time": value.spans, "boxes": _keys(value.track)})
    if isinstance(value, Region):
        return json.dumps({"boxes": value.box, **value.points, **({"time": value.time} if value.asks_time else {})})
    return json.dumps({"boxes": _keys(value)})


def _keys(track: dict[float, Box] | None) -> dict[str, Box] | None:
    return None if track is None else {str(second).removesuffix(".0"): box for second, box in track.items()}
