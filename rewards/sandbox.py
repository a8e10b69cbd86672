"""Runs untrusted Python for the code tasks (RULES section 15): one process per test, no network, no files.

`run(code, tests, entry)` starts rewards/sandbox_child.py, which moves itself into new Linux namespaces (user, mount,
network, IPC) where the interpreter's library is read-only and everything else is an empty folder, and forks one process
per test with rlimits and a system-call filter. Only code, arguments and stdin enter the sandbox; wanted values stay here.
"""

from __future__ import annotations

import functools
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().parent / "sandbox_child.py"
CPU_S = 5
WALL_S = 7.0  # per test: sleeping counts too
MEMORY_BYTES = 512 << 20
OUTPUT_BYTES = 1 << 20
START_S = 20.0
MAX_CODE_CHARS = 200_000


@dataclass(frozen=True)
class Outcome:
    """What one test gave: `value` (entry tests) or `stdout`; status ok, error, timeout or compile."""

    status: str
    value: Any = None
    stdout: str = ""


@functools.lru_cache(maxsize=1)
def isolation() -> str:
    """ "namespaces", or "filter" where the kernel gives this user no namespaces (said once on stderr)."""
    probe = subprocess.run(
        [sys.executable, "-I", "-S", "-B", str(CHILD), "--probe"], capture_output=True, text=True, timeout=60, env={}
    )
    level = probe.stdout.strip()
    if level not in ("namespaces", "filter"):
        raise RuntimeError(f"the code sandbox does not start: {probe.stderr.strip() or 'no output'}")
    if level == "filter":
        print(
            f"code sandbox: no Linux namespaces here ({probe.stderr.strip()}); falling back to rlimits, a system-call "
            "filter and an audit hook. Allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "docker --security-opt seccomp=unconfined) for full isolation.",
            file=sys.stderr,
        )
    return level


def run(code: str, tests: list[dict[str, Any]], entry: str | None, stop: bool = True) -> list[Outcome]:
    """Outcomes of the tests in order; after the first that is not ok the rest are left out when `stop`.

    tests: {"args": [...]} calls `entry`, {"stdin": text} runs the program. Wanted values must not be among the keys.
    """
    if any(set(test) - {"args", "stdin"} for test in tests):
        raise ValueError("only args and stdin may enter the sandbox")
    if len(code) > MAX_CODE_CHARS:
        return [Outcome("compile")]
    request = json.dumps(
        {
            "code": code,
            "entry": entry,
            "tests": tests,
            "stop": stop,
            "cpu_s": CPU_S,
            "wall_s": WALL_S,
            "memory": MEMORY_BYTES,
            "output": OUTPUT_BYTES,
            "level": isolation(),
        }
    ).encode()
    with tempfile.TemporaryDirectory(prefix="sandbox_") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            return _collect(process, request, len(tests))
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _collect(process: subprocess.Popen, request: bytes, count: int) -> list[Outcome]:
    try:
        process.stdin.write(request)
        process.stdin.close()
    except BrokenPipeError:
        return [Outcome("error")]
    outcomes, buffer = [], b""
    end = time.monotonic() + START_S + WALL_S
    while len(outcomes) < count:
        left = end - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            outcomes.append(Outcome("timeout"))
            break
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            outcomes.append(Outcome("error"))
            break
        buffer += part
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            outcomes.append(_outcome(line))
            end = time.monotonic() + WALL_S + 3
        if len(buffer) > 4 * OUTPUT_BYTES or (outcomes and outcomes[-1].status != "ok"):
            break
    return outcomes or [Outcome("error")]


def _outcome(line: bytes) -> Outcome:
    try:
        given = json.loads(line)
        return Outcome(str(given["status"]), given.get("value"), str(given.get("stdout", "")))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Outcome("error")


def same(value: Any, want: Any, depth: int = 0) -> bool:
    """JSON equality: floats within 1e-6, booleans apart from numbers, lists in order."""
    if depth > 64:
        return False
    if isinstance(value, bool) or isinstance(want, bool) or value is None or want is None:
        return value is want
    if isinstance(value, (int, float)) and isinstance(want, (int, float)):
        if isinstance(value, int) and isinstance(want, int):
            return value == want
        return value == want or (math.isfinite(value) and math.isfinite(want) and abs(value - want) <= 1e-6)
    if isinstance(value, list) and isinstance(want, list):
        return len(value) == len(want) and all(same(a, b, depth + 1) for a, b in zip(value, want))
    if isinstance(value, dict) and isinstance(want, dict):
        return value.keys() == want.keys() and all(same(value[key], want[key], depth + 1) for key in want)
    return type(value) is type(want) and value == want


def same_output(given: str, want: str) -> bool:
    """Equal after stripping trailing blanks of every line and trailing empty lines."""
    return [line.rstrip() for line in given.rstrip().split("\n")] == [
        line.rstrip() for line in want.rstrip().split("\n")
    ]
