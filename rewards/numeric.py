"""Numbers (RULES sections 5 and 6): exactly one value is read; numerical, REC and regression compare it.

Values are exact (`Fraction` of the written decimal), so that rounding to two places, half to even, is that of the
text and not of its nearest double.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from rewards.extraction import (
    CHOOSING,
    HEDGE,
    MALFORMED,
    NO_ANSWER,
    PATTERN_WORDS,
    SEVERAL,
    STATEMENT,
    Reading,
    Several,
    Task,
    boxes,
    clean,
    peel,
    without_lead,
)
from rewards.number_words import read_number_words
from rewards.units import UNITS, Unit, read_unit

MAX_DIGITS = 400
MAX_EXPONENT = 400
MAX_NUMBERS = 200  # more in one answer is a dump, not an answer
THRESHOLDS = np.linspace(0.5, 0.95, 10)

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
VULGAR = re.compile("[¼½¾⅐-⅞↉]")
WRITTEN = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+")
BLOB = re.compile(
    r"(?P<sign>(?:[-+]\s*[$€£¥₹]?(?=[\d.])|(?<![-+])[-+]+(?=[\d.])))?"
    r"(?P<digits>(?<![A-Za-z_\d])(?:\d[\d.,_]*|\.\d[\d.,_]*))(?P<exp>[eE][-+]?\d+(?![\w.]))?"
)
POWER = re.compile(r"\s*(?:x|X|×|\*|·|⋅)\s*10\s*(?:\^|\*\*)\s*\{?\(?\s*([-+]?\d{1,6})\s*\)?\}?")
TEN_POWER = re.compile(r"(?:\^|\*\*)\s*\{?\(?\s*([-+]?\d{1,6})\s*\)?\}?")
POWER_STARS = re.compile(r"[\d)}]\s*\*\*\s*[-+\d({]")
RAISED = re.compile(r"\s*(?:\^|\*\*)")
DENOMINATOR = re.compile(r"\s*/\s*(\d[\d.,]*)(?!\s*/\s*\d)")
MINUS_WORD = re.compile(r"(?:\bminus|\bnegative)\s+[$€£¥₹]?\Z", re.IGNORECASE)
PERCENT = re.compile(r"\s*(?:%|percent\b|per\s+cent\b|pct\b)", re.IGNORECASE)
ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.IGNORECASE)
SCALE = re.compile(r"\s*(hundred|thousand|million|billion|trillion)s?\b", re.IGNORECASE)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
REFUSED = re.compile(
    r"\d\s*:\s*\d|±|\\pm\b|\+/-|\b\d+\s*/\s*\d+\s*/\s*\d|\b\d{4}-\d{1,2}-\d{1,2}\b|\b0[xX][0-9a-fA-F]|\bnan\b|\binf(?:inity)?\b",
    re.IGNORECASE,
)
BOUND = re.compile(
    r"[≥≤≧≦]|[<>]\s*(?:=\s*)?[-+]?[$€£]?[\d.]|\\(?:geq?|leq?)\b|\b(?:at least|at most|more than|less than|fewer than"
    r"|greater than|larger than|no more than|no less than|no fewer than|up to|or more|or less|or fewer|minimum of|maximum of)\b"
    r"|(?:\A|\b(?:is|are|was|were)\s+)(?:over|under|above|below)\s+[$€£]?\d|\d\s*\+(?!\s*[\d.(])",
    re.IGNORECASE,
)
TOTAL = re.compile(r"\bso\b[,，]?\s*|\bin\s+total\b[,，:：]?\s*", re.IGNORECASE)

PATTERN_WORDS[TOTAL] = ("so", "in total", "in  total")


@dataclass(frozen=True)
class Number:
    """A value as written: 50 with `percent`, or with the unit that stands after it (None: none known)."""

    value: Fraction
    percent: bool = False
    unit: Unit | None = None

    def __str__(self) -> str:
        whole = str(self.value) if self.value.denominator == 1 else repr(_float(self.value))
        return whole + ("%" if self.percent else "")


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _latex(text: str) -> str:
    """LaTeX, superscripts and fractions in the plain spelling that the reader knows."""
    if text.isascii():
        return _latex_ascii(text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^" + found[0].translate(SUPERSCRIPTS), text)
    text = re.sub("(?<=\\d)(?=[¼½¾⅐-⅞↉])", " ", text)
    text = VULGAR.sub(lambda found: unicodedata.normalize("NFKC", found[0]).replace("⁄", "/") + " ", text)
    return _latex_ascii(text)


def _latex_ascii(text: str) -> str:
    if "**" in text and not POWER_STARS.search(text):
        text = text.replace("**", "")  # bold inside prose
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").replace("−", "-").replace("﹣", "-")
    if "\\" in text:
        text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)
        text = re.sub(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}", r"\1/\2 ", text)
        text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2 ", text)
        text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(r"\\(?:times|cdot)\b", "×", text)
        text = re.sub(r"\\[,;:! ]|\\quad\b|\\approx\b|\\sim\b|\^\s*\{?\\circ\}?", " ", text).replace("\\%", "%")
    return text


def find_numbers(text: str) -> list[Number] | None:
    """Every number of the text in order, or None when something in it looks like a number and is not one (N5, N8)."""
    if REFUSED.search(text):
        return None
    numbers, at, spans, spans_end = [], 0, [], 0
    while found := BLOB.search(text, at):
        if len(numbers) > MAX_NUMBERS:
            return None
        start, at = found.start(), found.end()
        digits = found["digits"].rstrip(".,") if not re.search(r"\.\.", found["digits"]) else found["digits"]
        if found["digits"].endswith(".") and digits + "." != found["digits"]:
            digits = re.sub(r"[.,]+\Z", "", found["digits"])
        if not found["exp"]:
            at = found.start("digits") + len(digits)
        if not WRITTEN.fullmatch(digits) or len(digits) > MAX_DIGITS:
            return None
        sign = found["sign"] or ""
        signs = sign.count("-") + sign.count("+")
        before = text[max(0, start - 1) : start]
        if ORDINAL.match(text, at):
            continue
        if before in ("^", "{") and re.search(r"[A-Za-z)\d]\s*\^\s*\{?\Z", text[max(0, start - 4) : start]):
            continue  # the exponent of a unit: m^2
        if sign and (before.isalnum() or before in (")", "%", "]") or (sign[-1:] in " " and before == "")):
            sign, signs = "", 0  # 3-5, 10s-20s: a range, no sign
        if signs > 1:
            return None
        value = Fraction(digits.replace(",", "").rstrip(".") or "0")
        exponent = int(found["exp"][1:]) if found["exp"] and len(found["exp"]) < 8 else 0
        if found["exp"] and len(found["exp"]) >= 8:
            return None
        if not found["exp"]:
            power = POWER.match(text, at)
            if power:
                exponent, at = int(power[1]), power.end()
            elif value == 10 and (power := TEN_POWER.match(text, at)):
                exponent, at = int(power[1]) - 1, power.end()
            elif RAISED.match(text, at):
                return None  # 2^3 is a sum to do, not a number
        if abs(exponent) > MAX_EXPONENT:
            return None
        if exponent:
            value *= Fraction(10) ** exponent
        over = DENOMINATOR.match(text, at)
        if over and not exponent:
            below = over[1].rstrip(".,")
            if not WRITTEN.fullmatch(below) or Fraction(below.replace(",", "")) == 0:
                return None
            value /= Fraction(below.replace(",", ""))
            at = over.start(1) + len(below)
            whole = numbers and spans[-1] == "whole" and re.fullmatch(r"\s+", text[spans_end:start]) and value < 1
            if whole and not sign:
                base = numbers.pop()
                spans.pop()
                value = base.value + (value if base.value >= 0 else -value)
        scale = SCALE.match(text, at)
        if scale:
            value, at = value * SCALES[scale[1].lower()], scale.end()
        if "-" in sign or (not sign and MINUS_WORD.search(text, max(0, start - 12), start)):
            value = -value
        if abs(value) > 10**308:
            return None
        percent = PERCENT.match(text, at)
        if percent:
            at = percent.end()
        unit = None if percent else read_unit(text, at)
        numbers.append(Number(value, bool(percent), unit))
        spans.append("whole" if value.denominator == 1 and not percent and not over else "")
        spans_end = at
    return numbers


def read_number(text: str, place: str = "block", declared: Unit | None = None) -> Reading:
    """The one value of a text; several_answers for ranges, lists and bounds (N7), no_answer for none (N8)."""
    try:
        text = peel(clean(text))
        found = boxes(text)
        if len({content.strip() for _, _, content in found}) > 1:
            return SEVERAL
        text = without_lead(peel(_latex(text)))
    except Several:
        return SEVERAL
    if place == "bare" and "\n" in text.strip() and "=" in text:
        return NO_ANSWER  # several lines of work: the first or the last line speaks
    if text.rstrip().endswith("?") or HEDGE.search(text) or BOUND.search(text):
        return NO_ANSWER
    parts = re.split(r"\bor\b", text, flags=re.IGNORECASE) if "=" in text else [text]
    readings = [reading for part in parts if (reading := _one_value(part, declared)).status != "no_answer"]
    if any(reading.key != readings[0].key for reading in readings):
        return SEVERAL
    return readings[0] if readings else NO_ANSWER


def _one_value(text: str, declared: Unit | None) -> Reading:
    equals = re.split(r"(?<![<>!=])=+(?!=)", text)
    words = equals[-1] if len(equals) > 1 else text
    numbers = find_numbers(words)
    if numbers is None:
        return MALFORMED
    spoken = read_number_words(re.sub(BLOB, " # ", words) if numbers else words)
    if spoken is None:
        return SEVERAL
    for value, after in spoken:
        numbers.append(Number(value, bool(PERCENT.match(after)), read_unit(after, 0)))
    if not numbers:
        return NO_ANSWER
    try:
        keys = [(number.percent, in_declared(number, declared)) for number in numbers]
    except ValueError:
        return Reading(None, "no_answer")
    if any(key != keys[0] for key in keys):
        return SEVERAL
    return Reading(numbers[0], key=keys[0])


def in_declared(number: Number, declared: Unit | None) -> Fraction:
    """Value in the declared unit. Raises ValueError when the written unit has another dimension (N10)."""
    if declared is None or declared.dimension == "percent":
        return number.value
    if number.percent and declared.dimension != "percent":
        raise ValueError("percent is no unit of " + declared.dimension)
    if number.unit is None or number.unit is declared:
        return number.value
    if number.unit.dimension != declared.dimension:
        raise ValueError(f"{number.unit.dimension} is not {declared.dimension}")
    return (number.value * number.unit.factor + number.unit.offset - declared.offset) / declared.factor


def number_task(declared: Unit | None) -> Task:
    def read(text: str, place: str) -> Reading:
        return read_number(text, place, declared)

    return Task(read=read, kind="short", statements=(STATEMENT, CHOOSING, TOTAL))


def declared_unit(extra: dict[str, Any]) -> Unit | None:
    """The sample's unit; an unknown name is a dimension of its own. Raises ValueError if it is no text."""
    name = extra.get("unit")
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"unit must be a text such as m, s, kg or percent, got {name!r}")
    key = name.strip()
    if key.casefold() in ("percent", "%", "percentage", "pct"):
        return Unit("percent", Fraction(1))
    return UNITS.get(key) or UNITS.get(key.casefold()) or Unit(key.casefold(), Fraction(1))


