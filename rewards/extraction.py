"""Where the answer is in a response (RULES section 1), the same for training and evaluation.

`find_answer(response, task)` walks: final part after the last </think> -> answer block -> \\boxed{} -> explicit
statement -> the bare final part, and hands each candidate to the task's own reader. The first kind of place that
exists decides; candidates of one kind must agree. Everything is linear in the length of the response.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from rewards.loose_json import NotJson, Num, Obj, read_value

TAIL_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>")
ZERO_WIDTH = dict.fromkeys(
    [
        *(0xAD, 0x61C, 0x180E, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0xFEFF),
        *(*range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x206A)),
    ]
)
THINK_OPEN = re.compile(r"<\s*think\s*>", re.IGNORECASE)
THINK_CLOSE = re.compile(r"<\s*/\s*think\s*>", re.IGNORECASE)
ANSWER_TAG = re.compile(r"<\s*(/\s*)?answer\s*>", re.IGNORECASE)
HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|could be|might be|may be|either|not sure|unsure|uncertain|at least)\b", re.IGNORECASE
)
CONCLUSION = re.compile(r"\b(?:therefore|so|thus|hence|in conclusion|finally|final answer)\b|最终", re.IGNORECASE)
STATEMENT = re.compile(
    r"\b(?:the|my)\s+(?:(?:final|correct|best|right)\s+){0,2}(?:answer|choice|option)\s+(?:is|would\s+be)\b\s*[:：]?"
    r"|\banswer\s+is\b\s*[:：]?"
    r"|\b(?:final\s+|correct\s+|best\s+)?(?:answer|choice)\s*[:：]"
    r"|(?:最终)?答案\s*(?:是|为|[:：])\s*[:：]?",
    re.IGNORECASE,
)
CHOOSING = re.compile(
    r"\bI(?:\s+would|'d|’d|\s+will|'ll|’ll)?\s+(?:choose|select|pick|go\s+with)\b\s*[:：]?",
)
IS_CORRECT = re.compile(
    r"\b(?:is|would\s+be)\s+the\s+(?:(?:correct|best|right)\s+)(?:answer|option|choice)\b", re.IGNORECASE
)
SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|[。！？]")
QUOTES = [('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»")]
CJK_BRACKETS = [("「", "」"), ("『", "』"), ("【", "】"), ("《", "》"), ("〈", "〉"), ("〔", "〕")]
MARKS = [("**", "**"), ("*", "*"), ("__", "__"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
PAIRS = MARKS + QUOTES + CJK_BRACKETS
OPENINGS = {opening[0] for opening, _ in PAIRS} | {"\\", "{", "`"}
COMMAND = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf|textrm)\s*\{")
BOXED = re.compile(r"\\boxed\s*\{")
MAX_STATEMENTS = 8000
MAX_CORRECT = 1000  # "X is the correct answer" in one response
ANSWER_KEYS = ("answer", "final_answer", "choice", "option")
ANSWER_KEY = re.compile(r"\{\s*[\"']?\s*(?:" + "|".join(ANSWER_KEYS) + r")\s*[\"']?\s*[:=]", re.IGNORECASE)


class Several(ValueError):
    """The text gives more than one answer where one was asked for."""


@dataclass(frozen=True)
class Reading:
    """What a reader made of a text: a value, or None with the reason as a status word."""

    value: Any = None
    status: str = "ok"
    key: Hashable = None  # equal keys say the same for the type


NO_ANSWER = Reading(None, "no_answer")
SEVERAL = Reading(None, "several_answers")
MALFORMED = Reading(None, "malformed")
EMPTY = Reading(None, "empty")


@dataclass(frozen=True)
class Task:
    """How one problem type reads an answer. `read(text, place)`; place is block, box, statement, bare or gold."""

    read: Callable[[str, str], Reading]
    kind: str = "text"  # text: X is the line | short: letters, numbers, verdicts | long: JSON and boxes | source: code
    keep: tuple[str, ...] = ()  # wrappers that the gold itself begins with
    statements: tuple[re.Pattern[str], ...] = field(default=(STATEMENT,))


def cut_tail(text: str) -> str:
    """Trailing special tokens and blanks removed, CRLF as LF."""
    text = text.replace("\r\n", "\n").rstrip()
    while text.endswith(TAIL_TOKENS):
        for token in TAIL_TOKENS:
            text = text.removesuffix(token)
        text = text.rstrip()
    return text


def clean(text: str) -> str:
    """Zero-width and direction marks dropped, outer blanks trimmed."""
    return (text if text.isascii() else text.translate(ZERO_WIDTH)).strip()


def is_blank(text: str) -> bool:
    """Nothing but blanks, zero-width characters and punctuation (RULES G9)."""
    return all(mark.isspace() or unicodedata.category(mark)[0] == "P" for mark in clean(text)[:100_000])


def final_part(response: str, prefilled: bool = False) -> str | None:
    """The text after the last </think> (G5); None while the reasoning is still open (G6)."""
    text = cut_tail(response)
    if prefilled:
        text = "<think>" + text
    end = 0
    for found in THINK_CLOSE.finditer(text):
        end = found.end()
    text = text[end:]
    return None if THINK_OPEN.search(text) else text


def answer_blocks(text: str) -> tuple[list[str], bool]:
    """Contents of the complete innermost answer pairs in order, and whether an opened one is left unclosed (G7)."""
    tags = [(found.start(), found.end(), found[1] is not None) for found in ANSWER_TAG.finditer(text)]
    blocks, last = [], -1
    for place in range(len(tags) - 1):
        if not tags[place][2] and tags[place + 1][2]:
            blocks.append(text[tags[place][1] : tags[place + 1][0]])
            last = place + 1
    return blocks, any(not closes for _, _, closes in tags[last + 1 :])


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the outermost brace-balanced \\boxed{…}; an unbalanced one is no box."""
    starts = {found.end() - 1: found.start() for found in BOXED.finditer(text)}
    if not starts:
        return []
    closed, stack = {}, []
    for found in re.finditer(r"\\[{}\\]|[{}]", text):
        if found[0] == "{":
            stack.append(found.start())
        elif found[0] == "}" and stack:
            closed[stack.pop()] = found.start()
    result, end = [], 0
    for opening, start in starts.items():
        if opening in closed and start >= end:
            end = closed[opening] + 1
            result.append((start, end, text[opening + 1 : closed[opening]]))
    return result


