"""The pipeline that keeps an engine fed: bounded stages from a file on disk to a scored answer.

    clips -> bytes gate -> loader threads (decode or cache, prompt, patches) -> AsyncLLM (continuous batching) -> scoring -> rows

* A clip's questions are prepared one after another by one loader, so its video is decoded and made into patches once, and
  are submitted together, so the engine's prefix cache computes the video's tokens once.
* Memory is bounded by bytes in flight, not by a count: a clip reserves the most its settings allow before decoding, and
  what it really took after.
* Everything that can go wrong with one sample ends as a row with a reason; only a dead engine ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data.records import Prompt, Sample
from data.video import MediaError

# The first clip's loader works alone until the engine has something to do, at most so long (a video that has to be decoded
# takes longer, and then the others had better begin).
HEAD_START_S = 0.3


@dataclass(slots=True)
class Completion:
    """One answer of an engine. `finish_reason` is "stop" or "length"."""

    text: str
    finish_reason: str
    prompt_tokens: int
    response_tokens: int


class Engine(Protocol):
    """What the pipeline needs of an engine; tests bring one that needs no model."""

    def render(self, prompt: Prompt, shared: dict) -> dict[str, Any]:
        """What generate() is given for this prompt, called in loader threads; the engine may do its work on media here.
        `shared`: kept for the clip's next question. Raises RequestFailed."""
        return prompt.vllm_prompt

    def extend(self, prompt: Prompt, more: str) -> dict[str, Any]:
        """The same for a prompt whose `vllm_prompt` is already render()'s, with text after its end."""
        longer = {**prompt.vllm_prompt, "prompt": prompt.text + more}
        longer.pop("prompt_token_ids", None)
        return longer

    async def generate(self, prompt: dict[str, Any], sampling: dict[str, Any], request_id: str) -> Completion: ...

    def close(self) -> None: ...


class RequestFailed(ValueError):
    """The engine refused or lost one request; the others go on."""


class LoaderThreads:
    """Daemon threads that run blocking work for an event loop, with a time limit per piece of work.

    A decoder that hangs cannot be interrupted from Python: its thread is given up and replaced, so the others go on.
    """

    def __init__(self, count: int):
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self._start_thread()

    def _start_thread(self) -> None:
        self._threads.append(threading.Thread(target=self._serve, name="loader", daemon=True))
        self._threads[-1].start()

    def _serve(self) -> None:
        while True:
            loop, future, abandoned, function, arguments = self._work.get()
            if function is None:
                return
            result, error = None, None
            try:
                result = function(*arguments)
            except BaseException as caught:  # handed to the waiting coroutine, which raises it again
                error = caught
            if abandoned.is_set():
                return  # a replacement was started when the time limit passed
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the run has ended meanwhile and closed its loop: nobody waits for this
                return
            del result, error, future, arguments

    async def run(self, function: Callable, *arguments: Any, timeout_s: float) -> Any:
        """function(*arguments) in a loader thread. Raises TimeoutError, or what the function raised."""
        loop = asyncio.get_running_loop()
        future, abandoned = loop.create_future(), threading.Event()
        self._work.put((loop, future, abandoned, function, arguments))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            abandoned.set()
            self._start_thread()
            raise

    def close(self, count: int, wait_s: float = 3.0) -> None:
        """Ends the threads, and waits a little for what they are in the middle of: the interpreter's exit would stop a thread
        inside a library's C++ code, which ends the process by SIGABRT instead of with its status."""
        for _ in range(count):
            self._work.put((None, None, threading.Event(), None, ()))
        until = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


