"""Work that may never end, in a child process that is killed when its time is over.

`call("math", [gold, answer], timeout_s=5)` keeps one child per kind and process, started on first use and again after a
kill, so that a hostile expression costs its own score and nothing else. The child dies with its parent.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().parent / "child.py"
START_LIMIT_S = 120.0
WAIT = 3  # of the limit, on the clock, for a child that gets no processor


class Killed(RuntimeError):
    """The work did not end in time, or its process died. `reason` is timeout or crash."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Child:
    """One child process of one kind and the lock that gives it one task at a time."""

    kind: str
    process: subprocess.Popen | None = None
    owner: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    buffer: bytes = b""
    ready: bool = False

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(CHILD), self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if self.kind == "score" else subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.owner, self.buffer, self.ready = os.getpid(), b"", False

    def wait_ready(self) -> None:
        """Raises RuntimeError when the child does not come up."""
        if self.ready:
            return
        self.ready = self.read(START_LIMIT_S) == "ready"
        if not self.ready:
            self.kill()
            raise RuntimeError(
                f"the {self.kind} scorer does not start; is math-verify, resvg-py and html5lib installed "
                f"for {sys.executable}? (try: {sys.executable} {CHILD} {self.kind})"
            )

    def kill(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                pipe.close()
        self.process = None

    def send(self, payload: Any) -> None:
        """One JSON line to the child. Raises BrokenPipeError when it is gone."""
        self.process.stdin.write(json.dumps(payload, default=_plain).encode() + b"\n")
        self.process.stdin.flush()

    def read(self, timeout_s: float, busy_s: float = 0.0) -> Any:
        """One JSON line from the child; None when it died. Raises Killed on time-out.

        With `busy_s`, the processor time the child had used before, `timeout_s` is processor time, so that a busy
        machine does not decide a score; the clock then ends the wait at WAIT times the limit.
        """
        end = time.monotonic() + timeout_s * (WAIT if busy_s else 1)
        pipe = self.process.stdout
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            spent = busy_s and self.busy_s() - busy_s
            if left <= 0 or spent >= timeout_s:
                self.kill()
                raise Killed("timeout")
            if not select.select([pipe], [], [], min(left, max(0.05, timeout_s - spent)))[0]:
                continue
            part = os.read(pipe.fileno(), 65536)
            if not part:
                return None
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def busy_s(self) -> float:
        """Processor seconds of the child so far; 0.0 where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ensure(self) -> None:
        """Starts the child unless this process has a living one."""
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.process = None
            self.start()
        self.wait_ready()

    def call(self, payload: Any, timeout_s: float) -> Any:
        with self.lock:
            self.ensure()
            try:
                busy_s = self.busy_s()
                self.send(payload)
                result = self.read(timeout_s, busy_s)
            except Killed:
                self.start()  # imports while the next responses of other kinds are scored
                raise
            except BrokenPipeError:
                result = None
            if result is None:
                self.kill()
                self.start()
                raise Killed("crash")
            return result


CHILDREN: dict[str, Child] = {kind: Child(kind) for kind in ("math", "svg", "html")}


def call(kind: str, payload: Any, timeout_s: float) -> Any:
    """Result of one task. Raises Killed when it takes longer than `timeout_s` or takes its process down."""
    return CHILDREN[kind].call(payload, timeout_s)


def ensure(kind: str) -> None:
    """Starts the child of a kind: its start costs seconds that no response should be charged for."""
    with CHILDREN[kind].lock:
        CHILDREN[kind].ensure()


def _plain(value: Any) -> Any:
    """numpy scalars and arrays as JSON. Raises TypeError for what has no plain form."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be sent to a scoring process")


@atexit.register
def stop_children() -> None:
    for child in CHILDREN.values():
        child.kill()
