"""html-code (RULES section 17): parsed by html5lib, never executed; visible text times structure."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

from rewards import killable
from rewards.text import rouge_l, tokens

LIMIT_S = 1.2  # of processor time, 1.5 on the clock
MAX_DEPTH = 256
MAX_TAGS = 20_000
START_TAG = re.compile(r"<[A-Za-z][^<>]*>")
TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9-]*)")
# fmt: off
VOID = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
    "li", "p", "td", "th", "tr", "dt", "dd", "option",
}
# fmt: on
UNSEEN = {"script", "style", "title", "head", "template", "noscript"}
HIDDEN_STYLE = re.compile(r"display\s*:\s*none", re.IGNORECASE)


def has_element(source: str) -> bool:
    """A start tag stands in the source itself (html5lib would add html, head and body to any text)."""
    return bool(START_TAG.search(source))


def too_deep(source: str) -> bool:
    """More than MAX_DEPTH open elements, or more than MAX_TAGS tags: the parser's cost grows with their product."""
    depth = 0
    for count, found in enumerate(TAG.finditer(source)):
        name = found[2].lower()
        if name not in VOID:
            depth = max(0, depth - 1) if found[1] else depth + 1
        if depth > MAX_DEPTH or count > MAX_TAGS:
            return True
    return False


def page(source: str) -> tuple[list[str], Counter[tuple[str, ...]]]:
    """(tokens of the visible body text, multiset of element paths, attributes and CSS declarations)."""
    import html5lib

    root = html5lib.parse(source, treebuilder="etree", namespaceHTMLElements=False)
    words: list[str] = []
    found: Counter[tuple[str, ...]] = Counter()
    stack: list[tuple[Any, str, bool]] = [(root, "", False)]
    while stack:
        element, above, unseen = stack.pop()
        if isinstance(element, str):
            if not unseen:
                words.append(element)
            continue
        if not isinstance(element.tag, str):
            continue  # a comment
        name = element.tag.rsplit("}", 1)[-1].lower()
        path = f"{above}/{name}"
        found["path", path] += 1
        for key, value in element.attrib.items():
            key = key.rsplit("}", 1)[-1].lower() if isinstance(key, str) else str(key)
            if key == "style":
                found.update(("style", name, *pair) for pair in declarations(value))
            elif key != "id" and not key.startswith(("data-", "aria-")):
                found["attribute", name, key, " ".join(value.split())] += 1
        if name == "style" and element.text:
            found.update(rules(element.text))
        hidden = unseen or name in UNSEEN or "hidden" in element.attrib
        hidden = hidden or bool(HIDDEN_STYLE.search(element.attrib.get("style", "")))
        for child in reversed(list(element)):
            if child.tail:
                stack.append((child.tail, path, hidden))
            stack.append((child, path, hidden))
        if element.text:
            stack.append((element.text, path, hidden))
    return tokens(" ".join(words)), found


def declarations(style: str) -> list[tuple[str, str]]:
    """(property, value) pairs of a declaration list, in lower case, blanks collapsed."""
    pairs = []
    for part in style.split(";"):
        name, colon, value = part.partition(":")
        if colon and name.strip():
            pairs.append((name.strip().lower(), " ".join(value.lower().split())))
    return pairs


def rules(sheet: str) -> list[tuple[str, ...]]:
    """("css", selector, property, value) of every declaration of a style sheet."""
    found: list[tuple[str, ...]] = []
    for block in re.sub(r"/\*.*?\*/", "", sheet, flags=re.DOTALL).split("}"):
        selector, brace, body = block.rpartition("{")
        if brace:
            selector = " ".join(selector.rpartition("{")[2].split())
            found += [("css", selector, *pair) for pair in declarations(body)]
    return found


def compare_in_child(gold: str, answer: str) -> dict[str, float]:
    """Text F1 and structure F1 of two pages."""
    gold_words, gold_items = _gold_page(gold)
    words, items = page(answer)
    text = 1.0 if not words and not gold_words else rouge_l(words, gold_words)
    common = sum((items & gold_items).values())
    return {"text": text, "structure": 2 * common / (sum(items.values()) + sum(gold_items.values()))}


_gold_page = lru_cache(maxsize=256)(page)  # once for all responses to a sample


def score_html(answer: str, gold: str, limit_s: float = LIMIT_S) -> tuple[float, str]:
    """(accuracy, status): text times structure (H2); 0 for a text without any element (H3)."""
    if not has_element(answer):
        return 0.0, "malformed"
    if too_deep(answer):
        return 0.0, "refused_cost"
    try:
        result = killable.call("html", [gold, answer], limit_s)
    except killable.Killed as error:
        return 0.0, "timeout" if error.reason == "timeout" else "malformed"
    if "text" not in result:
        return 0.0, "malformed"
    return min(1.0, max(0.0, result["text"] * result["structure"])), "ok"


def read_gold(gold: object) -> str:
    """The gold's source. Raises ValueError without an element."""
    from rewards.source import unwrapped

    if not isinstance(gold, str) or not has_element(gold):
        raise ValueError(f"an html answer must hold at least one element, got {gold!r:.100}")
    if too_deep(gold):
        raise ValueError(f"the html answer nests more than {MAX_DEPTH} elements or has more than {MAX_TAGS} tags")
    return unwrapped(gold, "html")
