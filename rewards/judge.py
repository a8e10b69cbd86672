"""A language model as judge for open-ended answers and pairs of answers (RULES section 18).

Two backends behind one interface: an OpenAI-compatible endpoint (`url`, `model`), or `generate`, a function from a list
of prompts to a list of replies (evaluation passes its own engine). The judged answer is the extracted one and goes in as
a JSON string; the verdict is read from the judge's reply alone. A reply without exactly one verdict is "failed", asked
again, counted, and never a silent score.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from rewards.extraction import THINK_OPEN, Several, clean, final_part, peel

PROMPTS = Path(__file__).resolve().parent / "judge_prompts"
MAX_FIELD_CHARS = 20_000
LINE = re.compile(
    r"[\s*_#>-]*(?:judge?ment|verdict)[\s*_]*[:：=][\s*_]*[\[(]?[\s*_]*([01])[\s*_]*[\])]?[\s*_]*[.。]?\s*",
    re.IGNORECASE,
)
LABEL_LINE = re.compile(r"[\s*_#>-]*(?:judge?ment|verdict)\b", re.IGNORECASE)
WHOLE = {"1": 1, "0": 0, "consistent": 1, "correct": 1, "inconsistent": 0, "incorrect": 0}
COMPARED = re.compile(
    r"[\s*_#>-]*(?:judge?ment|verdict)[\s*_]*[:：=][\s*_]*[\[(]?[\s*_]*(1|2|tie)[\s*_]*[\])]?[\s*_]*[.。]?\s*",
    re.IGNORECASE,
)
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
Failed = Literal["failed"]


def parse_verdict(reply: object) -> int | None:
    """1, 0, or None when the reply does not hold exactly one verdict (J1, J2).

    >>> [parse_verdict(t) for t in ("**Judgement: 1**", "Verdict = [0]", "Judgement: 0/1", "The answer 10", "correct.")]
    [1, 0, None, None, 1]
    """
    return _parse(reply, LINE, WHOLE, int)


def parse_comparison(reply: object) -> str | None:
    """ "1", "2", "tie", or None."""
    return _parse(reply, COMPARED, {"1": "1", "2": "2", "tie": "tie"}, str.lower)


def _parse(reply: object, line: re.Pattern[str], whole: dict[str, Any], convert: Callable[[str], Any]) -> Any:
    if not isinstance(reply, str) or len(reply) > 200_000:
        return None
    text = final_part(reply)
    if text is None or THINK_OPEN.search(text):
        return None
    try:
        text = peel(clean(text))
    except Several:
        return None
    word = text.strip().strip("*_`.。!").strip().casefold()
    if word in whole:
        return whole[word]
    found = set()
    for part in text.split("\n"):
        if LABEL_LINE.match(part):
            match = line.fullmatch(part)
            found.add(convert(match[1]) if match else None)
    return found.pop() if len(found) == 1 else None


@dataclass
class Judge:
    """Grades and compares. Safe to call from several threads; requests run in one background event loop.

    wording: name of a file in rewards/judge_prompts, or a path. concurrency: requests in flight. attempts: tries of one
    request (backoff 0.5, 1, 2 … s with jitter). cache: a JSON-lines file that keeps replies by content.
    """

    url: str | None = None
    model: str | None = None
    wording: str = "general"
    generate: Callable[[list[str]], list[str]] | None = None
    concurrency: int = 16
    attempts: int = 4
    timeout_s: float = 60.0
    max_tokens: int = 512
    backoff_s: float = 0.5
    cache: str | None = None
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if (self.generate is None) == (self.url is None):
            raise ValueError("a judge needs --judge_url with --judge_model, or a generate function, and not both")
        if self.url is not None and not self.model:
            raise ValueError("--judge_url needs --judge_model")
        self.prompt = _wording(self.wording)
        self.comparing = _wording("compare")
        name = self.model or "generate"
        self.identity = f"{name}/{self.wording}/{hashlib.sha256(self.prompt.encode()).hexdigest()[:12]}"
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        if self.cache and Path(self.cache).is_file():
            for line in Path(self.cache).read_text(encoding="utf-8").split("\n"):  # splitlines() would cut at U+2028
                try:
                    row = json.loads(line)
                    self._known[row["key"]] = row["reply"]
                except (ValueError, KeyError):
                    continue  # a last line cut by a kill

    def grade(self, question: str, reference: str, answer: str) -> int | Failed:
        """1 right, 0 wrong, "failed" when two replies held no verdict."""
        return self.grade_many([(question, reference, answer)])[0]

    def grade_many(self, rows: list[tuple[str, str, str]]) -> list[int | Failed]:
        """Verdicts of (question, reference, answer) triples in order."""
        prompts = [
            self.prompt.format(question=quoted(question), reference=quoted(reference), answer=quoted(answer))
            for question, reference, answer in rows
        ]
        return self._verdicts(prompts, parse_verdict)

    def compare(self, question: str, first: str, second: str) -> str:
        """ "1", "2", "tie" or "failed". Asked in both orders; two answers that disagree are a tie."""
        prompts = [
            self.comparing.format(question=quoted(question), first=quoted(a), second=quoted(b))
            for a, b in ((first, second), (second, first))
        ]
        one, other = self._verdicts(prompts, parse_comparison)
        if "failed" in (one, other):
            return "failed"
        return one if {"1": "2", "2": "1", "tie": "tie"}[other] == one else "tie"

    def _verdicts(self, prompts: list[str], parse: Callable[[object], Any]) -> list[Any]:
        replies = self._ask(prompts, fresh=False)
        verdicts = [parse(reply) for reply in replies]
        again = [place for place, verdict in enumerate(verdicts) if verdict is None]
        if again:
            self.count(retried_verdicts=len(again))
            for place, reply in zip(again, self._ask([prompts[place] for place in again], fresh=True)):
                verdicts[place] = parse(reply)
        failed = sum(verdict is None for verdict in verdicts)
        self.count(judged=len(prompts), failed=failed)
        return ["failed" if verdict is None else verdict for verdict in verdicts]

    def count(self, **news: int) -> None:
        with self._lock:
            self.counts.update(news)

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.model}\0{prompt}".encode()).hexdigest()

    def _ask(self, prompts: list[str], fresh: bool) -> list[str | None]:
        """Replies in order, None where the backend gave none; known ones come from the cache unless `fresh`."""
        keys = [self._key(prompt) for prompt in prompts]
        known = {} if fresh else {key: self._known[key] for key in keys if key in self._known}
        waiting = list(dict.fromkeys(key for key in keys if key not in known))
        texts = dict(zip(keys, prompts))
        self.count(cached=len(keys) - len(waiting))
        if waiting and self.generate is not None:
            answered = self.generate([texts[key] for key in waiting])
            if len(answered) != len(waiting):
                raise ValueError(f"the judge's generate gave {len(answered)} replies to {len(waiting)} prompts")
            self.count(requests=len(waiting))
        elif waiting:
            job = asyncio.run_coroutine_threadsafe(self._post_all([texts[key] for key in waiting]), self._started())
            answered = job.result()
        else:
            answered = []
        for key, reply in zip(waiting, answered):
            if reply is not None:
                known[key] = reply
                self._keep(key, reply)
        return [known.get(key) for key in keys]

    def _keep(self, key: str, reply: str) -> None:
        with self._lock:
            self._known[key] = reply
            if self.cache:
                Path(self.cache).parent.mkdir(parents=True, exist_ok=True)
                with open(self.cache, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._slots = asyncio.Semaphore(self.concurrency)
                threading.Thread(target=self._loop.run_forever, name="judge", daemon=True).start()
            return self._loop

    async def _post_all(self, prompts: list[str]) -> list[str | None]:
        key = os.environ.get("OPENAI_API_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(timeout=self.timeout_s, headers=headers) as client:
            return list(await asyncio.gather(*(self._post(client, prompt) for prompt in prompts)))

    async def _post(self, client: httpx.AsyncClient, prompt: str) -> str | None:
        address = self.url.rstrip("/")
        address += "" if address.endswith("/chat/completions") else "/chat/completions"
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        for attempt in range(self.attempts):
            if attempt:
                await asyncio.sleep(self.backoff_s * 2 ** (attempt - 1) * (1 + random.random() / 2))
                self.count(retries=1)
            async with self._slots:
                try:
                    self.count(requests=1)
                    answer = await client.post(address, json=body)
                except httpx.TransportError:
                    continue
            if answer.status_code in RETRIED:
                continue
            if answer.status_code != 200:
                self.count(refused=1)
                return None
            try:
                reply = answer.json()
                text = reply["choices"][0]["message"]["content"]
                usage = reply.get("usage") or {}
            except (ValueError, KeyError, IndexError, TypeError):
                continue
            tokens = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
            self.count(**{name: count for name, count in tokens.items() if isinstance(count, int)})
            return text if isinstance(text, str) else None
        self.count(unreachable=1)
        return None


def quoted(text: str) -> str:
    """One JSON string on one line: nothing in it can look like a line of the prompt."""
    return json.dumps(text[:MAX_FIELD_CHARS], ensure_ascii=False)


def _wording(name: str) -> str:
    path = PROMPTS / f"{name}.txt" if re.fullmatch(r"[a-z0-9_]+", name) else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.txt")))
        raise ValueError(f"judge wording {name!r} cannot be read ({error}); known: {known}, or give a path") from error
