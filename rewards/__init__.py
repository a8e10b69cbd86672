"""Rewards: one extraction and one metric per problem type, for training, evaluation and anybody who imports it.

    from rewards import score
    score("multiple choice", "<think>…</think><answer>B</answer>", "B", {"options": ["A. red", "B. blue"]})
    # Score(accuracy=1.0, format=1.0, status='ok', extracted='B')

Importable without torch. docs/rewards.md has every type with its fields, prompt, spellings, formula and source.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data.records import PROBLEM_TYPES, Sample, canonical_problem_type
from rewards import (
    choice,
    geometry,
    grounding,
    mathematics,
    numeric,
    page,
    preference,
    program,
    source,
    spans,
    svg,
    text,
    verdict,
)
from rewards.extraction import COMMAND, Reading, Task, answer_blocks, clean, closes_at_end, fenced, find_answer
from rewards.format import format_mode, format_reward

# A reward never depends on what happens to be installed: what some type needs is an error at start, for all.
MISSING = [
    name
    for name in ("math_verify", "nltk", "jiwer", "resvg_py", "html5lib", "PIL")
    if not importlib.util.find_spec(name)
]
if MISSING:
    raise ModuleNotFoundError(f"rewards need {', '.join(MISSING)}: install the rewards part of requirements-cpu.txt")


@dataclass(frozen=True)
class Score:
    """What one response earned. `status`: ok, or why it scored 0 (empty, no_answer, several_answers, truncated,
    malformed, refused_cost, timeout, bad_ground_truth)."""

    accuracy: float
    format: float
    status: str
    extracted: str | None = None


@dataclass(frozen=True)
class Reward:
    """A problem type's extractor and metric.

    read_gold(gold, extra) -> gold value; raises ValueError for a gold, options or a declaration that cannot be used.
    task(gold, extra) -> the reader of the answer.
    metric(reading, gold, extra) -> accuracy, or (accuracy, status).
    """

    read_gold: Callable[[Any, dict[str, Any]], Any]
    task: Callable[[Any, dict[str, Any]], Task]
    metric: Callable[[Reading, Any, dict[str, Any]], float | tuple[float, str]]
    show: Callable[[Any], str] = str


# multiple choice ------------------------------------------------------------------------------------------------------


def _choice_gold(gold: Any, extra: dict[str, Any]) -> tuple[Reading, choice.Options]:
    given = extra.get("options")
    if isinstance(gold, str) and isinstance(given, (list, tuple)) and all(isinstance(item, str) for item in given):
        return _choice_gold_text(gold, tuple(given))  # read once for all responses to a sample
    options = choice.read_options(given)
    return choice.read_gold(gold, options), options


@lru_cache(maxsize=4096)
def _choice_gold_text(gold: str, given: tuple[str, ...]) -> tuple[Reading, choice.Options]:
    options = choice.read_options(given)
    return choice.read_gold(gold, options), options


def _choice_task(gold: tuple[Reading, choice.Options], extra: dict[str, Any]) -> Task:
    reading, options = gold
    return choice.choice_task(options, text_gold=isinstance(reading.value, tuple))


MULTIPLE_CHOICE = Reward(
    _choice_gold,
    _choice_task,
    lambda reading, gold, extra: choice.score_choice(reading, gold[0]),
    lambda value: value[1] if isinstance(value, tuple) else value,
)


# numbers --------------------------------------------------------------------------------------------------------------


def _number_gold(integer: bool) -> Callable[[Any, dict[str, Any]], Reading]:
    read_text = lru_cache(maxsize=4096)(numeric.read_gold)

    def read(gold: Any, extra: dict[str, Any]) -> Reading:
        numeric.read_tolerance(extra)
        return (read_text if isinstance(gold, str) else numeric.read_gold)(gold, numeric.declared_unit(extra), integer)

    return read


def _number_task(gold: Reading, extra: dict[str, Any]) -> Task:
    return numeric.number_task(numeric.declared_unit(extra))


NUMERICAL = Reward(_number_gold(False), _number_task, numeric.score_number)
COUNT = Reward(_number_gold(True), _number_task, numeric.score_number)
REGRESSION = Reward(_number_gold(False), _number_task, numeric.score_regression)
BOOLEAN = Reward(
    lambda gold, extra: verdict.read_gold(gold),
    lambda gold, extra: verdict.TASK,
    lambda reading, gold, extra: verdict.score_verdict(reading, gold),
    lambda value: "yes" if value else "no",
)


# math -----------------------------------------------------------------------------------------------------------------


def _math_gold(gold: Any, extra: dict[str, Any]) -> Any:
    if mathematics.is_letter(gold):
        return _choice_gold(gold, extra)
    return mathematics.read_gold(gold)


def _math_metric(reading: Reading, gold: Any, extra: dict[str, Any]) -> float | tuple[float, str]:
    if isinstance(gold, tuple):
        return choice.score_choice(reading, gold[0])
    return mathematics.score_math(reading.value, gold)


MATH = Reward(
    _math_gold,
    lambda gold, extra: _choice_task(gold, extra) if isinstance(gold, tuple) else mathematics.TASK,
    _math_metric,
)


# text -----------------------------------------------------------------------------------------------------------------


def _ocr_gold(gold: Any, extra: dict[str, Any]) -> str:
    text.ocr_metric(extra)
    return _read_text_gold(gold)


def _read_text_gold(gold: Any) -> str:
    value = clean_gold(text.gold_text(gold))
    if not value:
        raise ValueError(f"answer {gold!r:.200} is empty")
    reading = text.text_task(value).read(value, "gold")
    if reading.value is None:
        raise ValueError(f"answer {gold!r:.200} is empty")
    return value


ANSWER_KINDS = {"interval": 0.7, "box": 0.5, "number": None}  # official VCR-Bench bounds: IoU above them is correct


def _open_gold(gold: Any, extra: dict[str, Any]) -> Any:
    kind = extra.get("answer_kind")
    if kind is not None and kind not in (*ANSWER_KINDS, "text"):
        raise ValueError(f"answer_kind must be interval, box, number or text, got {kind!r}")
    if kind == "number":
        return NUMERICAL.read_gold(gold, extra)
    if kind == "interval":
        return spans.read_gold_spans(gold)
    if kind == "box":
        geometry.scale_of(extra)
        return geometry.read_gold_boxes(gold)
    value = _read_text_gold(gold)
    if value == "None":
        raise ValueError("answer is the placeholder None")
    if not text.tokens(value):
        raise ValueError(f"answer {gold!r:.200} has no word to compare")
    return value


def _open_task(gold: Any, extra: dict[str, Any]) -> Task:
    kind = extra.get("answer_kind")
    if kind == "number":
        return _number_task(gold, extra)
    return {"interval": spans.SPAN_TASK, "box": geometry.BOX_TASK}.get(kind) or text.text_task(gold)


def _open_metric(reading: Reading, gold: Any, extra: dict[str, Any]) -> float | tuple[float, str]:
    kind = extra.get("answer_kind")
    if kind == "number":
        return numeric.score_number(reading, gold, extra)
    if kind == "interval":
        return float(spans.span_iou(reading.value, gold) > ANSWER_KINDS[kind])
    if kind == "box":
        overlap, status = _box_metric(reading, gold, extra)
        return float(overlap > ANSWER_KINDS[kind]), status
    words = text.tokens(reading.value)
    return text.rouge_l(words, text.tokens(gold)) if words else (0.0, "empty")


def _show_any(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, (list, tuple)) else str(value)


OCR = Reward(
    _ocr_gold,
    lambda gold, extra: text.text_task(gold),
    lambda reading, gold, extra: text.score_ocr(reading.value, gold, extra),
)
OPEN_ENDED = Reward(_open_gold, _open_task, _open_metric, _show_any)


# grounding ------------------------------------------------------------------------------------------------------------


def _box_metric(reading: Reading, gold: Any, extra: dict[str, Any]) -> tuple[float, str]:
    value = geometry.score_boxes(reading.value, gold, extra)
    return (0.0, "several_answers") if value is None else (value, "ok")


def _declared(read: Callable[[Any], Any]) -> Callable[[Any, dict[str, Any]], Any]:
    """Coordinate declarations are checked with the gold; a text that many responses share is read once."""
    read_text = lru_cache(maxsize=4096)(read)

    def check(gold: Any, extra: dict[str, Any]) -> Any:
        geometry.scale_of(extra)
        return read_text(gold) if isinstance(gold, str) else read(gold)

    return check


TEMPORAL = Reward(
    _declared(spans.read_gold_spans),
    lambda gold, extra: spans.SPAN_TASK,
    lambda reading, gold, extra: spans.span_iou(reading.value, gold),
    lambda value: json.dumps(value),
)
SPATIAL = Reward(
    _declared(geometry.read_gold_boxes),
    lambda gold, extra: geometry.BOX_TASK,
    _box_metric,
    lambda value: json.dumps(value),
)
TUBE = Reward(
    _declared(grounding.read_gold_tube),
    lambda gold, extra: grounding.TUBE_TASK,
    lambda reading, gold, extra: grounding.score_tube(reading.value, gold, extra),
    grounding.describe,
)
TRACKING = Reward(
    _declared(grounding.read_gold_tracking),
    lambda gold, extra: grounding.TRACK_TASK,
    lambda reading, gold, extra: geometry.track_iou(reading.value, gold, extra),
    grounding.describe,
)
SEGMENTATION = Reward(
    _declared(grounding.read_gold_region),
    lambda gold, extra: grounding.REGION_TASK,
    lambda reading, gold, extra: grounding.score_region(reading.value, gold, extra),
    grounding.describe,
)


# source code and preference -------------------------------------------------------------------------------------------

CODE_TASK, SVG_TASK, HTML_TASK = (source.source_task(language) for language in ("code", "svg", "html"))
CODE = Reward(
    program.read_gold,
    lambda gold, extra: CODE_TASK,
    lambda reading, gold, extra: program.passes(reading.value, *program.read_tests(extra)),
)
SVG = Reward(
    lambda gold, extra: svg.read_gold(gold),
    lambda gold, extra: SVG_TASK,
    lambda reading, gold, extra: svg.score_svg(reading.value, gold),
)
HTML = Reward(
    lambda gold, extra: page.read_gold(gold),
    lambda gold, extra: HTML_TASK,
    lambda reading, gold, extra: page.score_html(reading.value, gold),
)
PREFERENCE = Reward(
    lambda gold, extra: (preference.preference_task(extra), preference.read_gold(gold))[1],
    lambda gold, extra: preference.preference_task(extra),
    lambda reading, gold, extra: preference.score_preference(reading, gold),
)


CANONICAL: dict[str, Reward] = {
    "multiple choice": MULTIPLE_CHOICE,
    "numerical": NUMERICAL,
    "rec": COUNT,
    "regression": REGRESSION,
    "boolean": BOOLEAN,
    "math": MATH,
    "ocr": OCR,
    "open-ended": OPEN_ENDED,
    "temporal grounding": TEMPORAL,
    "spatial grounding": SPATIAL,
    "spatial-temporal grounding": TUBE,
    "tracking": TRACKING,
    "code": CODE,
    "svg-code": SVG,
    "html-code": HTML,
    "llava": PREFERENCE,
    "segmentation": SEGMENTATION,
    "segmentation_video": SEGMENTATION,
}
# Every accepted name; aliases come from the one table in data/records.py.
REWARDS: dict[str, Reward] = {
    name: CANONICAL[canonical] for canonical, aliases in PROBLEM_TYPES.items() for name in (canonical, *aliases)
}

READS_RAW_GOLD = ("code", "svg-code", "html-code")  # `$` and \boxed mean something else there


def clean_gold(gold: Any) -> Any:
    """G18: content of the last answer block, outer `$`, \\boxed{} and code fence removed, blanks trimmed."""
    return _clean_text(gold) if isinstance(gold, str) else gold


@lru_cache(maxsize=4096)
def _clean_text(gold: str) -> str:
    blocks, _ = answer_blocks(gold)
    value = clean(blocks[-1] if blocks else gold)
    for _ in range(4):
        before = value
        value = (fenced(value) or value).strip()
        for mark in ("$$", "$"):
            if len(value) > 2 * len(mark) and value.startswith(mark) and value.endswith(mark):
                inner = value[len(mark) : -len(mark)]
                value = value if "$" in inner else inner.strip()
        command = COMMAND.match(value) if value.startswith("\\boxed") else None
        if command and closes_at_end(value, command.end() - 1):
            value = value[command.end() : -1].strip()
        if value == before:
            break
    return value


def read_gold(problem_type: str, gold: Any, extra: dict[str, Any]) -> Any:
    """The gold as its reward reads it. Raises ValueError for an unknown type, a bad gold or a bad declaration (G13)."""
    canonical = canonical_problem_type(problem_type)
    if gold is None:
        raise ValueError("answer is missing")
    format_mode(extra)
    if canonical in READS_RAW_GOLD and isinstance(gold, str):
        blocks, _ = answer_blocks(gold)
        gold = blocks[-1] if blocks else gold
    else:
        gold = clean_gold(gold)
    return CANONICAL[canonical].read_gold(gold, extra)


def score(
    problem_type: str,
    response: object,
    ground_truth: Any,
    extra: dict[str, Any] | None = None,
    mode: str = "auto",
) -> Score:
    """Accuracy and format of a response. Never raises on a response; a bad gold gives status bad_ground_truth.

    extra: the sample's own fields, `options` among them. mode: the run's format mode; `extra.format_mode` wins.
    """
    extra = extra or {}
    prefilled = extra.get("think_prefilled") is True
    try:
        form = format_reward(response, format_mode(extra, mode), prefilled)
    except ValueError:
        form = 0.0
    try:
        gold = read_gold(problem_type, ground_truth, extra)
    except ValueError:
        return Score(0.0, form, "bad_ground_truth")
    return score_against(canonical_problem_type(problem_type), response, gold, extra, form, prefilled)


def score_against(
    canonical: str, response: object, gold: Any, extra: dict[str, Any], form: float, prefilled: bool
) -> Score:
    """`score` for a gold that read_gold has read."""
    reward = CANONICAL[canonical]
    task = reward.task(gold, extra)
    reading = find_answer(response, task, prefilled)
    if reading.value is None:
        return Score(0.0, form, reading.status)
    result = reward.metric(reading, gold, extra)
    accuracy, status = result if isinstance(result, tuple) else (result, "ok")
    accuracy = min(1.0, max(0.0, accuracy)) if math.isfinite(accuracy) else 0.0
    extracted = None if status == "several_answers" else reward.show(reading.value)
    return Score(float(accuracy), form, status, extracted)


def check_gold(sample: Sample) -> str | None:
    """None when the sample can be scored, else the reason: for data.dataset.load."""
    extra = dict(sample.extra)
    if sample.options:
        extra["options"] = list(sample.options)
    try:
        read_gold(sample.problem_type, sample.answer, extra)
    except ValueError as error:
        return str(error)
    return None


__all__ = ["REWARDS", "Reward", "Score", "check_gold", "clean_gold", "read_gold", "score"]
