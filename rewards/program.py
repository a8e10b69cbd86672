"""code (RULES section 15): 1 when all tests pass in the sandbox, else 0."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from rewards import sandbox
from rewards.source import unwrapped


def read_tests(extra: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """(tests, entry). Raises ValueError for a sample without usable tests (C5)."""
    tests, entry = extra.get("tests"), extra.get("entry")
    if not isinstance(tests, list) or not tests:
        raise ValueError("a code sample needs tests: a list of {args, want} with entry, or of {stdin, stdout}")
    for place, test in enumerate(tests):
        if isinstance(test, dict) and "args" in test and "want" in test:
            if not isinstance(test["args"], list):
                raise ValueError(f"tests[{place}].args must be a list")
            if not isinstance(entry, str) or not entry.isidentifier():
                raise ValueError("tests with args need entry, the name of the function to call")
        elif not (
            isinstance(test, dict) and isinstance(test.get("stdin"), str) and isinstance(test.get("stdout"), str)
        ):
            raise ValueError(f"tests[{place}] is neither {{args, want}} nor {{stdin, stdout}}")
    return tests, entry


def passes(code: str, tests: list[dict[str, Any]], entry: str | None) -> tuple[float, str]:
    """(1.0 or 0.0, status). Only args and stdin enter the sandbox; values are compared here."""
    asked = [{"args": test["args"]} if "args" in test else {"stdin": test["stdin"]} for test in tests]
    outcomes = sandbox.run(code, asked, entry)
    for test, outcome in zip(tests, outcomes):
        if outcome.status != "ok":
            return 0.0, {"timeout": "timeout", "compile": "malformed"}.get(outcome.status, "ok")
        fits = (
            sandbox.same(outcome.value, test["want"])
            if "args" in test
            else sandbox.same_output(outcome.stdout, test["stdout"])
        )
        if not fits:
            return 0.0, "ok"
    return (1.0, "ok") if len(outcomes) == len(tests) else (0.0, "ok")


def read_gold(gold: Any, extra: dict[str, Any]) -> str:
    """The reference, when it passes its own tests. Raises ValueError otherwise."""
    tests, entry = read_tests(extra)
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError("a code sample needs its reference program as answer")
    reference = unwrapped(gold)
    if not _reference_passes(reference, json.dumps(tests), entry):
        raise ValueError("the reference program fails its own tests")
    return reference


@lru_cache(maxsize=10_000)
def _reference_passes(reference: str, tests: str, entry: str | None) -> bool:
    return passes(reference, json.loads(tests), entry)[0] == 1.0
