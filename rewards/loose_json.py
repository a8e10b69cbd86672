"""JSON as models write it: single quotes, tuples, trailing commas, bare words, a missing closing bracket.

One recursive-descent reader with a depth limit (RULES G15: deeper than 64 levels or longer than 200,000 characters is
malformed) and a step budget, so that hostile text costs linear time. Objects keep repeated keys.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_DEPTH = 64
MAX_CHARS = 200_000
MAX_STEPS = 200_000  # values read per text, over all starting points

SPACE = re.compile(r"\s*")
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?![\w:.])")
WORD = re.compile(r"[^\s,:;\[\]{}()\"'=]+(?::\d+)*(?:\.\d+)?")  # bare words and clock times: 24.3s, 01:10, NaN, null
STRING = {quote: re.compile(rf"{quote}([^{quote}\\]*(?:\\.[^{quote}\\]*)*){quote}", re.DOTALL) for quote in "\"'"}
UNIT_AFTER = re.compile(r"\s+(?:[A-Za-z]{1,8}|秒|分钟|分|小时)(?=\s*[,\])}])")  # 24.3 s
KEY = re.compile(r"[^\s:=,{}\[\]()\"']+")
WORDS = {"true": True, "false": False, "null": None, "none": None}
CLOSING = {"{": "}", "[": "]", "(": ")"}
ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class NotJson(ValueError):
    """The text at this place is not a value. `final` means that no other place of the text needs trying."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True)
class Obj:
    """A JSON object as its (key, value) pairs in order, repeated keys included."""

    pairs: tuple[tuple[str, Any], ...]

    def get(self, *names: str) -> list[Any]:
        """Values of every pair whose key, trimmed and lower-cased, is one of `names`."""
        return [value for key, value in self.pairs if key.strip().lower() in names]

    def repeats(self) -> bool:
        return len({key for key, _ in self.pairs}) < len(self.pairs)


class Num(NamedTuple):
    """A number as it was written; `value` is float, inf when it overflows or has more than 400 digits."""

    text: str

    @property
    def value(self) -> float:
        if len(self.text) > 400:
            return float("inf")
        return float(self.text)


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.steps = 0

    def skip(self, at: int) -> int:
        return SPACE.match(self.text, at).end()

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        self.steps += 1
        if self.steps > MAX_STEPS or depth > MAX_DEPTH:
            raise NotJson("too deep or too long", final=True)
        at = self.skip(at)
        mark = self.text[at : at + 1]
        if mark == "{":
            return self.object(at + 1, depth + 1)
        if mark in ("[", "("):
            return self.sequence(at + 1, CLOSING[mark], depth + 1)
        return self.scalar(at)

    def scalar(self, at: int) -> tuple[Any, int]:
        mark = self.text[at : at + 1]
        if mark in STRING:
            found = STRING[mark].match(self.text, at)
            if not found:
                raise NotJson("string without end")
            return ESCAPE.sub(_unescape, found[1]), found.end()
        found = NUMBER.match(self.text, at)
        if found:
            unit = UNIT_AFTER.match(self.text, found.end())
            return (found[0] + unit[0], unit.end()) if unit else (Num(found[0]), found.end())
        found = WORD.match(self.text, at)
        if not found:
            raise NotJson("no value")
        word = found[0]
        return WORDS.get(word.lower(), word), found.end()

    def sequence(self, at: int, closing: str, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        while True:
            at = self.skip(at)
            if at >= len(self.text):
                return self._unclosed(items), at
            if self.text[at] == closing:
                return items, at + 1
            item, at = self.value(at, depth)
            items.append(item)
            at = self.skip(at)
            if self.text[at : at + 1] == ",":
                at += 1
            elif at < len(self.text) and self.text[at] != closing:
                if self.text[at] in "}])":  # a closing bracket was left out: the outer one ends both
                    return items, at
                raise NotJson("no comma between values")

    def object(self, at: int, depth: int) -> tuple[Obj, int]:
        pairs: list[tuple[str, Any]] = []
        while True:
            at = self.skip(at)
            if at >= len(self.text):
                return Obj(tuple(self._unclosed(pairs))), at
            if self.text[at] == "}":
                return Obj(tuple(pairs)), at + 1
            key, at = self.key(at)
            value, at = self.value(at, depth)
            pairs.append((key, value))
            at = self.skip(at)
            if self.text[at : at + 1] in (",", ";"):
                at += 1
            elif at < len(self.text) and self.text[at] != "}":
                if self.text[at] in "])":
                    return Obj(tuple(pairs)), at
                raise NotJson("no comma between pairs")

    def key(self, at: int) -> tuple[str, int]:
        mark = self.text[at]
        if mark in STRING:
            name, at = self.scalar(at)
        else:
            found = KEY.match(self.text, at)
            if not found:
                raise NotJson("no key")
            name, at = found[0], found.end()
        at = self.skip(at)
        if self.text[at : at + 1] not in (":", "="):
            raise NotJson("no colon after key")
        return name, at + 1

    @staticmethod
    def _unclosed(items: list[Any]) -> list[Any]:
        if not items:
            raise NotJson("bracket without content or end")
        return items


def _unescape(found: re.Match[str]) -> str:
    mark = found[1]
    if len(mark) == 5:
        return chr(int(mark[1:], 16))
    return ESCAPES.get(mark, mark)


PROPER = json.JSONDecoder(
    object_pairs_hook=lambda pairs: Obj(tuple(pairs)), parse_int=Num, parse_float=Num, parse_constant=str
)


def _depth(text: str) -> int:
    """Deepest nesting of brackets, those inside strings included."""
    depth = deepest = 0
    for mark in re.findall(r"[\[\]{}]", text):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def find_values(text: str, openers: str = "{[(") -> list[tuple[Any, int, int]]:
    """Every outermost object or sequence in the text as (value, start, end).

    Raises NotJson when the text is too deep or too long to be read.

    >>> find_values('at [1, 2] or {"a": 3}')
    [([Num(text='1'), Num(text='2')], 3, 9), (Obj(pairs=(('a', Num(text='3')),)), 13, 21)]
    """
    if len(text) > MAX_CHARS:
        raise NotJson("too long", final=True)
    reader = _Reader(text)
    found: list[tuple[Any, int, int]] = []
    opener = re.compile("[" + re.escape(openers) + "]")
    at, proper = 0, _depth(text) <= MAX_DEPTH
    while match := opener.search(text, at):
        start = match.start()
        if proper and text[start] != "(":  # proper JSON, in C; after the first text that is none, the loose reader
            try:
                value, at = PROPER.raw_decode(text, start)
                found.append((value, start, at))
                continue
            except ValueError:
                proper = False
        try:
            value, at = reader.value(start, 0)
        except NotJson as error:
            if error.final:
                raise
            at = start + 1
            continue
        found.append((value, start, at))
    return found


def read_value(text: str) -> Any:
    """The whole text as one value. Raises NotJson if it is anything else."""
    if len(text) > MAX_CHARS:
        raise NotJson("too long", final=True)
    reader = _Reader(text)
    value, at = reader.value(0, 0)
    if reader.skip(at) != len(text):
        raise NotJson("text after the value")
    return value


def from_native(value: Any) -> Any:
    """A gold given as real JSON (list, dict, number) in the same shapes as a parsed text."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return Num(repr(value))
    if isinstance(value, dict):
        return Obj(tuple((str(key), from_native(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return [from_native(item) for item in value]
    raise NotJson(f"{type(value).__name__} is not JSON")
