"""Several engines side by side: one process (rank) each, which share nothing but the run folder.

A rank answers its share of the videos into a file of its own; rank 0 waits for the others, puts the files together and
reports.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from data.records import Sample
from evaluate import _predictions as store
from evaluate._annotations import AnnotationError


def rank_and_world() -> tuple[int, int]:
    """Rank of a torchrun or --data_parallel launch. The variables are taken away: vLLM would read them as its own."""
    rank, world = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1))
    for name in ("LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    return rank, world


def take_gpus(rank: int, count: int) -> None:
    """Leaves this process the GPUs of its rank: `count` neighbours of those visible."""
    local = int(os.environ.pop("LOCAL_RANK", rank))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    mine = range(local * count, (local + 1) * count)
    if visible and len(visible) < (local + 1) * count:
        raise AnnotationError(f"rank {rank} needs GPUs {list(mine)}, visible are {visible}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] if visible else str(i) for i in mine)


def launch(args: argparse.Namespace, arguments: list[str]) -> int:
    """--data_parallel N: N copies of this program, one per engine. Rank 0 waits for the others and reports."""
    ranks = []
    for rank in range(args.data_parallel):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(args.data_parallel), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, sys.argv[0], *arguments], env=env))
    statuses: dict[int, int] = {}
    try:
        while len(statuses) < len(ranks):
            for rank, process in enumerate(ranks):
                if rank not in statuses and process.poll() is not None:
                    statuses[rank] = process.returncode
                    if process.returncode not in (0, 3):
                        print(f"rank {rank} ended with {process.returncode}; run the command again to go on")
                        for other in ranks:
                            other.terminate()
            time.sleep(0.2)  # between looks at child processes, whose ends no other event announces here
    finally:  # Ctrl-C, which may have been sent to this process alone
        for process in ranks:
            if process.poll() is None:
                process.terminate()
    return max(abs(status) for status in statuses.values())


@contextmanager
def ends_told(folder: Path, place: tuple[int, int]) -> Iterator[None]:
    """Leaves a mark in the run folder when a rank other than 0 gives up and goes on elsewhere: rank 0 waits for its rows."""
    try:
        yield
    except BaseException:
        if place[0]:
            mark_of(folder, *place).touch()
        raise


def mark_of(folder: Path, rank: int, world: int) -> Path:
    return folder / f"given_up.{rank}-of-{world}"


def wait_for_ranks(folder: Path, kept: list[Sample], world: int) -> None:
    """Rank 0 waits until every rank has a row for all of its share or has given up; a launcher stops it if another rank
    dies. Their files may be put together then: nobody writes to them any more."""
    shares = {rank: {sample.id for sample in store.share(kept, rank, world)} for rank in range(world)}
    launched_at = psutil.Process(os.getppid()).create_time()  # a mark that is older was left by another launch
    while True:
        marks = [mark for rank in shares if (mark := mark_of(folder, rank, world)).exists()]
        given_up = [mark for mark in marks if mark.stat().st_mtime >= launched_at]
        rows = store.read_predictions(folder).keys()
        if all(share <= rows or mark_of(folder, rank, world) in given_up for rank, share in shares.items()):
            break
        time.sleep(1)  # the ranks share nothing but the folder
    for mark in marks:
        mark.unlink()
