"""Structure of a response (RULES section 2): 0 or 1, no half points."""

from __future__ import annotations

import re
from typing import Any

from rewards.extraction import clean, cut_tail

MODES = ("think", "direct", "open", "auto")
ANY_TAG = re.compile(r"<\s*(/\s*)?(think|answer)\s*>", re.IGNORECASE)
LITERAL = {"<think>", "</think>", "<answer>", "</answer>"}


def format_mode(extra: dict[str, Any], declared: str = "auto") -> str:
    """The sample's `format_mode`, else the run's. Raises ValueError for an unknown one."""
    mode = extra.get("format_mode")
    mode = declared if mode is None else mode
    if mode not in MODES:
        raise ValueError(f"format_mode must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def format_reward(response: object, mode: str = "auto", prefilled: bool = False) -> float:
    """1.0 when the tags stand exactly as the mode asks, else 0.0.

    think: <think>…</think> then <answer>…</answer>; direct: <answer>…</answer> alone; open: free text, then one
    answer block; auto: think or direct. Every tag counts, in any case and with blanks, also one quoted in the text.

    >>> format_reward("<think>a</think><answer>b</answer>", "think"), format_reward("so <answer>b</answer>", "direct")
    (1.0, 0.0)
    """
    if not isinstance(response, str):
        return 0.0
    text = cut_tail(response).strip()
    if prefilled:
        text = "<think>" + text
    tags = [(found.start(), found.end(), found[0]) for found in ANY_TAG.finditer(text)]
    if len(tags) > 4 or any(tag not in LITERAL for _, _, tag in tags):
        return 0.0
    order = [tag for _, _, tag in tags]
    parts = [
        text[a:b] for a, b in zip([0, *(end for _, end, _ in tags)], [*(start for start, _, _ in tags), len(text)])
    ]
    filled = [bool(clean(part)) for part in parts]
    if order == ["<answer>", "</answer>"]:
        _, answer, after = filled
        return float(answer and not after and (mode == "open" or (mode in ("direct", "auto") and not parts[0].strip())))
    if order == ["<think>", "</think>", "<answer>", "</answer>"]:
        _, think, _, answer, after = filled
        blank = not parts[0].strip() and not parts[2].strip()
        return float(mode in ("think", "auto") and blank and think and answer and not after)
    return 0.0