def _settle(future: asyncio.Future, result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class BytesGate:
    """Lets work begin while the bytes of all work under way stay within a limit; the oldest waiter goes first.

    One piece of work larger than the limit runs alone instead of never.
    """

    def __init__(self, limit: int):
        self.limit, self.used, self.peak = limit, 0, 0
        self._waiters: deque[tuple[int, asyncio.Future]] = deque()

    async def reserve(self, amount: int) -> None:
        if not self._waiters and self._fits(amount):
            self._take(amount)
            return
        future = asyncio.get_running_loop().create_future()
        self._waiters.append((amount, future))
        await future

    def resize(self, old: int, new: int) -> None:
        """Replaces a reservation by its true size (0 gives it back)."""
        self.used += new - old
        self.peak = max(self.peak, self.used)
        while self._waiters and self._fits(self._waiters[0][0]):
            amount, future = self._waiters.popleft()
            if not future.done():
                self._take(amount)
                future.set_result(None)

    def _fits(self, amount: int) -> bool:
        return self.used == 0 or self.used + amount <= self.limit

    def _take(self, amount: int) -> None:
        self.used += amount
        self.peak = max(self.peak, self.used)


class SharedFrames:
    """The frame cache as the encoder sees it, with what it told about the clip at hand kept for its next question.

    The loader sets `scope` (a dict that lives as long as the clip is being prepared) in its own thread. A plan reads
    every packet of an uncached file, so that it is as much worth keeping as the frames; the rest is the cache's business.
    """

    def __init__(self, cache: Any):
        self._cache, self._local = cache, threading.local()

    def use(self, scope: dict | None) -> None:
        self._local.scope = scope

    def frames(self, media: Any, settings: Any) -> Any:
        return self._once("frames", media, settings)

    def plan(self, media: Any, settings: Any) -> Any:
        return self._once("plan", media, settings)

    def key(self, media: Any, settings: Any) -> str:
        return self._once("key", media, settings)

    def _once(self, what: str, media: Any, settings: Any) -> Any:
        scope, ask = getattr(self._local, "scope", None), getattr(self._cache, what)
        if scope is None:
            return ask(media, settings)
        name = (what, media, settings)
        if name not in scope:
            scope[name] = ask(media, settings)
        return scope[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@dataclass
class Occupancy:
    """How many requests the engine held over time: its idle share is the pipeline's own grade."""

    started_at: float = 0.0
    ended_at: float = 0.0
    in_engine: int = 0
    idle_s: float = 0.0
    area: float = 0.0
    _changed_at: float = 0.0

    def change(self, by: int) -> None:
        now = time.perf_counter()
        if not self.started_at:
            self.started_at = self._changed_at = now
        passed = now - self._changed_at
        self.area += self.in_engine * passed
        if self.in_engine == 0:
            self.idle_s += passed
        self.in_engine += by
        self._changed_at = self.ended_at = now

    @property
    def wall_s(self) -> float:
        return self.ended_at - self.started_at

    def as_dict(self) -> dict[str, float]:
        wall = max(self.wall_s, 1e-9)
        return {
            "engine_wall_s": round(self.wall_s, 3),
            "engine_idle_share": round(self.idle_s / wall, 4),
            "mean_requests_in_engine": round(self.area / wall, 2),
        }


@dataclass
class Limits:
    """Bounds of the pipeline. Bytes are of uint8 pixels times (1 + engine_bytes_per_value)."""

    loaders: int = 4
    max_in_flight_bytes: int = 8 << 30
    max_concurrent: int = 64  # requests inside the engine, waiting ones included
    clip_bytes: int = 128 << 20  # most that one clip can take, by its settings
    engine_bytes_per_value: int = 4  # patches in bf16, here and in the engine's process, beside each byte of a frame
    decode_timeout_s: float = 600.0
    request_timeout_s: float = 3600.0
    thinking_budget: int | None = None  # tokens of reasoning before a conclusion is forced
    answer_budget: int = 1024


@dataclass
class PipelineStats:
    occupancy: Occupancy = field(default_factory=Occupancy)
    clips: int = 0
    prepare_s: float = 0.0  # time of the loader threads, summed
    render_s: float = 0.0  # of it, what the engine's rendering took
    peak_bytes: int = 0
    wall_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            **self.occupancy.as_dict(),
            "clips": self.clips,
            "prepare_thread_s": round(self.prepare_s, 3),
            "render_thread_s": round(self.render_s, 3),
            "peak_in_flight_mib": round(self.peak_bytes / 2**20, 1),
            "wall_s": round(self.wall_s, 3),
        }


def group_by_clip(samples: list[Sample]) -> list[list[Sample]]:
    """Samples that show the same media, together, in order of first appearance. Text-only samples stand alone."""
    clips: dict[Any, list[Sample]] = {}
    for index, sample in enumerate(samples):
        clips.setdefault(sample.media or index, []).append(sample)
    return list(clips.values())


def pixel_bytes(prompt: Prompt) -> int:
    """Bytes of the frames and images a prompt holds for the engine."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, np.ndarray):
            seen[id(value)] = value.nbytes
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(prompt.vllm_prompt.get("multi_modal_data") or {})
    return sum(seen.values())


def patch_bytes(rendered: dict[str, Any]) -> int:
    """Bytes of the tensors a rendered prompt holds for the engine, 0 of one that is not rendered."""
    listed = (rendered.get("mm_kwargs") or {}).values()
    fields = {id(field): field for items in listed for item in items for field in item.values()}
    return sum(getattr(field.data, "nbytes", 0) for field in fields.values())


def failure(sample: Sample, status: str, reason: str, remedy: str = "") -> dict[str, Any]:
    """The row of a sample that got no answer."""
    row = {"id": sample.id, "response": "", "finish_reason": "", "status": status, "reason": reason}
    return {**row, "remedy": remedy, "prompt_tokens": 0, "response_tokens": 0}


async def run_pipeline(
    samples: list[Sample],
    *,
    encode: Callable[[Sample], Prompt],
    engine: Engine,
    sampling: dict[str, Any],
    limits: Limits,
    on_row: Callable[[Sample, dict[str, Any]], None],
    frames: SharedFrames | None = None,
    watch: Callable[[Sample], dict[str, Any]] | None = None,
) -> PipelineStats:
    """Answers every sample once; on_row(sample, row) is called in the event loop as each answer (or failure) comes.

    encode: Sample -> Prompt, called in loader threads; MediaError, ValueError and OSError become failure rows.
    watch: facts about a sample's media that scoring will need, noted in its `extra` while the file is at hand.
    Raises whatever ends the engine (EngineDeadError); rows given so far stay valid.
    """
    stats, gate = PipelineStats(), BytesGate(limits.max_in_flight_bytes)
    threads, slots = LoaderThreads(limits.loaders), asyncio.Semaphore(limits.max_concurrent)
    waiting, numbers, engine_has_work = deque(group_by_clip(samples)), itertools.count(), asyncio.Event()
    stats.clips, began = len(waiting), time.perf_counter()
    factor = 1 + limits.engine_bytes_per_value

    def prepare(sample: Sample, scope: dict) -> tuple[Prompt, int]:
        """The prompt as the engine takes it, and the bytes it stands for: frames, patches, the engine's copy."""
        if frames is not None:
            frames.use(scope)
        started = time.perf_counter()
        try:
            if watch is not None:
                sample.extra.update(watch(sample))
            prompt = encode(sample)
            decoded, began_rendering = pixel_bytes(prompt), time.perf_counter()
            prompt.vllm_prompt = engine.render(prompt, scope)
            stats.render_s += time.perf_counter() - began_rendering
        finally:
            stats.prepare_s += time.perf_counter() - started
            if frames is not None:
                frames.use(None)
        patches = patch_bytes(prompt.vllm_prompt)
        return prompt, decoded + 2 * patches if patches else decoded * factor

    async def ask(sample: Sample, prompt: Prompt) -> None:
        stats.occupancy.change(+1)
        try:
            row = await asyncio.wait_for(answer(sample, prompt, next(numbers)), limits.request_timeout_s)
        except TimeoutError:
            row = failure(sample, "request_timeout", f"no answer within {limits.request_timeout_s:g} s")
        except RequestFailed as error:
            row = failure(sample, "request_failed", str(error))
        finally:
            stats.occupancy.change(-1)
            slots.release()
        on_row(sample, row)

    async def answer(sample: Sample, prompt: Prompt, number: int) -> dict[str, Any]:
        prefilled = prompt.text.rstrip().endswith("<think>")
        asked = dict(sampling)
        if limits.thinking_budget is not None:
            asked["max_tokens"] = min(asked["max_tokens"], limits.thinking_budget)
        got = await engine.generate(prompt.vllm_prompt, asked, f"{number}-{sample.id}")
        text, tokens, forced = got.text, got.response_tokens, False
        thinking = "</think>" not in text and (prefilled or "<think>" in text)
        if limits.thinking_budget is not None and got.finish_reason == "length" and thinking:
            forced, ending = True, "\n</think>\n\n"
            rest = await engine.generate(
                engine.extend(prompt, text + ending),
                {**sampling, "max_tokens": limits.answer_budget},
                f"{number}-{sample.id}-a",
            )
            text, tokens = text + ending + rest.text, tokens + rest.response_tokens
            got.finish_reason = rest.finish_reason
        names = ("coord", "width", "height", "source_width", "source_height")
        seen = {name: prompt.sample.extra[name] for name in names if name in prompt.sample.extra}
        return {
            "id": sample.id,
            "response": text,
            "finish_reason": got.finish_reason,
            "status": "",
            "reason": "",
            "prompt_tokens": got.prompt_tokens,
            "response_tokens": tokens,
            **({"think_prefilled": True} if prefilled else {}),
            **({"conclusion_forced": True} if forced else {}),
            **({"seen": seen} if seen else {}),
        }

    async def load_clip(clip: list[Sample]) -> None:
        reserved = limits.clip_bytes * factor if clip[0].media else 0
        await gate.reserve(reserved)
        scope, asked, broken = {}, [], None
        try:
            for sample in clip:
                if broken is not None:  # the same media would fail the same way, perhaps after minutes
                    on_row(sample, failure(sample, *broken))
                    continue
                try:
                    prompt, size = await threads.run(prepare, sample, scope, timeout_s=limits.decode_timeout_s)
                except MediaError as error:
                    broken = ("media_error", f"{error.path}: {error.reason}", error.remedy)
                    on_row(sample, failure(sample, *broken))
                    continue
                except TimeoutError:
                    broken = ("load_timeout", f"not decoded within {limits.decode_timeout_s:g} s", "re-encode the file")
                    on_row(sample, failure(sample, *broken))
                    continue
                except RequestFailed as error:
                    on_row(sample, failure(sample, "request_failed", str(error)))
                    continue
                except (ValueError, OSError, MemoryError) as error:
                    status = "prompt_too_long" if type(error).__name__ == "PromptTooLong" else "prompt_error"
                    on_row(sample, failure(sample, status, f"{type(error).__name__}: {error}"))
                    continue
                if not asked:
                    gate.resize(reserved, size)
                    reserved = size
                await slots.acquire()
                engine_has_work.set()
                question = ask(sample, prompt)
                try:
                    asked.append(group.create_task(question))
                except RuntimeError:  # another task has ended the run
                    question.close()
                    raise
                del prompt, question
            release_after(asked, reserved)
            reserved = 0
        finally:
            if reserved:
                gate.resize(reserved, 0)

    def release_after(tasks: list[asyncio.Task], held: int) -> None:
        """Gives the clip's bytes back when its last question is answered."""
        left = len(tasks)
        if not left:
            gate.resize(held, 0)

        def one_done(_: asyncio.Task) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                gate.resize(held, 0)

        for task in tasks:
            task.add_done_callback(one_done)

    async def loader(number: int) -> None:
        if number:  # loaders that begin together end together, and the engine waits meanwhile
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(engine_has_work.wait(), HEAD_START_S)
        while waiting:
            await load_clip(waiting.popleft())

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(min(limits.loaders, len(waiting))):
                group.create_task(loader(number))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        stats.peak_bytes, stats.wall_s = gate.peak, time.perf_counter() - began
        threads.close(limits.loaders)
    return stats