def peel(text: str, keep: tuple[str, ...] = (), code: bool = True) -> str:
    """Wrappers removed, repeatedly (G11): fences, emphasis, LaTeX, quotes, brackets, {"answer": …}.

    `keep` names opening wrappers to leave alone. Raises Several for a JSON object that repeats a key.

    >>> peel('**\\\\boxed{"B"}**'), peel('{"answer": "C"}'), peel('"5"', keep=('"',))
    ('B', 'C', '"5"')
    """
    text = clean(text)
    for _ in range(12):
        if not text or text[0] not in OPENINGS:
            break
        before = text
        if text[0] != "{":  # JSON has none of these around it
            text = _unwrapped(text, keep, code)
        if text.startswith("{") and text.endswith("}"):
            text = _only_answer(text)
        if text == before:
            break
    return text


def _unwrapped(text: str, keep: tuple[str, ...], code: bool) -> str:
    """One layer of fence, marks and LaTeX command removed."""
    if code:
        text = (fenced(text) or text).strip()
    for opening, closing in PAIRS:
        size = len(opening)
        if (
            opening not in keep
            and len(text) > size + len(closing)
            and text.startswith(opening)
            and text.endswith(closing)
            and closing not in text[size : -len(closing)]
        ):
            text = text[size : -len(closing)].strip()
    command = COMMAND.match(text)
    if command and text.endswith("}") and closes_at_end(text, command.end() - 1):
        text = text[command.end() : -1].strip()
    return text


def fenced(text: str) -> str | None:
    """The content of a code fence that is the whole text, its language name left out; None if it is anything else."""
    if not (text.startswith("```") and text.endswith("```") and len(text) >= 6) or "```" in text[3:-3]:
        return None
    head, newline, body = text[3:-3].partition("\n")
    return body.rstrip(" \t").removesuffix("\n") if newline and "`" not in head else text[3:-3]


