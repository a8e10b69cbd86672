"""Boxes and points: reading them (RULES SG2, ST3, S1), coordinate systems (SG4) and intersection over union."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rewards.extraction import MALFORMED, NO_ANSWER, SEVERAL, Reading, Several, Task, boxes, clean, peel, without_lead
from rewards.loose_json import NotJson, Num, Obj, find_values, from_native

Box = tuple[float, float, float, float]
Point = tuple[float, float]

BOX_KEYS = ("boxes", "box", "bbox", "bbox_2d")
CORNERS = ("x1", "y1", "x2", "y2")
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
FOUR_BARE = re.compile(rf"\s*({NUMBER})\s*,\s*({NUMBER})\s*,\s*({NUMBER})\s*,\s*({NUMBER})\s*\.?\s*")
CORNER_PAIR = re.compile(
    rf"\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)\s*,?\s*(?:and\s+|to\s+)?\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)"
)
TOKENS = re.compile(r"<\|?/?(?:box|bbox|box_start|box_end|object_ref_start|object_ref_end)\|?>")
FRAME_KEY = re.compile(r"\s*[-+]?\d{1,15}(?:\.\d{1,15})?\s*")
SYSTEMS = ("pixel", "norm1000", "norm1")
MAX_BOXES = 100
MAX_POINTS = 1000


class BadShape(ValueError):
    """What should be a box, a point or a track is not."""


def number(value: Any) -> float:
    """A finite number from Num or numeric text. Raises BadShape for booleans, null, words, NaN and overflow."""
    if isinstance(value, Num):
        result = value.value
    elif isinstance(value, str) and re.fullmatch(NUMBER, value.strip()) and len(value) <= 400:
        result = float(value)
    else:
        raise BadShape(f"{value!r} is not a number")
    if not math.isfinite(result):
        raise BadShape("not finite")
    return result


def read_box(value: Any) -> Box:
    """[x1, y1, x2, y2] or {x1, y1, x2, y2} with x2 > x1 and y2 > y1; corners are never swapped. Raises BadShape."""
    if isinstance(value, Obj):
        if any(len(value.get(name)) != 1 for name in CORNERS):
            raise BadShape("not one of each corner")
        value = [value.get(name)[0] for name in CORNERS]
    if not isinstance(value, list) or len(value) != 4:
        raise BadShape("not four numbers")
    x1, y1, x2, y2 = [float(item[0]) if type(item) is Num and len(item[0]) < 300 else number(item) for item in value]
    if not math.isfinite(x1 + y1 + x2 + y2):
        raise BadShape("not finite")
    if x2 <= x1 or y2 <= y1:
        raise BadShape("no area, or corners in the wrong order")
    return x1, y1, x2, y2


def read_boxes(value: Any) -> list[Box]:
    """The boxes of a value: one box, a list of boxes, an object with a box key. Duplicates merged. Raises BadShape."""
    found = _collect(value, 0)
    if not found or len(set(found)) > MAX_BOXES:
        raise BadShape(f"{len(set(found))} boxes")
    return list(dict.fromkeys(found))


def _collect(value: Any, depth: int) -> list[Box]:
    if depth > 4:
        raise BadShape("nested too deep")
    if isinstance(value, Obj):
        if value.repeats() and any(len(value.get(name)) > 1 for name in (*BOX_KEYS, *CORNERS)):
            raise Several("repeated key")
        held = value.get(*BOX_KEYS)
        if held:
            return [box for item in held for box in _collect(_text_value(item), depth + 1)]
        if value.get(*CORNERS):
            return [read_box(value)]
        raise BadShape("no box key")
    if isinstance(value, list) and value and all(isinstance(item, (list, Obj)) for item in value):
        if len(value) == 2 and all(isinstance(item, list) and len(item) == 2 for item in value):
            return [read_box([*value[0], *value[1]])]  # [(x1, y1), (x2, y2)]
        if len(value) > 10 * MAX_BOXES:
            raise BadShape("too many boxes")
        return [box for item in value for box in _collect(item, depth + 1)]
    return [read_box(value)]


def _text_value(value: Any) -> Any:
    """A box written as text inside JSON ("[1, 2, 3, 4]")."""
    if isinstance(value, str):
        inner = find_values(value)
        if len(inner) == 1:
            return inner[0][0]
    return value


def read_box_text(text: str, place: str = "block") -> Reading:
    """All boxes of an answer as a tuple, sorted (the order of boxes says nothing)."""
    try:
        text = " ".join(without_lead(peel(TOKENS.sub(" ", clean(text)))).split())
        bare = FOUR_BARE.fullmatch(text)
        if bare:
            found = [read_box([Num(part) for part in bare.groups()])]
        else:
            found = []
            rest = CORNER_PAIR.sub(lambda match: f"[{','.join(match.groups())}]", text) if text.count("(") > 1 else text
            for value, _, _ in find_values(rest):
                if isinstance(value, list) and len(value) < 2 and place != "gold" and not _nested(value):
                    continue  # "(a)" or "[3]" in prose
                found += read_boxes(value)
                if len(found) > 10 * MAX_BOXES:
                    break
            if not found:
                return NO_ANSWER if not re.search(r"[\[{(]", text) else MALFORMED
    except Several:
        return SEVERAL
    except (BadShape, NotJson):
        return MALFORMED
    unique = tuple(sorted(set(found)))
    if len(unique) > MAX_BOXES:
        return SEVERAL
    return Reading(unique, key=unique)


def _nested(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], (list, Obj))


BOX_TASK = Task(read=read_box_text, kind="long")


def read_gold_boxes(gold: Any) -> tuple[Box, ...]:
    """Raises ValueError when the gold holds no box, a reversed one or one without area."""
    if isinstance(gold, (list, dict)):
        try:
            return tuple(read_boxes(from_native(gold)))
        except (ValueError, NotJson) as error:
            raise ValueError(f"answer is no box [x1, y1, x2, y2] with x2 > x1 and y2 > y1: {error}") from error
    if not isinstance(gold, str):
        raise ValueError(f"a box must be text, a list or an object, got {gold!r}")
    reading = read_box_text(gold, "gold")
    if reading.value is None:
        raise ValueError(f"answer {gold!r} is no box [x1, y1, x2, y2] with x2 > x1 and y2 > y1")
    return reading.value


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two continuous boxes, no +1, no clipping to a frame; 0 when an area overflows.

    >>> box_iou((0, 0, 10, 10), (5, 0, 15, 10))
    0.3333333333333333
    """
    a1, b1, a2, b2 = one
    c1, d1, c2, d2 = other
    width = (a2 if a2 < c2 else c2) - (a1 if a1 > c1 else c1)
    height = (b2 if b2 < d2 else d2) - (b1 if b1 > d1 else d1)
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    union = (a2 - a1) * (b2 - b1) + (c2 - c1) * (d2 - d1) - both
    if not 0 < union < math.inf:
        return 0.0
    return min(1.0, both / union)


