"""Free text (RULES sections 9 and 10): edit distance for ocr, ROUGE-L F1 for open-ended answers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jiwer

from rewards.extraction import (
    EMPTY,
    PAIRS,
    SEVERAL,
    STATEMENT,
    ZERO_WIDTH,
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

# Scripts written without blanks between words: Han, kana, hangul, Thai.
UNSPACED = (
    "\u0e00-\u0e7f\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
HAS_UNSPACED = re.compile(f"[{UNSPACED}]")
MARKS = (  # combining marks belong to the word they stand in
    "\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u0610-\u061a\u064b-\u065f"
    "\u0900-\u0903\u093a-\u094f\u0951-\u0957\u0980-\u0983\u09bc-\u09cd"
)
TOKEN = re.compile(f"[{UNSPACED}](?<![\u30fb])|(?:(?![{UNSPACED}])[^\\W_]|[{MARKS}])+")
ARTICLES = {"a", "an", "the"}
OCR_METRICS = ("exact", "wer", "cer")


def _plain(text: str) -> str:
    """NFKC, zero-width dropped, case-folded."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text.translate(ZERO_WIDTH)).casefold()


def normal(text: str) -> str:
    """NFKC, zero-width dropped, case-folded, blanks collapsed; punctuation kept (ocr)."""
    return " ".join(_plain(text).split())


@lru_cache(maxsize=1)
def stemmer() -> Any:
    """Porter's stemmer as rouge-score uses it; nltk takes seconds to import, so it waits for the first word."""
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@lru_cache(maxsize=65_536)
def _stem(word: str) -> str:
    return stemmer().stem(word)


def tokens(text: str) -> list[str]:
    """Tokens of ROUGE-L here: words stemmed (ASCII, longer than 3), articles dropped, one token per CJK character.

    rouge-score's own tokenizer keeps ASCII only, so that two equal Chinese texts score 0.

    >>> tokens("The cats jumped, 一只猫"), tokens("the")
    (['cat', 'jump', '一', '只', '猫'], ['the'])
    """
    text = _plain(text)
    words = TOKEN.findall(text)
    kept = [word for word in words if word not in ARTICLES] or words
    return [_stem(word) if len(word) > 3 and word.isascii() and len(word) < 64 else word for word in kept]


def lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): rows are the bits of one integer.

    O(len(other)) operations on integers of len(one) bits, where a table of cells would take seconds for a long dump.
    """
    if len(one) > len(other):
        one, other = other, one
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    free = full
    for word in other:
        hit = free & places.get(word, 0)
        if hit:
            free = ((free + hit) | (free - hit)) & full
    return len(one) - free.bit_count()


def rouge_l(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of precision and recall of the longest common subsequence (Lin 2004, ROUGE-L with beta = 1)."""
    if not predicted or not gold:
        return 0.0
    common = lcs_length(predicted, gold)
    return 2 * common / (len(predicted) + len(gold))


def text_task(gold: str) -> Task:
    """The reader for one gold: wrappers that the gold itself begins with are kept on the answer."""
    keep = tuple(opening for opening, _ in PAIRS if gold.startswith(opening))
    target = normal(gold)

    def read(text: str, place: str) -> Reading:
        raw = clean(text)
        if normal(raw) == target:
            return Reading(raw, key=target)
        found = boxes(text)
        if len({content.strip() for _, _, content in found}) > 1 and place != "gold":
            return SEVERAL
        try:
            value = peel(raw, keep)
        except Several:
            return SEVERAL
        if normal(value) != target:
            lead = without_lead(value)
            value = peel(without_mark(lead), keep) if lead != value else value
        if is_blank(value):
            return EMPTY
        return Reading(value, key=normal(value))

    return Task(read=read, kind="text", keep=keep, statements=(STATEMENT,))


def gold_text(gold: Any) -> str:
    """The gold as text. Raises ValueError for a list, a boolean, null or a blank."""
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        raise ValueError(f"a text answer must be text or a number, got {gold!r:.200}")
    if isinstance(gold, float) and not math.isfinite(gold):
        raise ValueError(f"answer {gold!r} is not finite")
    text = clean(gold if isinstance(gold, str) else repr(gold))
    if not text or is_blank(text):
        raise ValueError(f"answer {gold!r:.200} is empty")
    return text


def ocr_metric(extra: dict[str, Any]) -> str | None:
    """The sample's own metric. Raises ValueError for an unknown one."""
    metric = extra.get("ocr_metric")
    if metric is not None and metric not in OCR_METRICS:
        raise ValueError(f"ocr_metric must be one of {', '.join(OCR_METRICS)}, got {metric!r}")
    return metric


def score_ocr(predicted: str, gold: str, extra: dict[str, Any]) -> float:
    """1 for equal texts, else 1 - WER, or 1 - CER without blanks when the gold is written without blanks."""
    metric = ocr_metric(extra)
    one, target = normal(predicted), normal(gold)
    if one == target:
        return 1.0
    if metric == "exact" or not one:
        return 0.0
    unspaced = bool(HAS_UNSPACED.search(target))
    if metric == "wer" or (metric is None and not unspaced):
        words = len(target.split())
        if one.count(" ") + 1 >= 2 * words:
            return 0.0  # at least as many insertions as words: no alignment needed
        return max(0.0, 1.0 - jiwer.wer(target, one))
    if unspaced:
        one, target = one.replace(" ", ""), target.replace(" ", "")
    if not one or len(one) >= 2 * len(target):
        return 0.0
    return max(0.0, 1.0 - jiwer.cer(target, one))


def score_text(predicted: str, gold: str) -> float:
    """ROUGE-L F1 on `tokens`; 0 when the answer has none."""
    return rouge_l(tokens(predicted), tokens(gold))
