"""Work that may never end, in a child process that is killed when its time is over.

`call("math", [gold, answer], limit_s=4)` keeps one child per kind and process, started on first use. It imports the
libraries once and forks the process that works; after a kill it forks the next one, which takes milliseconds, so that a
hostile expression costs its own score and nothing else. All of them die with their parent.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().parent / "child.py"
START_LIMIT_S = 120.0
FIRST_LOOK_S = 0.25  # before the processor time is looked at
WAIT = 1.25  # of the limit, on the clock, for a worker that gets too little processor


class Killed(RuntimeError):
    """The work did not end in time, or its process died. `reason` is timeout or crash."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Child:
    """One child process of one kind and the lock that gives it one task at a time.

    `worker` is the process that a kill ends: the child itself, or the one that it forked for the work.
    """

    kind: str
    process: subprocess.Popen | None = None
    owner: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    buffer: bytes = b""
    worker: int | None = None  # None until it has said that it is ready

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(CHILD), self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if self.kind == "score" else subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.owner, self.buffer, self.worker = os.getpid(), b"", None

    def wait_ready(self) -> None:
        """Raises RuntimeError when the child does not come up."""
        end = time.monotonic() + START_LIMIT_S
        while self.worker is None:
            try:
                line = self.read(end - time.monotonic())
            except Killed:
                line = None
            if line is None:
                self.kill()
                raise RuntimeError(
                    f"the {self.kind} scorer does not start; is math-verify, resvg-py and html5lib installed "
                    f"for {sys.executable}? (try: {sys.executable} {CHILD} {self.kind})"
                )
            self.worker = _ready(line)  # anything else is the result of one that was killed while it answered

    def kill(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                pipe.close()
        self.process = self.worker = None

    def kill_worker(self) -> None:
        """Ends the work; the child stays and forks the next worker."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker, signal.SIGKILL)
        self.worker = None

    def send(self, payload: Any) -> None:
        """One JSON line to the child. Raises BrokenPipeError when it is gone."""
        self.process.stdin.write(json.dumps(payload, default=_plain).encode() + b"\n")
        self.process.stdin.flush()

    def read(self, timeout_s: float, busy_s: float = math.inf) -> Any:
        """One JSON line from the child; None when it died.

        Raises Killed, and kills, after `timeout_s` on the clock or when the worker has used `busy_s` of processor time
        since its start.
        """
        end = time.monotonic() + timeout_s
        pipe = self.process.stdout
        wait = min(timeout_s, FIRST_LOOK_S)
        while b"\n" not in self.buffer:
            if wait <= 0:
                self.kill_worker() if self.worker else self.kill()
                raise Killed("timeout")
            if select.select([pipe], [], [], wait)[0]:
                part = os.read(pipe.fileno(), 65536)
                if not part:
                    return None
                self.buffer += part
                continue
            wait = end - time.monotonic()
            if self.worker and busy_s < math.inf:
                spare = busy_s - self.busy_s()
                wait = min(wait, max(spare, 0.05) if spare > 0 else 0)
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def busy_s(self) -> float:
        """Processor seconds of the worker so far; 0.0 where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ensure(self) -> None:
        """Starts the child unless this process has a living one."""
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.process = None
            self.start()
        elif self.worker and (self.buffer or select.select([self.process.stdout], [], [], 0)[0]):
            self.worker = None  # it died while it waited: the next one has spoken, or the child ends
        self.wait_ready()

    def call(self, payload: Any, limit_s: float) -> Any:
        """The worker's result. Raises Killed after `limit_s` of its processor time, or WAIT times that on the clock."""
        with self.lock:
            self.ensure()
            busy_s = self.busy_s()
            try:
                self.send(payload)
                result = self.read(WAIT * limit_s, busy_s + limit_s)
            except BrokenPipeError:
                result = None
            if result is None:
                self.kill()
                raise Killed("crash")
            if _ready(result):  # it died and the child has forked another
                self.worker = _ready(result)
                raise Killed("crash")
            return result


def _ready(line: Any) -> int | None:
    """The process id in {"ready": id}, a worker's first line."""
    return line.get("ready") if isinstance(line, dict) else None


CHILDREN: dict[str, Child] = {kind: Child(kind) for kind in ("math", "svg", "html")}


def call(kind: str, payload: Any, limit_s: float) -> Any:
    """Result of one task. Raises Killed when it takes longer than `limit_s` or takes its process down."""
    return CHILDREN[kind].call(payload, limit_s)


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