def scale_of(extra: dict[str, Any]) -> tuple[Point, Point]:
    """((sx, sy) for predictions, (sx, sy) for the gold): factors into one common system (SG4).

    Equal or undeclared systems give (1, 1) twice: values never decide the system. Raises ValueError for an unknown
    name or for missing sizes where pixels meet normalised coordinates.
    """
    asked, stored = extra.get("coord"), extra.get("gt_coord")
    for field_name, system in (("coord", asked), ("gt_coord", stored)):
        if system is not None and system not in SYSTEMS:
            raise ValueError(f"{field_name} must be one of {', '.join(SYSTEMS)}, got {system!r}")
    asked, stored = asked or stored, stored or asked
    if asked == stored:
        return (1.0, 1.0), (1.0, 1.0)
    unit = {"norm1000": 1000.0, "norm1": 1.0}
    if "pixel" not in (asked, stored):
        return (1 / unit[asked],) * 2, (1 / unit[stored],) * 2
    size = []
    for name in ("width", "height"):
        value = extra.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} of the source is needed to compare {asked} with {stored}, got {value!r}")
        size.append(float(value))
    factors = [
        (1.0, 1.0) if system == "pixel" else (size[0] / unit[system], size[1] / unit[system])
        for system in (asked, stored)
    ]
    return factors[0], factors[1]


def scaled(box: Sequence[float], factor: Point) -> tuple[float, ...]:
    """A box or a point times (sx, sy)."""
    if factor == (1.0, 1.0):
        return tuple(box)
    return tuple(value * factor[place % 2] for place, value in enumerate(box))


def score_boxes(predicted: Sequence[Box], gold: Sequence[Box], extra: dict[str, Any]) -> float | None:
    """SG6: best one-to-one matching, sum of IoU / max(n_pred, n_gt). None: several boxes for one (no answer)."""
    ours, theirs = scale_of(extra)
    predicted = [scaled(box, ours) for box in predicted]
    gold = [scaled(box, theirs) for box in gold]
    if len(gold) == 1 and len(predicted) > 1:
        return None
    overlap = [[box_iou(box, other) for other in predicted] for box in gold]
    return best_matching(overlap) / max(len(predicted), len(gold))


