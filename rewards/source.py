"""Where source code stands in an answer: code, svg and html (RULES G4, C5, V3)."""

from __future__ import annotations

import re

from rewards.extraction import NO_ANSWER, SEVERAL, Reading, Task, clean, fenced

CODE_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|```)", re.DOTALL)
STARTS = {"svg": re.compile(r"<svg\b", re.IGNORECASE), "html": re.compile(r"<(?:!doctype|[a-z])", re.IGNORECASE)}
ENDS = {"svg": "</svg>", "html": ">"}


def fences(text: str) -> list[str]:
    """Contents of the code fences, identical ones once."""
    return list(dict.fromkeys(found[1].strip("\n") for found in CODE_FENCE.finditer(text)))


def unwrapped(text: str, language: str = "code") -> str:
    """The source inside one fence, or the text itself."""
    whole = fenced(text.strip())
    if whole is not None:
        return whole
    return text.strip("\n") if language == "code" else text.strip()


def source_task(language: str) -> Task:
    """The reader for code, svg or html: one fence is unwrapped, several different ones are several answers."""

    def read(text: str, place: str) -> Reading:
        found = fences(text)
        if len(found) > 1:
            return SEVERAL
        if found:
            value = found[0]
        elif language == "code":
            value = text.strip("\n")
        else:
            value = clean(text)
            start, end = STARTS[language].search(value), value.lower().rfind(ENDS[language])
            if place == "bare" and start and end > start.start():
                value = value[start.start() : end + len(ENDS[language])]
        if value.startswith("`") and value.endswith("`"):
            value = value.strip("`")
        return Reading(value, key=" ".join(value.split())) if value.strip() else NO_ANSWER

    return Task(read=read, kind="source", statements=())
