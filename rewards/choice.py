"""Multiple choice (RULES section 4): one letter, or the text of exactly one option."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from data.prompts import split_options
from rewards.extraction import (
    CHOOSING,
    HEDGE,
    IS_CORRECT,
    NO_ANSWER,
    PATTERN_GATE,
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
from rewards.verdict import read_verdict

ALPHABET = tuple(chr(code) for code in range(ord("A"), ord("Z") + 1))
NOUN = r"(?:option|choice|answer|letter)"
LONE = re.compile(
    rf"(?:{NOUN}\s*[:：]?\s*)?[\(\[\{{]?\s*([A-Za-z])\s*[\)\]\}}]?\s*[.):：,，。、]{{0,2}}", re.IGNORECASE
)
WITH_TEXT = re.compile(
    r"(?:[\(\[]\s*([A-Za-z])\s*[\)\]]\s*[.:：,，-]?|([A-Za-z])\s*(?:[.):：,，]|\s-(?=\s)|-))\s*(\S.*)", re.DOTALL
)
AFTER = r"(?=\s*(?:\Z|[.,;:!?，。；：！？\)\]】」*`\"']|\b(?:because|since|as)\b))"
MARKED = re.compile(
    r"(?:\b(?:option|choice|answer|letter|is|are|be|think|choose|select|pick|say|with)\b|'s\b|’s\b|选项|选|是)\s*(?:[:：]\s*)?"
    rf"[\(\[【\"'*`]{{0,4}}([A-Z])(?![A-Za-z0-9]){AFTER}",
)
NAMED = re.compile(rf"\b{NOUN}\s+[\(\[]?([A-Z])[\)\]]?\s+(?:is|are|was|would)\b", re.IGNORECASE)
CORRECT = re.compile(r"(?<![A-Za-z0-9])[\(\[]?([A-Z])[\)\]]?\s+(?:is|would be)\s+(?:the\s+)?(?:correct|best|right)\b")
CORRECT_ALONE = re.compile(
    r"(?:(?<=\s)|(?<=\A))(?:(?:option|choice)\s+)?"
    r"(?=[\(\[]?[A-Z][\)\]]?\s+(?:is|would be)\s+(?:the\s+)?(?:correct|best|right)\b)",
    re.IGNORECASE,
)
PATTERN_WORDS[CORRECT_ALONE] = ("correct", "best", "right")
PATTERN_GATE[CORRECT_ALONE] = PATTERN_GATE[IS_CORRECT]
BRACKETED = re.compile(r"[\(\[【]\s*([A-Z])\s*[\)\]】]|\*\*\s*([A-Z])\s*\*\*|`([A-Z])`")
LAST_LOWER = re.compile(
    r"(?:\b(?:option|choice|answer|letter|is|are|be|think|choose|select|pick|say|with)|'s)\s+\(?([a-z])\)?[.。!]?\s*\Z"
)
DENIED = re.compile(
    r"(?:\b(?:not|rather\s+than|instead\s+of|nor)|n't|n’t)\s+(?:the\s+)?(?:option\s+|choice\s+)?[\(\[*]*([A-Z])[\)\]*]*(?![A-Za-z0-9])"
)
LETTER = r"[\(\[*`\"']{0,4}([A-Z])(?![A-Za-z0-9'’])[\)\]*`\"']*"
JOINED = re.compile(
    rf"(?<![A-Za-z0-9]){LETTER}\s*(?:,|，|、|/|&|\||;|-|–|<br\s*/?>|\band\b|\bor\b|\bvs\b|和|或|\s)\s*(?:or\b|and\b)?\s*(?={LETTER})"
)
OR_LETTER = re.compile(
    r"(?:\b(?:or|and)\b|[,/&;]|、|或|和)\s*(?:maybe|possibly|perhaps|even|also|option)?\s*" + LETTER + AFTER
)
LISTED = re.compile(r"(?:\A|\s)[\(\[]?([A-Z])[.):：]\s+(?=\S)")


@dataclass(frozen=True)
class Options:
    """Labels and texts of a sample's options. `labels` is A-Z when the sample has none."""

    labels: tuple[str, ...] = ALPHABET
    texts: tuple[str, ...] = ()
    by_text: dict[str, tuple[str, ...]] = field(default_factory=dict)  # normalised text -> labels
    polar: dict[bool, str] = field(default_factory=dict)  # yes / no -> label, when the options are exactly these


def normal(text: str) -> str:
    """NFKC, case-folded, blanks collapsed, closing punctuation removed (MC4)."""
    text = unicodedata.normalize("NFKC", clean(text)).casefold()
    return " ".join(text.split()).rstrip(" .,;:!?。，；：！？")


def read_options(options: Any) -> Options:
    """Raises ValueError for a list that is no list of texts or repeats a label (MC7)."""
    if options is None or (isinstance(options, (list, tuple)) and not options):
        return Options()
    if not isinstance(options, (list, tuple)) or not all(isinstance(item, str) for item in options):
        raise ValueError(f"options must be a list of texts, got {options!r}")
    if len(options) > len(ALPHABET):
        raise ValueError(f"options has {len(options)} entries, at most {len(ALPHABET)} have a letter")
    pairs = split_options(options)
    labels = tuple(label for label, _ in pairs)
    if len(set(labels)) < len(labels):
        raise ValueError(f"options repeats a label: {', '.join(labels)}")
    by_text: dict[str, tuple[str, ...]] = {}
    for label, text in pairs:
        if normal(text):
            by_text[normal(text)] = (*by_text.get(normal(text), ()), label)
    polar = {}
    if set(by_text) in ({"yes", "no"}, {"true", "false"}) and len(pairs) == 2:
        polar = {text in ("yes", "true"): names[0] for text, names in by_text.items()}
    return Options(labels, tuple(text for _, text in pairs), by_text, polar)


