"""`--protocol easyvideor1`: the older toolkit's own reading and scoring of answers, so that its numbers can be
compared.

Known to differ from the official metrics (docs/evaluation.md lists how): the first statement wins even inside
reasoning, only letters A to J, decimal points must match, grounding needs strict JSON, mean relative accuracy uses
`<`, boxes are averaged over the seconds both sides name, and failed samples leave the denominator. Nothing else may
import this.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from data.records import Sample
from evaluate._bootstrap import Resampler
from evaluate._scoring import Answer, Metrics

LETTERS = "ABCDEFGHIJ"
CONCLUSION = r"(?:therefore|so|thus|hence|finally)\b[^.\n]*?\banswer\s+is\s*:?\s*"
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def braces(text: str) -> str | None:
    """From the first "{" to the last "}"."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    return found.group().strip() if found else None


def extract(text: str, problem_type: str) -> str:
    """The toolkit's extraction, steps in its order; an empty string when nothing was found."""
    block, think = ANSWER.search(text), THINK.search(text)
    bare = THINK.sub("", text).strip()
    if problem_type in ("temporal grounding", "spatial-temporal grounding"):
        if block:
            return block.group(1).strip()
        return (think and braces(think.group(1))) or braces(bare) or bare
    choice = problem_type == "multiple choice"
    if block:
        content = block.group(1).strip()
        if not choice:
            return content
        if len(content) <= 2 and (letter := content.rstrip(".").upper()) in LETTERS:
            return letter
    for pattern in (CONCLUSION + r"([A-J])\b", r"answer\s+is\s*:?\s*([A-J])\b", r"答案(?:是|为|:|:)\s*([A-J])\b"):
        if found := re.search(pattern, text, re.IGNORECASE):
            return found.group(1).upper()
    if not choice and (found := re.search(CONCLUSION + r"(.+)", text, re.IGNORECASE | re.DOTALL)):
        return found.group(1).strip()
    if "</think>" in text:
        rest = text.split("</think>")[-1].strip()
        if len(rest) == 1 and rest.upper() in LETTERS:
            return rest.upper()
        found = re.match(r"([A-J])(?:[.,:;)\s]|$)", rest) or re.search(r"answer\s+is\s*:?\s*([A-J])\b", rest, re.I)
        if found:
            return found.group(1).upper()
    if found := re.search(r"\b(?:I\s+)?(?:choose|select|pick)\s+(?:option\s+)?([A-J])\b", text, re.IGNORECASE):
        return found.group(1).upper()
    for line in reversed(text.strip().split("\n")[-5:]):
        line = line.strip()
        if len(line) == 1 and line.upper() in LETTERS:
            return line.upper()
        if found := re.fullmatch(r"([A-J])[^\w\s]?", line):
            return found.group(1)
        if len(line) < 30 and (found := re.search(r"(?:^|[^A-Za-z])([A-J])[.)]?$", line)):
            return found.group(1)
    return "" if choice else bare


def normalize_number(text: str) -> float | None:
    """Trims to digits and points at both ends, drops commas, then float() or None."""
    trimmed = re.sub(r"[^\d.]+$", "", re.sub(r"^[^\d+\-.]+", "", text.strip())).replace(",", "")
    try:
        return float(trimmed)
    except ValueError:
        return None


def numerical(gold: str, guess: str) -> float:
    if any(mark in gold for mark in ".,") != any(mark in guess for mark in ".,"):
        return 0.0
    a, b = normalize_number(gold), normalize_number(guess)
    return float(a is not None and b is not None and round(a, 2) == round(b, 2))


def regression(gold: str, guess: str) -> float:
    """Mean relative accuracy with a strict `<`, in float32 as there."""
    a, b = normalize_number(gold), normalize_number(guess)
    if a is None or b is None:
        return 0.0
    error = np.float32(abs(b - a) / (abs(a) + 1e-8))
    thresholds = np.arange(0.5, 0.96, 0.05, dtype=np.float32)
    return float(np.mean(error < 1 - thresholds))


def span_iou(a: Any, b: Any) -> float:
    if not all(isinstance(span, list) and len(span) == 2 for span in (a, b)):
        return 0.0
    a, b = [float(x) for x in a], [float(x) for x in b]
    union = max(a[1], b[1]) - min(a[0], b[0])
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / union if union > 0 else 0.0


def box_iou(a: list[float], b: list[float]) -> float:
    a, b = [float(x) for x in a], [float(x) for x in b]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area if area > 0 else 0.0


def grounding(gold: str, guess: str, with_boxes: bool) -> float:
    try:
        a, b = json.loads(gold), json.loads(guess)
        if not isinstance(a, dict) or not isinstance(b, dict):
            return 0.0
        time = span_iou(a.get("time"), b.get("time"))
        boxes, guessed = a.get("boxes") or {}, b.get("boxes") or {}
        if not with_boxes or not boxes:
            return time
        common = [key for key in boxes if key in guessed]
        overlap = sum(box_iou(boxes[key], guessed[key]) for key in common) / len(common) if common else 0.0
        return 0.5 * time + 0.5 * overlap
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0.0


def score_like_easyvideor1(sample: Sample, response: str) -> tuple[str | None, float]:
    """(what the toolkit would have stored as the prediction, its score)."""
    name = sample.extra.get("row_problem_type", sample.problem_type)
    guess, gold = extract(response, name), str(sample.answer)
    used = guess or response
    if name == "multiple choice":
        value = float(used.strip() == gold.strip())
    elif name == "numerical":
        value = numerical(gold, used)
    elif name == "regression":
        value = regression(gold, used)
    elif name == "REC":
        digits = "".join(re.findall(r"\d", gold))
        value = float(bool(digits) and "".join(re.findall(r"\d", used)) == digits)
    elif name in ("SSR", "CRR"):
        kind = sample.extra.get("ovo_type")
        word = "YES" if (kind == 1 if kind is not None else gold.strip().lower() in ("yes", "y")) else "NO"
        answer = used.strip().upper()
        value = float(answer == word[0] or word in answer)
    elif name in ("temporal grounding", "spatial-temporal grounding"):
        value = grounding(gold, used, name.startswith("spatial"))
    else:
        value = 0.0
    return guess or None, value


def aggregates(answers: list[Answer], draws: Resampler) -> Metrics:
    """mean_acc over everything but regression, mean_mra over regression, finished samples only; OVO-Bench's macro means."""
    values = [answer.score or 0.0 for answer in answers]
    done = [not answer.failed for answer in answers]
    is_mra = [answer.sample.problem_type == "regression" for answer in answers]
    found = {"mean_acc": draws.mean(values, [a and not b for a, b in zip(done, is_mra)])}
    if any(is_mra):
        found["mean_mra"] = draws.mean(values, [a and b for a, b in zip(done, is_mra)])
    if any("ovo_task" in answer.sample.extra for answer in answers):
        paths = [(a.sample.extra.get("ovo_category", ""), a.sample.extra.get("ovo_task", "")) for a in answers]
        found["ovo_total"] = draws.macro(values, paths, done)
        for category in ("backward", "realtime", "forward"):
            found[f"ovo_{category}"] = draws.macro(values, paths, [d and p[0] == category for d, p in zip(done, paths)])
    return {name: estimate for name, estimate in found.items() if estimate.n}
