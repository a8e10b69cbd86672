"""Mathematical equality (RULES section 8): math-verify in a killable child, behind a guard against cost."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

from rewards import killable
from rewards.extraction import (
    CHOOSING,
    EMPTY,
    NO_ANSWER,
    SEVERAL,
    STATEMENT,
    Reading,
    Several,
    Task,
    boxes,
    clean,
    is_blank,
    peel,
    without_lead,
    without_mark,
)

LIMIT_S = 4.0  # of processor time, 5 on the clock: what is left of 6 s is for the start of a child
MAX_CHARS = 2_000
MAX_EXPONENT = 10_000
TERMS = 10_000

# fmt: off
KNOWN_CALLS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh", "cosh",
    "tanh", "log", "ln", "lg", "exp", "sqrt", "cbrt", "abs", "max", "min", "gcd", "lcm", "det", "mod", "floor",
    "ceil", "frac", "binom", "operatorname", "left", "right", "big", "bigl", "bigr", "mathrm", "text", "vec", "arg",
    "deg", "dim", "ker", "lim", "sup", "inf", "sign", "sgn", "rank", "tr", "pi", "theta", "alpha", "beta", "gamma",
    "delta", "phi", "omega", "lambda", "mu", "cdot", "times", "div", "pm", "and", "or", "in",
}
# fmt: on
WORDS_ALLOWED = KNOWN_CALLS | {"infty", "dx", "dy", "dt", "cm", "mm", "km", "kg", "ms", "hours", "degrees", "units"}
RAISED = r"(?:\^|\*\*)"
EXPONENT = re.compile(rf"{RAISED}\s*[\{{\(]*\s*[-+]?\s*(\d+)")
TOWER = re.compile(
    rf"{RAISED}\s*[-+]?\s*\d+(?:\.\d+)?\s*{RAISED}"  # a**9**9
    rf"|{RAISED}\s*[\{{\(][^\{{\}}\(\)A-Za-z]*{RAISED}"  # a^{{9^9}}, a**(10**9)
    rf"|\([\d\s.+\-*/]*{RAISED}[^()A-Za-z]*\)\s*{RAISED}"  # (9^9)^9
    rf"|\{{[\d\s.+\-*/]*{RAISED}[^A-Za-z]*\}}\s*{RAISED}"
)
FACTORIAL = re.compile(r"(\d+)\s*\)*\s*!|factorial\s*\(?\s*(\d+)|!\s*!\s*!")
SERIES = re.compile(r"\\(?:sum|prod)\b|\b(?:Sum|Product|sum|prod|summation|product)\s*\(")
CALL = re.compile(r"(?<![\\A-Za-z])([A-Za-z_]{2,})\s*\(")
MATH_MARKS = re.compile(r"\$|\\\(|\\\[|\\begin\{|\\boxed")


class Refused(ValueError):
    """The expression is too costly to evaluate (M3)."""


def guard(text: str) -> None:
    """Raises Refused for what could cost too much or is no mathematics, before anything is evaluated."""
    if len(text) > MAX_CHARS:
        raise Refused(f"longer than {MAX_CHARS} characters")
    if "__" in text or "lambda:" in text:
        raise Refused("dunder name")
    if text.count("{") > 100 or text.count("(") > 100 or text.count("[") > 100:
        raise Refused("nested too deep")
    if TOWER.search(text):
        raise Refused("nested powers")
    if any(len(number) > 5 or int(number) > MAX_EXPONENT for number in EXPONENT.findall(text)):
        raise Refused("exponent")
    for found in FACTORIAL.finditer(text):
        number = found[1] or found[2]
        if number is None or len(number) > 5 or int(number) > MAX_EXPONENT:
            raise Refused("factorial")
    if re.search(r"factorial\s*\([^)]*[*^]|[\}\)]\s*!", text) and re.search(rf"\d\s*{RAISED}", text):
        raise Refused("factorial of a power")
    if SERIES.search(text) and (
        any(len(number) > 5 or int(number) > TERMS for number in re.findall(r"\d+", text))
        or re.search(rf"\^\s*\{{[^{{}}]*\d\s*{RAISED}", text)
        or re.search(rf"\d+\s*{RAISED}\s*\{{?\s*\d+\}}?\s*\}}", text)
    ):
        raise Refused("series of too many terms")
    for name in CALL.findall(text):
        if name.lower() not in KNOWN_CALLS:
            raise Refused(f"call of {name}")


def wrapped(text: str) -> str:
    """As `$…$` unless it has math delimiters of its own."""
    return text if MATH_MARKS.search(text) else f"${text}$"


def equal_in_child(gold: str, answer: str) -> bool:
    """math-verify's verdict, gold first. Runs in rewards/child.py, which the caller kills."""
    from math_verify import parse, verify

    given = parse(wrapped(answer), parsing_timeout=None)
    return bool(verify(_parsed_gold(gold), given, timeout_seconds=None))