def choice_task(options: Options, text_gold: bool = False) -> Task:
    """The reader of one sample. `text_gold`: the gold is a text and there are no options, so texts compare."""

    def read(text: str, place: str) -> Reading:
        return read_choice(text, place, options, text_gold)

    return Task(read=read, kind="short", statements=(STATEMENT, CHOOSING, CORRECT_ALONE))


def _letter(value: str) -> Reading:
    return Reading(value, key=value)


def read_choice(text: str, place: str, options: Options, text_gold: bool = False) -> Reading:
    """A letter of the sample, or (text_gold) a normalised text; several_answers for hedges and lists."""
    found = boxes(text)
    if len({content.strip() for _, _, content in found}) > 1:
        return SEVERAL
    try:
        whole = peel(unicodedata.normalize("NFKC", peel(text)))
        text = peel(without_lead(whole))
    except Several:
        return SEVERAL
    if place == "bare" and "\n" in text:
        return NO_ANSWER  # the first or the last line speaks
    if place == "block" and text != whole:
        place = "statement"
    lone = LONE.fullmatch(text) if len(text) < 40 else None
    if lone and lone[1].upper() in options.labels:
        return _letter(lone[1].upper())
    named = options.by_text.get(normal(text), ()) if len(text) < 10_000 else ()
    if len(named) == 1:
        return _letter(named[0])
    if len(named) > 1:
        return SEVERAL
    if lone and not text_gold:
        return NO_ANSWER
    reading = _letter_with_text(text, place, options)
    if reading:
        return reading
    if options.polar:
        verdict = read_verdict(text, place)
        if verdict.value is not None:
            return _letter(options.polar[verdict.value])
        if verdict.status == "several_answers":
            return verdict
    if place in ("block", "statement", "box"):
        # The X of a statement stands where "the answer is" has marked it: "E because the video shows it".
        reading = _sentence("is " + text if place == "statement" else text, options)
        if reading.value is not None or reading.status == "several_answers":
            return reading
    if text_gold and normal(text):
        return Reading(("text", normal(text)), key=("text", normal(text)))
    return NO_ANSWER


def _letter_with_text(text: str, place: str, options: Options) -> Reading | None:
    """MC2: letter, delimiter, text. None when the text does not have that form."""
    found = WITH_TEXT.match(text)
    if not found:
        return None
    label, rest = found[1] or found[2], found[3]
    if label.islower() and place != "gold":
        return None
    label = label.upper()
    if label not in options.labels:
        return None
    named = options.by_text.get(normal(rest), ())
    if label in named:
        return _letter(label)
    if re.match(r"[A-Za-z]-\S", text):  # "A-frame", "A-D"
        return SEVERAL if re.fullmatch(r"[A-Z]-[A-Z]", text) else None
    if named:
        return SEVERAL  # MC8: the letter of one option with the text of another
    if re.fullmatch(r"[A-Z][.):]?", rest.strip()):
        return SEVERAL
    others = (
        _mentions(rest, options) | set(re.findall(r"^\W*(?:or|and|maybe|possibly|perhaps)\s+([A-Z])\b", rest))
    ) - {label}
    parts = re.split(r"\s*(?:[,/;\n]|\bor\b|\band\b)\s*", rest) if len(rest) < 10_000 else []
    if others or any(set(options.by_text.get(normal(part), (label,))) - {label} for part in parts):
        return SEVERAL
    return _letter(label)


def _mentions(text: str, options: Options) -> set[str]:
    """Letters of the sample that the text marks as answers, those it denies struck out (MC3, MC5, MC6)."""
    text = DENIED.sub(" ", " ".join(text[:20_000].split()))
    marked = [match for pattern in (MARKED, NAMED, CORRECT, BRACKETED) for match in pattern.finditer(text)]
    found = {group for match in marked for group in match.groups() if group and group.isupper()}
    for match in JOINED.finditer(text):
        first, second = match[1], match[2]
        if not _is_word(second, text, match.end()):
            found |= {first, second}
    found |= {match[1] for match in OR_LETTER.finditer(text)}
    found |= {match[1] for match in LISTED.finditer(text)}
    return found & set(options.labels)


def _is_word(letter: str, text: str, at: int) -> bool:
    """An article or a pronoun, no letter: A followed by a word, I followed by a verb (MC5)."""
    return letter in "AI" and bool(re.match(r"[\(\[*`\"']*[AI]\s+[a-z]", text[at : at + 12]))


def _sentence(text: str, options: Options) -> Reading:
    if HEDGE.search(text) or text.rstrip().endswith(("?", "？")):
        return SEVERAL if len(_mentions(text, options)) > 1 else NO_ANSWER
    letters = _mentions(text, options)
    last = LAST_LOWER.search(text)
    if last and last[1].upper() in options.labels and not re.search(rf"\bnot\s+\(?{last[1]}\b", text):
        letters |= {last[1].upper()}
    if len(letters) > 1:
        return SEVERAL
    return _letter(letters.pop()) if letters else NO_ANSWER


def read_gold(gold: Any, options: Options) -> Reading:
    """Letter of the gold, or its text when there are no options. Raises ValueError when it is neither (MC7, MC10)."""
    if not isinstance(gold, str):
        raise ValueError(f"a multiple-choice answer must be text, got {gold!r}")
    has_options = bool(options.texts)
    reading = read_choice(gold, "gold", options, text_gold=not has_options)
    if reading.value is None:
        known = f"labels {', '.join(options.labels)}" if has_options else "a letter or a text"
        raise ValueError(f"answer {gold!r} is no option of the sample ({known})")
    return reading


def score_choice(reading: Reading, gold: Reading) -> float:
    return float(reading.value == gold.value)