def best_matching(gain: list[list[float]]) -> float:
    """Largest sum of a one-to-one matching of rows and columns (Kuhn 1955, in the shortest-path form, O(n^2 m))."""
    if len(gain) > len(gain[0]):
        gain = [list(column) for column in zip(*gain)]
    rows, columns = len(gain), len(gain[0])
    row_price, column_price = [0.0] * (rows + 1), [0.0] * (columns + 1)
    matched, way = [0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        matched[0], column = row, 0
        least, used = [math.inf] * (columns + 1), [False] * (columns + 1)
        while matched[column]:
            used[column] = True
            current, delta, following = matched[column], math.inf, 0
            for other in range(1, columns + 1):
                if used[other]:
                    continue
                cost = -gain[current - 1][other - 1] - row_price[current] - column_price[other]
                if cost < least[other]:
                    least[other], way[other] = cost, column
                if least[other] < delta:
                    delta, following = least[other], other
            for other in range(columns + 1):
                if used[other]:
                    row_price[matched[other]] += delta
                    column_price[other] -= delta
                else:
                    least[other] -= delta
            column = following
        while column:
            matched[column] = matched[way[column]]
            column = way[column]
    return math.fsum(gain[matched[column] - 1][column - 1] for column in range(1, columns + 1) if matched[column])


@lru_cache(maxsize=65_536)
def second_of(key: str) -> float | None:
    """The second that a frame key names, None when it is no number (ST3)."""
    return float(key) if FRAME_KEY.fullmatch(key) else None


def read_track(value: Any) -> dict[float, Box]:
    """Second -> box of an object keyed by numbers. A bad box, or one second with two boxes, is missing (ST3, TR2).

    Raises BadShape when the value is no object.
    """
    if not isinstance(value, Obj):
        raise BadShape("boxes must be an object keyed by second")
    track: dict[float, Box] = {}
    spoilt: set[float] = set()
    for key, item in value.pairs:
        second = second_of(key)
        if second is None:
            continue
        try:
            flat = type(item) is list and len(item) == 4 and not isinstance(item[0], (list, Obj))
            found = [read_box(item)] if flat else read_boxes(item)
        except (ValueError, NotJson):
            spoilt.add(second)
            continue
        if len(found) != 1 or track.get(second, found[0]) != found[0]:
            spoilt.add(second)
        track[second] = found[0]
    return {second: box for second, box in track.items() if second not in spoilt} if spoilt else track


def read_gold_track(value: Any) -> dict[float, Box]:
    """A track in which every frame must be readable. Raises ValueError naming the frame."""
    track = read_track(value)
    bad = [key for key, _ in value.pairs if second_of(key) not in track]
    if bad:
        raise ValueError(f"answer has no valid box [x1, y1, x2, y2] at {', '.join(map(repr, bad[:5]))}")
    return track


def track_iou(predicted: dict[float, Box], gold: dict[float, Box], extra: dict[str, Any]) -> float:
    """Sum of box IoU over the gold's frames, missing = 0, divided by the number of gold frames (ST1, TR1)."""
    ours, theirs = scale_of(extra)
    same = ours == theirs == (1.0, 1.0)
    total = math.fsum(
        box_iou(predicted[second], box) if same else box_iou(scaled(predicted[second], ours), scaled(box, theirs))
        for second, box in gold.items()
        if second in predicted
    )
    return total / len(gold)


def only_object(text: str) -> Obj | list[Any] | None:
    """The one object (or, failing that, the one list) of a text; identical repeats are one. Raises Several, NotJson."""
    found = [value for value, _, _ in find_values(text)]
    objects = [value for value in found if isinstance(value, Obj)]
    if len(objects) > 1 and len({_frozen(value) for value in objects}) > 1:
        raise Several("two objects")
    if objects:
        first = objects[0]
        inner = first.get("answer", "final_answer")
        return inner[0] if len(first.pairs) == 1 and inner and isinstance(inner[0], Obj) else first
    lists = [value for value in found if (isinstance(value, list) and len(value) > 1) or _wrapped(value)]
    if len(lists) > 1 and len({_frozen(value) for value in lists}) > 1:
        raise Several("two lists")
    if lists and _wrapped(lists[0]):
        return lists[0][0]
    return lists[0] if lists else None


def _wrapped(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], Obj)


def _frozen(value: Any) -> str:
    return re.sub(
        r"Num\(text='([-+]?[\d.eE+-]+)'\)",
        lambda found: repr(float(found[1])) if len(found[1]) < 50 else found[1],
        repr(value),
    )


__all__ = ["BOX_TASK", "box_iou", "boxes", "read_box_text", "read_boxes", "read_track", "scale_of", "score_boxes"]
