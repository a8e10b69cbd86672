"""Prompts for the trainer, in the order's sequence, encoded in background threads while the policy trains.

A sample that fails to load or is too long is noted once in failed.jsonl and replaced on its own replica by another sample,
drawn by a rule that depends only on the seed and the position: no collective is involved, so no rank can wait for another.
"""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data.records import Prompt, Sample

MOST_REPLACEMENTS = 20


class PromptLoader:
    """Encoded prompts of one data-parallel replica.

    order: gives samples by position (`take(position, n)`); encoder: Sample -> Prompt, raising ValueError for a sample that
    cannot be used. Replica r of W takes positions r, r + W, r + 2W ... of each request, so that the set of prompts of a step
    does not depend on W. `position` counts samples drawn over all replicas: saving it is enough to resume.
    """

    def __init__(self, order, encoder, *, replica=0, replicas=1, seed=0, position=0, failed_file=None, workers=1):
        self.order, self.encoder = order, encoder
        self.replica, self.replicas, self.seed, self.position = replica, replicas, seed, position
        self.failed_file = Path(failed_file) if failed_file else None
        self.failed: dict[str, str] = {}  # sample id -> reason
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="encode")
        self._lock = threading.Lock()  # the order remembers its current epoch; a failure is noted once
        self._ahead: dict[int, Future[Prompt]] = {}  # position -> its prompt, being encoded

    def take(self, n: int) -> list[Prompt]:
        """This replica's share of the next n samples; n must be a multiple of the number of replicas."""
        if n % self.replicas:
            raise ValueError(f"cannot share {n} prompts over {self.replicas} replicas evenly")
        futures = [self._start(position) for position in self._mine(n)]
        for position in self._mine(n):
            self._ahead.pop(position)
        self.position += n
        return [future.result() for future in futures]

    def prefetch(self, n: int) -> None:
        """Begin to encode what the next take(n) will return."""
        for position in self._mine(n):
            self._start(position)

    def close(self) -> None:
        """Drop what is being encoded ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _mine(self, n: int) -> range:
        return range(self.position + self.replica, self.position + n, self.replicas)

    def _start(self, position: int) -> Future[Prompt]:
        if position not in self._ahead:
            self._ahead[position] = self._pool.submit(self._encode, position)
        return self._ahead[position]

    def _encode(self, position: int) -> Prompt:
        with self._lock:
            (sample,), _ = self.order.take(position, 1)
        for attempt in range(MOST_REPLACEMENTS):
            if sample.id not in self.failed:
                try:
                    return self.encoder.encode(sample)
                except (ValueError, OSError) as error:
                    if getattr(error, "stops_the_run", False):
                        raise
                    self._note(sample, str(error))
            sample = random.Random(f"{self.seed}/{position}/{attempt}").choice(self.order.samples)
        raise RuntimeError(
            f"{MOST_REPLACEMENTS} samples in a row could not be used, last: {sample.file}:{sample.line}: "
            f"{self.failed.get(sample.id, 'unknown')}. Run data/preprocess.py with --check_gold over the dataset"
        )

    def _note(self, sample: Sample, reason: str) -> None:
        with self._lock:
            known = sample.id in self.failed
            self.failed[sample.id] = reason
        if self.failed_file is not None and not known:
            row = {
                "file": sample.file,
                "line": sample.line,
                "id": sample.id,
                "path": _first_path(sample),
                "reason": reason,
            }
            row["remedy"] = "repair or remove the row; data/preprocess.py finds such rows before training"
            self.failed_file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.failed_file, "a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _first_path(sample: Sample) -> str | None:
    return next((media.path for media in sample.media if media.path), None)