def read_tolerance(extra: dict[str, Any]) -> tuple[str, Fraction] | None:
    """("rel" | "abs", bound). Raises ValueError for anything else."""
    given = extra.get("tolerance")
    if given is None:
        return None
    if isinstance(given, dict) and len(given) == 1:
        kind, bound = next(iter(given.items()))
        usable = isinstance(bound, (int, float)) and not isinstance(bound, bool) and math.isfinite(bound) and bound >= 0
        if kind in ("rel", "abs") and usable:
            return kind, Fraction(str(bound))
    raise ValueError(f'tolerance must be {{"rel": x}} or {{"abs": x}} with x >= 0, got {given!r}')


def read_gold(gold: Any, declared: Unit | None = None, integer: bool = False) -> Reading:
    """The gold's one finite value. Raises ValueError when there is none, or (REC) it is no integer."""
    if isinstance(gold, bool) or not isinstance(gold, (int, float, str)):
        raise ValueError(f"a numeric answer must be a number or a text with one number, got {gold!r}")
    if isinstance(gold, float) and not math.isfinite(gold):
        raise ValueError(f"answer {gold!r} is not finite")
    reading = read_number(gold if isinstance(gold, str) else repr(gold), "gold", declared)
    if reading.value is None:
        raise ValueError(f"answer {gold!r} does not hold exactly one number ({reading.status})")
    if integer and reading.value.value.denominator != 1:
        raise ValueError(f"answer {gold!r} of a count must be an integer")
    return reading


