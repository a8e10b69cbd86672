"""Yes or no (RULES section 7): boolean, binary classification, SSR, CRR."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rewards.extraction import HEDGE, NO_ANSWER, SEVERAL, Reading, Several, Task, peel, without_lead

YES = {"yes", "true"}
NO = {"no", "false"}
ALONE = {"y": True, "1": True, "是": True, "n": False, "0": False, "否": False}  # only as the whole answer
CLAUSES = re.compile(r"([^.,;:!?\n。，；：！？…()\[\]{}\"“”—–]+)([.,;:!?\n。，；：！？…()\[\]{}\"“”—–]*)")
OPENING = re.compile(r"(?:(?:and|or|so)\s+)?(yes|no|true|false)\b", re.IGNORECASE)
AFTER_ANSWER = re.compile(r"\banswer\s+is\s+(?:an?\s+)?(yes|no|true|false)\b", re.IGNORECASE)
FILLER = {"and", "or", "both", "either", "slash", "&"}


def read_verdict(text: str, place: str = "block") -> Reading:
    """True / False when exactly one polarity stands in verdict position.

    >>> [read_verdict(t).value for t in ("Yes, it is", "no doubt", "The answer is a no", "yes or no", "not true")]
    [True, None, False, None, None]
    """
    try:
        text = peel(unicodedata.normalize("NFKC", peel(text)))
    except Several:
        return SEVERAL
    whole = text.strip().strip(".。!！,，()[] ").casefold()
    if whole in ALONE:
        return _verdict(ALONE[whole])
    words = re.findall(r"[^\W_]+|&", text.casefold())[:50_000]
    kinds = {word in YES for word in words if word in YES or word in NO}
    if len(kinds) == 2 and all(word in YES or word in NO or word in FILLER for word in words):
        return SEVERAL
    rest = without_lead(text)
    if place == "statement" or rest != text:
        rest = re.sub(r"\Aan?\s+(?=(?:yes|no|true|false)\b)", "", rest, flags=re.IGNORECASE)  # the answer is a no
        text = rest
        whole = text.strip().strip(".。!！,，()[] ").casefold()
        if whole in ALONE:
            return _verdict(ALONE[whole])
    found = {match[1].casefold() in YES for match in AFTER_ANSWER.finditer(text)}
    hedged = False
    for clause, mark in CLAUSES.findall(text):
        clause = clause.strip(" \t'*_`-#>~/\\")
        hedged = hedged or bool(HEDGE.search(clause))
        opening = OPENING.match(clause)
        if not opening or mark.startswith("?") or hedged:
            pass
        elif opening[1].casefold() == "no" and clause[opening.end() :].strip():
            after = re.match(r"\s*(?:and|or|/|\\|&|-)?\s*(yes|true)\b", clause[opening.end() :], re.IGNORECASE)
            found |= {True, False} if after else set()
        else:
            found.add(opening[1].casefold() in YES)
            if re.match(r"\s*(?:and|or|/|&|-)\s*(?:no|false)\b", clause[opening.end() :], re.IGNORECASE):
                found |= {True, False}
        if any(end in mark for end in ".!?\n。！？"):
            hedged = False
    if len(found) > 1:
        return SEVERAL
    return _verdict(found.pop()) if found else NO_ANSWER


def _verdict(value: bool) -> Reading:
    return Reading(value, key=value)


TASK = Task(read=read_verdict, kind="short")


def read_gold(gold: Any) -> Reading:
    """bool, or one of the words and synonyms alone. Raises ValueError for anything else (B2)."""
    if isinstance(gold, bool):
        return _verdict(gold)
    if isinstance(gold, str):
        word = gold.strip().strip(".").casefold()
        if word in ALONE:
            return _verdict(ALONE[word])
        if word in YES | NO:
            return _verdict(word in YES)
    raise ValueError(f"a yes / no answer must be yes, no, true, false, y, n, 1, 0 or a boolean, got {gold!r}")


def score_verdict(reading: Reading, gold: Reading) -> float:
    return float(reading.value is gold.value)
