"""English number words (RULES N3), composed: five hundred, twenty-five, one thousand two hundred, minus four."""

from __future__ import annotations

import re
from fractions import Fraction

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
ROUND = "twenty thirty forty fifty sixty seventy eighty ninety"
ONES = {word: value for value, word in enumerate(SMALL.split())}
TENS = {word: 10 * value for value, word in enumerate(ROUND.split(), 2)} | {"fourty": 40}
BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = set(ONES) | set(TENS) | set(BIG) | {"hundred"}
# fmt: off
ORDINALS = {
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth", "thirtieth", "fortieth", "fiftieth", "sixtieth", "seventieth", "eightieth", "ninetieth",
    "hundredth", "thousandth", "half", "halves", "quarter", "quarters", "thirds", "fourths", "fifths", "sixths",
    "eighths", "tenths",
}
# fmt: on
PRONOUN_BEFORE = {
    "no",
    "any",
    "some",
    "every",
    "each",
    "this",
    "that",
    "the",
    "another",
    "other",
    "which",
    "blue",
    "red",
}
ANY_PART = re.compile("|".join(sorted(PARTS)), re.IGNORECASE)
WORD = re.compile(r"[A-Za-z]+|#|\S")


def read_number_words(text: str) -> list[tuple[Fraction, str]] | None:
    """(value, text after it) of every number in words; None when words stand together that do not compose.

    >>> [value for value, _ in read_number_words("one thousand two hundred and six, minus four")]
    [Fraction(1206, 1), Fraction(-4, 1)]
    """
    if not ANY_PART.search(text):
        return []
    tokens = [(found[0].casefold(), found.start(), found.end()) for found in WORD.finditer(text)]
    found, place = [], 0
    while place < len(tokens):
        word = tokens[place][0]
        scale_alone = word in ("hundred", *BIG) and place and tokens[place - 1][0] in ("a", "one")
        if word not in ONES and word not in TENS and not scale_alone:
            place += 1
            continue
        run, end = ([1] if scale_alone else []), place
        words = ["one"] if scale_alone else []
        while end < len(tokens):
            current = tokens[end][0]
            if current in PARTS:
                words.append(current)
                end += 1
            elif current in ("-", "and") and end + 1 < len(tokens) and tokens[end + 1][0] in PARTS:
                if current == "and" and not (words and words[-1] in ("hundred", *BIG)):
                    break
                end += 1
            else:
                break
        after = tokens[end][0] if end < len(tokens) else ""
        if after == "-" and end + 1 < len(tokens):
            after = tokens[end + 1][0]
        before = tokens[place - 1][0] if place else ""
        alone = words == ["one"] and not run
        if after in ORDINALS or (alone and (before in PRONOUN_BEFORE or after == "of")):
            place = end
            continue
        value = _compose(words)
        if value is None:
            return None
        if after == "point":
            at = end + 1
            digits = ""
            while at < len(tokens) and tokens[at][0] in ONES and ONES[tokens[at][0]] < 10:
                digits += str(ONES[tokens[at][0]])
                at += 1
            if digits:
                value, end = value + Fraction(int(digits), 10 ** len(digits)), at
        if before in ("minus", "negative"):
            value = -value
        found.append((Fraction(value), text[tokens[end - 1][2] :][:40]))
        place = end
    return found


def _compose(words: list[str]) -> int | None:
    """Value of number words that stand together, None if they are not one number ("two three", "twenty thirty")."""
    total, group, last = 0, 0, 10**18
    slot = "start"  # what the current group ends with: start, ones, tens, hundred
    for word in words:
        if word in BIG:
            if slot == "start" or BIG[word] >= last:
                return None
            total, last, group, slot = total + group * BIG[word], BIG[word], 0, "start"
        elif word == "hundred":
            if slot != "ones" or not 0 < group < 100:
                return None
            group, slot = group * 100, "hundred"
        elif word in TENS:
            if slot not in ("start", "hundred"):
                return None
            group, slot = group + TENS[word], "tens"
        else:
            if slot == "ones" or (slot == "tens" and not 0 < ONES[word] < 10):
                return None
            group, slot = group + ONES[word], "ones"
    return total + group