def closes_at_end(text: str, opening: int) -> bool:
    """The brace at `opening` is closed by the last character of the text."""
    depth = 0
    for found in re.finditer(r"\\[{}\\]|[{}]", text[opening:]):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return opening + found.end() == len(text)
    return False


def _only_answer(text: str) -> str:
    if not ANSWER_KEY.match(text):
        return text
    try:
        value = read_value(text)
    except NotJson:
        return text
    if not isinstance(value, Obj) or not value.pairs:
        return text
    if {key.strip().lower() for key, _ in value.pairs} - set(ANSWER_KEYS) or len({key for key, _ in value.pairs}) > 1:
        return text
    if len(value.pairs) > 1:
        raise Several("repeated key")
    inner = value.pairs[0][1]
    if isinstance(inner, str):
        return inner.strip()
    if isinstance(inner, Num):
        return inner.text
    if isinstance(inner, bool):
        return "true" if inner else "false"
    if inner is None:
        return "null"
    return text[text.index(":") + 1 : text.rindex("}")].strip()


# A pattern is only tried on a text that has one of its words: most texts have none, and substrings are found in C.
PATTERN_WORDS: dict[re.Pattern[str], tuple[str, ...]] = {
    STATEMENT: ("answer", "choice", "option", "答案"),
    CHOOSING: ("choose", "select", "pick", "with"),
    IS_CORRECT: ("answer", "option", "choice"),
}
# And, where the words are common, only on one that has this too.
PATTERN_GATE = {IS_CORRECT: re.compile(r"(?:is|be)\s+(?:the\s+)?(?:correct|best|right)\b")}


def _matches(pattern: re.Pattern[str], plain: str, lowered: str) -> list[tuple[int, int]]:
    """(start, end) of the pattern's matches, looked for only around the words it cannot do without."""
    words = PATTERN_WORDS.get(pattern)
    if words is None or len(plain) != len(lowered):  # a few letters change their length with their case
        return [found.span() for found in pattern.finditer(plain)]
    first = [place for word in words if (place := lowered.find(word)) >= 0]
    gate = PATTERN_GATE.get(pattern)
    if not first or (gate and not gate.search(lowered)):
        return []
    last = max(lowered.rfind(word) for word in words)
    return [found.span() for found in pattern.finditer(plain, max(0, min(first) - 200), last + 200)]


def statements(text: str, task: Task) -> list[tuple[bool, str, str]]:
    """(has a conclusion marker, X as its first sentence, X as the whole extent) of every explicit statement (G3)."""
    plain = text.replace("**", "")
    lowered = plain.lower()
    found = sorted(place for pattern in task.statements for place in _matches(pattern, plain, lowered))
    result: list[tuple[bool, str, str]] = []
    if len(found) > MAX_STATEMENTS:
        raise Several("statement after statement")
    for place, (start, end) in enumerate(found):
        if place and start < found[place - 1][1]:
            continue  # two patterns on the same words
        stop = found[place + 1][0] if place + 1 < len(found) else len(plain)
        if task.kind != "long":
            line = plain.find("\n", end)
            stop = min(stop, line) if line >= 0 else stop
        before = re.split(r"[.!?\n。！？]", plain[max(0, start - 200) : start])[-1]
        extent = plain[end:stop].strip()
        cut = SENTENCE_END.search(extent)
        sentence = extent[: cut.end()] if cut else extent
        if sentence.endswith(("?", "？")) or HEDGE.search(before) or re.match(r"(?:not|n't)\b", extent):
            continue
        high = bool(CONCLUSION.search(before) or CONCLUSION.search(plain[start:end]))
        result.append((high, sentence, extent))
    if task.kind in ("text", "short"):
        for count, (start, end) in enumerate(_matches(IS_CORRECT, plain, lowered)):
            if count == MAX_CORRECT:
                raise Several("the same claim again and again")
            before = re.split(r"(?<=[.!?。！？])\s|\n", plain[max(0, start - 500) : start])[-1]
            high = bool(CONCLUSION.search(before))
            words = re.sub(r"^\W*(?:therefore|so|thus|hence|finally)\b[\s,]*", "", before, flags=re.IGNORECASE).strip()
            after = plain[end : end + 1]
            if words and after != "?" and not HEDGE.search(before):
                result.append((high, words, words))
    return result


