"""Decoding processes that can be killed: one per core, a time limit per video, a dead one replaced.

A decoder is C code that may loop or crash on a damaged file, and no signal handler or thread reaches into it; a process
of its own does. Workers import the decoder and, if a video must be resized, torch; nothing of vLLM.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data.decode import MediaError
from data.frame_cache import FrameCache
from data.frame_file import DamagedCacheFile, read_entry, temporary_name
from data.records import Media
from data.video import VideoSettings, image_pixels


def work(connection: Connection, cache_dir: str, options: dict[str, Any], settings: VideoSettings) -> None:
    """One process: takes a Media, answers {"bytes", "frames", "duration_s", "cpu_s"}, {"reason", "remedy"} or {"fatal"}."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["OMP_NUM_THREADS"] = "1"  # one process per core is enough; for a torch that is yet to be imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    cache = FrameCache(cache_dir, "prefer", **options)
    while True:
        try:
            media = connection.recv()
        except EOFError:  # the parent is gone
            return
        started = time.process_time()
        try:
            if media.kind == "image":
                image_pixels(media)
                answer = {"bytes": 0, "frames": 0}
            else:
                frames, size = cache.store(media, settings)
                answer = {"bytes": size, "frames": len(frames.indices), "duration_s": frames.duration_s}
            answer["cpu_s"] = time.process_time() - started
        except MediaError as error:
            answer = {"reason": error.reason, "remedy": error.remedy}
        except MemoryError:
            answer = {"reason": "does not fit in memory", "remedy": "lower --max_frames or --video_max_pixels"}
        except OSError as error:  # the cache's disk, not the video
            answer = {"fatal": f"--cache_dir {cache_dir}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            connection.send(answer)


@dataclass
class Worker:
    process: multiprocessing.Process
    connection: Connection
    media: Media | None = None  # what it is decoding
    key: str = ""
    deadline: float = 0.0


def start_worker(arguments: tuple) -> Worker:
    # A server that has everything loaded and forks on request: a new worker starts at once and shares the pages.
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def run_jobs(
    jobs: list[Media], cache: FrameCache, settings: VideoSettings, options, workers: int, timeout_s: float
) -> Iterator[tuple[Media, dict[str, Any]]]:
    """Yields (medium, answer) for every job, in the order of their ending.

    A job over its time, or whose process dies, is answered with a reason and its process is replaced. Two jobs of the
    same content and setting never run at the same time: the second finds the first one's file.
    """
    todo, team, busy_keys = deque(jobs), [], set()
    # The program itself comes first: it makes `data` importable in the server. torch takes longer than a thousand small
    # images, which do not need it. (Only the first call of a process has a say: the server stays.)
    decodes = any(media.kind == "video" and not _is_cached(cache, media, settings) for media in jobs)
    preload = ["__main__", "data.decode_pool", *(["torch"] if decodes else [])]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    try:
        while todo or any(worker.media is not None for worker in team):
            for _ in range(len(todo)):
                free = next((worker for worker in team if worker.media is None), None)
                if free is None and len(team) >= workers:
                    break
                media = todo.popleft()
                try:
                    key = cache.key(media, settings) if media.kind == "video" else ""
                    if key and os.path.exists(path := cache.path(media, settings)):
                        yield media, {"cached": True, "duration_s": read_entry(path).header["duration_s"]}
                        continue
                except DamagedCacheFile:
                    pass  # decoded again and replaced
                except MediaError as error:
                    yield media, {"reason": error.reason, "remedy": error.remedy}
                    continue
                if key and key in busy_keys:
                    todo.append(media)
                    continue
                if free is None:
                    free = start_worker((cache.cache_dir, options, settings))
                    team.append(free)
                free.media, free.key, free.deadline = media, key, time.monotonic() + timeout_s
                busy_keys.add(key)
                with contextlib.suppress(BrokenPipeError):  # it died: found below
                    free.connection.send(media)
            busy = [worker for worker in team if worker.media is not None]
            if not busy:
                continue
            left = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = set(wait([worker.connection for worker in busy], timeout=min(left, 1.0)))
            for worker in busy:
                answer = None
                if worker.connection in ready:
                    try:
                        answer = worker.connection.recv()
                    except (EOFError, ConnectionResetError):
                        worker.process.join()
                        code = worker.process.exitcode
                        died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                        answer = {"reason": f"its decoder died ({died})", "remedy": "re-encode it, or free memory"}
                        team.remove(worker)
                elif time.monotonic() >= worker.deadline:
                    worker.process.kill()
                    worker.process.join()
                    _remove_temporary(worker, cache, settings)
                    answer = {"reason": f"took over {timeout_s:g} s", "remedy": "raise --timeout_s or re-encode it"}
                    team.remove(worker)
                if answer is not None:
                    media, worker.media = worker.media, None
                    busy_keys.discard(worker.key)
                    yield media, answer
    finally:
        for worker in team:
            worker.process.kill()
            worker.process.join()
            _remove_temporary(worker, cache, settings)


def _is_cached(cache: FrameCache, media: Media, settings: VideoSettings) -> bool:
    try:
        return os.path.exists(cache.path(media, settings))
    except MediaError:
        return True  # nothing to decode


def _remove_temporary(worker: Worker, cache: FrameCache, settings: VideoSettings) -> None:
    if worker.media is not None and worker.media.kind == "video":
        with contextlib.suppress(MediaError):
            path = cache.path(worker.media, settings)
            Path(temporary_name(path, worker.process.pid)).unlink(missing_ok=True)