@lru_cache(maxsize=256)
def _parsed_gold(gold: str) -> list[Any]:
    """Once for all responses to a sample: half of the time of a comparison."""
    from math_verify import parse

    return parse(wrapped(gold), parsing_timeout=None)


def normal(text: str) -> str:
    """Blanks removed: what two spellings of one block share (G8), never the verdict on equality."""
    return re.sub(r"\s+|\\[,;:! ]", "", text).rstrip(".").removeprefix("$").removesuffix("$")


def read_math(text: str, place: str = "block") -> Reading:
    """The expression of an answer. In untagged text only a line that is nothing but an expression counts."""
    found = boxes(text)
    distinct = list(dict.fromkeys(normal(content) for _, _, content in found))
    if len(distinct) > 1:
        return SEVERAL
    try:
        value = peel(clean(found[0][2] if found and place != "gold" else text))
        value = without_mark(without_lead(value))
        value = peel(value)
    except Several:
        return SEVERAL
    if is_blank(value):
        return EMPTY
    if place in ("bare", "statement"):
        if place == "bare" and "\n" in value:
            return NO_ANSWER
        if not is_expression(value):
            return NO_ANSWER
    return Reading(value, key=normal(value))


def is_expression(text: str) -> bool:
    """No prose: every word of two letters or more is the name of a function or of a LaTeX command."""
    if len(text) > MAX_CHARS:
        return False
    plain = re.sub(r"\\(?:text|mathrm|textbf)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    if not re.search(r"[A-Za-z0-9]", plain) and "\\" not in text:
        return False
    if text.endswith(("?", "？")):
        return False
    words = re.findall(r"[A-Za-z]{2,}", plain)
    return all(word.lower() in WORDS_ALLOWED for word in words) and not re.search(r"[A-Za-z]\s+[a-z]\s+[a-z]\b", plain)


TASK = Task(read=read_math, kind="text", statements=(STATEMENT, CHOOSING))


def read_gold(gold: Any) -> str:
    """The gold as an expression. Raises ValueError for a blank, a list, a boolean or one that the guard refuses."""
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        raise ValueError(f"a math answer must be text or a number, got {gold!r:.200}")
    if isinstance(gold, float) and not math.isfinite(gold):
        raise ValueError(f"answer {gold!r} is not finite")
    return _read_gold_text(gold if isinstance(gold, str) else repr(gold))


@lru_cache(maxsize=4096)
def _read_gold_text(gold: str) -> str:
    reading = read_math(gold, "gold")
    if reading.value is None:
        raise ValueError(f"answer {gold!r:.200} is empty")
    try:
        guard(reading.value)
    except Refused as error:
        raise ValueError(f"answer {gold!r:.200} cannot be evaluated: {error}") from error
    return reading.value


def is_letter(gold: Any) -> bool:
    """M4: the gold is a single letter, read as an option."""
    return isinstance(gold, str) and bool(re.fullmatch(r"[A-Za-z]", peel(gold)))


def parts(text: str) -> int:
    """How many values a text lists: parts joined by "or", "and" or commas outside brackets and numbers."""
    plain = re.sub(r"\\(?:text|mathrm)\s*\{\s*(or|and)\s*\}", r" \1 ", text)
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    depth, count = 0, 1
    for found in re.finditer(r"[\(\[{]|[\)\]}]|,|;|\bor\b|\band\b", plain):
        if found[0] in "([{":
            depth += 1
        elif found[0] in ")]}":
            depth -= 1
        elif depth == 0:
            count += 1
    return count


def score_math(answer: str, gold: str, limit_s: float = LIMIT_S) -> tuple[float, str]:
    """(accuracy, status). The worker is killed after `limit_s` seconds of parsing and comparing."""
    if normal(answer) == normal(gold):
        return 1.0, "ok"
    try:
        guard(answer)
    except Refused:
        return 0.0, "refused_cost"
    if parts(answer) > 1 and parts(gold) == 1 and not gold.lstrip("$ \\").startswith(("{", "(", "[")):
        return 0.0, "several_answers"
    try:
        result = killable.call("math", [gold, answer], limit_s)
    except killable.Killed as error:
        return 0.0, "timeout" if error.reason == "timeout" else "malformed"
    return (1.0, "ok") if result is True else (0.0, "ok" if result is False else "malformed")