def without_mark(text: str) -> str:
    """One closing sentence mark removed."""
    text = text.rstrip()
    return text[:-1].rstrip() if text.endswith((".", "。", "!", "！")) and not text.endswith("..") else text


LEAD = re.compile(
    r"(?:(?:therefore|so|thus|hence|in conclusion|finally)\b[,，]?\s*)?"
    r"(?:(?:the|my)\s+(?:(?:final|correct|best|right)\s+){0,2}(?:answer|choice|option)\s+(?:is|would\s+be)\b\s*[:：]?"
    r"|(?:final\s+|correct\s+)?answer\s*[:：]|(?:最终)?答案\s*(?:是|为|[:：])\s*[:：]?)\s*",
    re.IGNORECASE,
)


def without_lead(text: str) -> str:
    """The opening phrase of a statement peeled off ("The answer is X" -> X); the text itself if it has none."""
    lead = LEAD.match(text)
    rest = text[lead.end() :].strip() if lead else ""
    return rest or text


def agree(readings: list[Reading]) -> Reading:
    """The common reading; several_answers if they differ (G8)."""
    if len(readings) == 1:
        return readings[0]
    if len({(reading.key, reading.value is None) for reading in readings}) > 1:
        return SEVERAL
    return readings[-1]


def find_answer(response: object, task: Task, prefilled: bool = False) -> Reading:
    """The answer of a response as the task reads it. Never raises on a response."""
    if not isinstance(response, str):
        return MALFORMED
    text = final_part(response, prefilled)
    if text is None:
        return Reading(None, "truncated")
    if not text.strip():
        return EMPTY
    try:
        return _find(text, task)
    except Several:
        return SEVERAL


def _find(text: str, task: Task) -> Reading:
    blocks, open_block = answer_blocks(text)
    if open_block:
        return Reading(None, "truncated")
    if blocks:
        if is_blank(blocks[-1]):
            return EMPTY
        last = task.read(blocks[-1], "block")
        others = [task.read(block, "block") for block in dict.fromkeys(blocks) if block != blocks[-1]]
        return agree([*others, last])
    if is_blank(text):
        return EMPTY
    if task.kind != "source":
        found = boxes(text)
        if found:
            contents = list(dict.fromkeys(content for _, _, content in found))
            if is_blank(contents[-1]):
                return EMPTY
            return agree([task.read(content, "box") for content in contents])
        stated = _stated(text, task)
        if stated:
            return stated
    return _bare(text, task)


def _stated(text: str, task: Task) -> Reading | None:
    best: dict[bool, dict[Hashable, Reading]] = {}
    for high, sentence, extent in dict.fromkeys(statements(text, task)):
        reading = NO_ANSWER
        for words in (extent, sentence) if task.kind != "short" or _labelled(extent) else (sentence, extent):
            if words and not is_blank(words):
                reading = task.read(without_mark(words) if task.kind == "text" else words, "statement")
                if reading.value is not None or reading.status == "several_answers":
                    break
        if reading.value is not None or reading.status == "several_answers":
            best.setdefault(high, {})[reading.key, reading.value is None] = reading
    if not best:
        return None
    return agree(list(best[max(best)].values()))


def _labelled(extent: str) -> bool:
    """ "B. Blue": the first full stop belongs to the label, it does not end the sentence."""
    return bool(re.match(r"\W*[A-Za-z]\s*[.)]", extent))


def _bare(text: str, task: Task) -> Reading:
    if task.kind != "short":
        return task.read(text, "bare")
    lines = [line for line in text.strip().split("\n") if line.strip()]
    whole = task.read(text, "bare") if len(lines) == 1 or len(text) <= 20_000 else NO_ANSWER
    if whole.value is not None or len(lines) == 1:
        return whole
    ends = [reading for line in (lines[0], lines[-1]) if (reading := task.read(line, "bare")).value is not None]
    return agree(ends) if ends else whole