def same_scale(number: Number, other: Number, declared: Unit | None) -> Fraction:
    """Value of `number` in the scale of `other`: percentages and units resolved (N4, N10). Raises ValueError."""
    if declared is not None and declared.dimension == "percent":
        return number.value
    if number.percent and (other.percent or abs(other.value) <= 1):
        return number.value / 100
    return number.value if number.percent and declared is None else in_declared(number, declared)


def score_number(reading: Reading, gold: Reading, extra: dict[str, Any]) -> float:
    """N2: equal after rounding to two places and within 5 %; or the sample's own tolerance."""
    declared = declared_unit(extra)
    try:
        value = same_scale(reading.value, gold.value, declared)
        target = same_scale(gold.value, reading.value, declared)
    except ValueError:
        return 0.0
    if value == target:
        return 1.0
    tolerance = read_tolerance(extra)
    if tolerance:
        kind, bound = tolerance
        return float(abs(value - target) <= (bound * abs(target) if kind == "rel" else bound))
    near = target == 0 or abs(value - target) * 20 <= abs(target)
    return float(near and round(value, 2) == round(target, 2))


def score_regression(reading: Reading, gold: Reading, extra: dict[str, Any]) -> float:
    """R1: share of the ten thresholds that |p - t| / |t| satisfies, in float64 as the VSI-Bench code does it."""
    declared = declared_unit(extra)
    try:
        value = float(same_scale(reading.value, gold.value, declared))
        target = float(same_scale(gold.value, reading.value, declared))
    except (ValueError, OverflowError):
        return 0.0
    return relative_accuracy(value, target)


def relative_accuracy(value: float, target: float) -> float:
    """Mean relative accuracy (VSI-Bench, arXiv 2412.14171, section 4.1) of one pair.

    >>> relative_accuracy(3.0, 4.0), relative_accuracy(0.0, 0.0), relative_accuracy(0.1, 0.0)
    (0.6, 1.0, 0.0)
    """
    if target == 0:
        return float(value == 0)
    error = abs(value - target) / abs(target)
    if not math.isfinite(error):
        return 0.0
    return float((error <= 1 - THRESHOLDS).mean())
