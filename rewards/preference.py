"""Which of two responses is better (RULES section 18): labels 1, 2, tie. Problem types llava and critic."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from rewards.extraction import (
    HEDGE,
    NO_ANSWER,
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
from rewards.loose_json import NotJson, Num, Obj, find_values

LABELS = {"1": "1", "a": "1", "first": "1", "one": "1", "2": "2", "b": "2", "second": "2", "two": "2"}
NOUN = r"(?:responses?|assistants?|answers?|models?|candidates?|outputs?|captions?|options?)"
NAME = re.compile(
    rf"\b{NOUN}\s*[\(\[]?(1|2|a|b|one|two)[\)\]]?(?![\w])|\b(?:the\s+)?(first|second)(?:\s+(?:one|{NOUN}))?\b|(?<![\w.])[\(\[]?([12])[\)\]]?(?![\w.]|\s*[/%])"
    r"|(?-i:(?<!\w)([AB])(?!\w)(?=\s*(?:is|was|wins|beats|over|than|and|or|,|\.|\Z)))",
    re.IGNORECASE,
)
BARE = re.compile(r"[\(\[]*(1|2|a|b|first|second)[\)\]]*[.!:]?", re.IGNORECASE)
BETTER = (
    r"(?:is\s+|was\s+|seems\s+|looks\s+)?(?:\w+\s+)?(?:better|preferred|preferable|superior|stronger)(?:\s+(?:than|over|to))?"
    r"|beats|wins(?:\s+over)?|outperforms|is\s+the\s+(?:better|best|winner)(?:\s+(?:one|answer|response))?"
)
WORSE = r"(?:is\s+|was\s+)?(?:\w+\s+)?(?:worse|inferior|weaker)(?:\s+(?:than|to))?|loses(?:\s+to)?"
NEGATION = r"(?:not|never|n't|no)"
OTHER = re.compile(rf"\b{NOUN}(?:\s*[\(\[]?(?:[03-9]|\d\d+)|\s[\(\[]?[c-z])[\)\]]?\b(?!['’])", re.IGNORECASE)
TIE = re.compile(
    r"(?<!no )(?<!not a )(?<!not )(?<!n't a )"
    r"\b(?:ties?|tied|draw|equal|equally|same|no\s+(?:clear\s+|real\s+|significant\s+)?difference)\b",
    re.IGNORECASE,
)
BOTH_ARE = re.compile(rf"\bboth\s+(?:the\s+)?(?:{NOUN}\s+)?are\b", re.IGNORECASE)
BAD = re.compile(r"\b(?:not|n't|bad|wrong|incorrect|poor|worst|fails?|neither|nor)\b", re.IGNORECASE)


def _verdict(label: str) -> Reading:
    return Reading(label, key=label)


def read_preference(text: str, place: str = "block") -> Reading:
    """1, 2 or tie.

    >>> [read_preference(t).value for t in ("Response B", "Response 2 is worse than Response 1", "1 or 2", "a draw")]
    ['2', '1', None, 'tie']
    """
    found = boxes(text)
    if len({content.strip() for _, _, content in found}) > 1:
        return SEVERAL
    try:
        text = without_lead(peel(unicodedata.normalize("NFKC", peel(clean(text)))))
    except Several:
        return SEVERAL
    text = re.sub(r"\*\*|`|[\"“”]", "", peel(text))
    bare = BARE.fullmatch(text.strip())
    if bare:
        return _verdict(LABELS[bare[1].lower()])
    if len(text) > 20_000 or text.rstrip().endswith("?"):
        return NO_ANSWER
    names = list(NAME.finditer(text))
    # One mark per name: <1>, <2>, <T>, so that the relations below are regular and short.
    plain, at, named = [], 0, set()
    for match in names:
        label = LABELS[next(group for group in match.groups() if group).lower()]
        plain += [text[at : match.start()].lower(), f" <{label}> "]
        at = match.end()
        if match[1] or match[2]:  # "Response 1", "the first"; a digit in prose may count anything
            named.add(label)
    flat = " ".join("".join([*plain, text[at:].lower()]).split())
    flat = TIE.sub(" <t> ", flat)
    if re.search(r"<[12t]>\s*(?:,\s*)?(?:or|/)\s*(?:it'?s?\s+|is\s+|a\s+|an\s+)*<[12t]>", flat):
        labels = set(re.findall(r"<([12t])>", flat))
        return SEVERAL if len(labels) > 1 else NO_ANSWER
    if re.fullmatch(r"<[12t]>(?:\s*[,/;|]\s*<[12t]>)+\W*", flat) and len(set(re.findall(r"<([12t])>", flat))) > 1:
        return SEVERAL
    if OTHER.search(text) or HEDGE.search(flat):
        return NO_ANSWER
    relation = _relation(flat)
    tie = "<t>" in flat
    if relation == "negated" and not tie:
        return NO_ANSWER
    if relation in ("1", "2"):
        return _verdict(relation) if not re.search(r"(?:\ba|is)\s+<t>|^<t>", flat) else SEVERAL
    if relation == "both":
        return SEVERAL
    if tie or BOTH_ARE.search(flat):
        return _verdict("tie")
    labels = set(re.findall(r"<([12])>", flat))
    if len(labels) == 1 and labels == named and not BAD.search(flat) and len(flat) < 400:
        return _verdict(labels.pop())
    return SEVERAL if len(labels) > 1 else NO_ANSWER


def _relation(flat: str) -> str | None:
    """1 or 2 by a comparison; "negated", "both" (two winners) or None."""
    winners = set()
    negated = bool(
        re.search(
            rf"<[12]>\s+(?:is|was|does|are)?\s*{NEGATION}\b[^.;,]{{0,30}}(?:better|worse|preferred|win|beat|superior)",
            flat,
        )
    )
    negated |= bool(re.search(rf"{NEGATION}\b[^.;,<]{{0,20}}\bprefer", flat))
    instead = re.search(r"\b(?:not)\s+(?:<([12])>)\s*(?:but|,|;|rather)\s*(?:but\s+|rather\s+)?<([12])>", flat)
    if instead and instead[1] != instead[2]:
        winners.add(instead[2])
    after = re.search(r"<([12])>,?\s+(?:and\s+)?(?:not|rather than|instead of)\s+<([12])>", flat)
    if after and after[1] != after[2]:
        winners.add(after[1])
    if not negated:
        for match in re.finditer(rf"<([12])>\s*(?:{BETTER})(?:\s*<([12])>)?", flat):
            if match[1] != match[2]:
                winners.add(match[1])
        for match in re.finditer(rf"<([12])>\s*(?:{WORSE})(?:\s*<([12])>)?", flat):
            if match[1] != match[2]:
                winners.add({"1": "2", "2": "1"}[match[1]])
        for match in re.finditer(
            r"\b(?:prefer|choose|favou?r|pick|select)\s+<([12])>(?:\s+(?:over|to|than)\s+<([12])>)?", flat
        ):
            if match[1] != match[2]:
                winners.add(match[1])
        for match in re.finditer(
            r"\b(?:better|best|winner|preferred)\s*(?:one|response|answer|assistant)?\s*(?:is|:)\s*<([12])>", flat
        ):
            winners.add(match[1])
    if len(winners) > 1:
        return "both"
    if winners:
        return winners.pop()
    return "negated" if negated else None


def read_scores(text: str, place: str = "block") -> Reading:
    """P5: exactly two finite numbers; their order is the label."""
    try:
        text = without_lead(peel(clean(text)))
        values = [value for value, _, _ in find_values(text, "{[")]
    except Several:
        return SEVERAL
    except NotJson:
        return NO_ANSWER
    if values:
        if len(values) > 1:
            return SEVERAL
        value = values[0]
        if isinstance(value, Obj):
            held = value.get("scores", "score")
            if value.repeats() or len(held) > 1:
                return SEVERAL
            value = held[0] if held else [item for _, item in value.pairs]
        numbers = value if isinstance(value, list) else []
        pair = [item.value if isinstance(item, Num) else _float(item) for item in numbers]
    else:
        text = re.sub(rf"\b{NOUN}\s*[\(\[]?(?:1|2|A|B)[\)\]]?\s*[:=]", " ", text, flags=re.IGNORECASE)
        pair = [
            _float(part)
            for part in re.findall(r"(?<![\w.])[-+]?(?:\d{1,300}(?:\.\d{0,50})?|\.\d{1,50})(?![\w.]*\w)", text[:2_000])
        ]
        if re.search(r"\b(?:nan|inf(?:inity)?|or)\b", text, re.IGNORECASE):
            return NO_ANSWER
    if len(pair) != 2 or any(item is None or not math.isfinite(item) for item in pair):
        return NO_ANSWER
    return _verdict("1" if pair[0] > pair[1] else "2" if pair[1] > pair[0] else "tie")


def _float(value: Any) -> float | None:
    if not isinstance(value, str) or not re.fullmatch(r"\s*[-+]?(?:\d{1,300}(?:\.\d{0,50})?|\.\d{1,50})\s*", value):
        return None
    return float(value)


TASK = Task(read=read_preference, kind="short", statements=(STATEMENT,))
SCORES_TASK = Task(read=read_scores, kind="short", statements=(STATEMENT,))


def preference_task(extra: dict[str, Any]) -> Task:
    """Raises ValueError for an unknown `output`."""
    output = extra.get("output")
    if output not in (None, "label", "scores"):
        raise ValueError(f'output must be "label" or "scores", got {output!r}')
    return SCORES_TASK if output == "scores" else TASK


def read_gold(gold: Any) -> Reading:
    """Raises ValueError for a gold that is none of 1, 2, tie in an accepted spelling."""
    if isinstance(gold, int) and not isinstance(gold, bool) and gold in (1, 2):
        return _verdict(str(gold))
    if isinstance(gold, str):
        reading = read_preference(gold, "gold")
        if reading.value is not None:
            return reading
    raise ValueError(f"answer {gold!r:.200} is none of Response 1, Response 2, Tie")


def score_preference(reading: Reading, gold: Reading) -> float:
    return float(reading.value == gold.value)
