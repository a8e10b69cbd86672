"""The process behind rewards/killable.py: reads one JSON task per line, writes one JSON result per line.

python rewards/child.py math|svg|html|score
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

sys.path[0] = str(Path(__file__).resolve().parent.parent)

MEMORY_BYTES = 4 << 30
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="5" height="5"/></svg>'
FIRST_TASK = {
    "math": ("\\frac{1}{2}", "0.5"),
    "svg": (SQUARE, SQUARE),
    "html": ("<p>first words</p>", "<p>other words</p>"),
}


def serve(kind: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # libraries print; the answers have a pipe of their own
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if kind == "score":
        from rewards.pool import serve_scores

        print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
        serve_scores(sys.stdin, lambda row: print(json.dumps(row), file=answers, flush=True))
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if kind == "math":
        from rewards.mathematics import equal_in_child as work
    elif kind == "svg":
        from rewards.svg import compare_in_child as work
    elif kind == "html":
        from rewards.page import compare_in_child as work
    else:
        raise SystemExit(f"unknown kind {kind!r}")
    work(*FIRST_TASK[kind])  # what the libraries build on first use is not the first response's to pay
    gc.collect()
    gc.freeze()  # what was imported stays shared with the workers
    while True:
        worker = os.fork()
        if worker == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            work_off(work, answers)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if status == 0:
            return  # no more tasks


def work_off(work: Callable[..., Any], answers: TextIO) -> None:
    """The worker: reads tasks until the pipe ends. Its parent forks the next one when it is killed."""
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            result = work(*json.loads(line))
        except FAILURES as error:
            result = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1] if len(sys.argv) > 1 else "")
