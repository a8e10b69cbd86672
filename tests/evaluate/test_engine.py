"""The pipeline by itself: bounded memory, sharing of clips, what happens when something hangs or dies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from data.records import Media, Prompt, Sample
from data.video import MediaError
from evaluate import _engine
from evaluate._engine import (
    BytesGate,
    Completion,
    Limits,
    Occupancy,
    SharedFrames,
    group_by_clip,
    run_pipeline,
)
from evaluate._models import preprocess
from tests.evaluate.fakes import FakeEngine, RequestFailed

FRONT_END = """
import subprocess, sys, time
from evaluate._async_vllm import end_with_me
engine = subprocess.Popen(["sleep", "600"])
guard = end_with_me([engine.pid])
if sys.argv[1] == "closes":
    guard.kill()
print(engine.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["dies", "closes"])
def test_an_engine_ends_with_a_front_end_that_is_killed(way):
    """vLLM's engine process would stay, with its memory. After a proper close nobody touches its number any more."""
    front = subprocess.Popen([sys.executable, "-c", FRONT_END, way], stdout=subprocess.PIPE, text=True)
    engine = psutil.Process(int(front.stdout.readline()))
    front.kill()
    front.wait()
    if way == "dies":
        psutil.wait_procs([engine], timeout=30)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    else:
        time.sleep(0.5)
        assert engine.is_running()
        engine.kill()


def samples_of(clips: int, questions: int) -> list[Sample]:
    return [
        Sample(f"{clip}-{q}", f"q{q}", "A", "open-ended", "video", (Media("video", path=f"{clip}.mp4"),))
        for q in range(questions)
        for clip in range(clips)
    ]


def prompt_of(sample: Sample, pixels: int = 100, text: str = "") -> Prompt:
    empty, frames = np.zeros(0, np.int64), np.zeros(pixels, np.uint8)
    request = {"prompt": text or sample.question, "multi_modal_data": {"video": [frames]}}
    return Prompt(sample, text or sample.question, request, empty, empty, empty, None, empty)


def pipeline(samples, encode, engine, **limits):
    rows: list[tuple[str, dict]] = []
    stats = asyncio.run(
        run_pipeline(
            samples,
            encode=encode,
            engine=engine,
            sampling={"max_tokens": 10},
            limits=Limits(**limits),
            on_row=lambda sample, row: rows.append((sample.id, row)),
        )
    )
    return rows, stats


def test_questions_of_a_clip_stand_together():
    groups = group_by_clip(samples_of(3, 2))
    assert [[sample.id for sample in group] for group in groups] == [["0-0", "0-1"], ["1-0", "1-1"], ["2-0", "2-1"]]
    text_only = [Sample(str(n), "q", "A", "math", "text") for n in range(2)]
    assert len(group_by_clip(text_only)) == 2


def test_every_sample_gets_exactly_one_row_whatever_happens_to_it():
    def encode(sample):
        if sample.id.startswith("1-"):
            raise MediaError("1.mp4", "is truncated", "download it again")
        if sample.id == "2-1":
            raise ValueError("no prompt")
        return prompt_of(sample)

    class Engine(FakeEngine):
        async def generate(self, prompt, sampling, request_id):
            if request_id.endswith("3-0"):
                raise RequestFailed("too long")
            if request_id.endswith("3-1"):
                await asyncio.sleep(60)
            return await super().generate(prompt, sampling, request_id)

    rows, _ = pipeline(samples_of(5, 2), encode, Engine(), loaders=3, request_timeout_s=0.2)
    status = {name: row["status"] for name, row in rows}
    assert len(rows) == 10
    assert status == {
        "0-0": "", "0-1": "", "1-0": "media_error", "1-1": "media_error", "2-0": "", "2-1": "prompt_error",
        "3-0": "request_failed", "3-1": "request_timeout", "4-0": "", "4-1": "",
    }  # fmt: skip


def test_a_decoder_that_hangs_costs_its_time_limit_and_no_more():
    release = threading.Event()

    def encode(sample):
        if sample.id == "0-0":
            release.wait(20)
        return prompt_of(sample)

    began = time.monotonic()
    rows, _ = pipeline(samples_of(6, 1), encode, FakeEngine(), loaders=1, decode_timeout_s=0.3)
    release.set()
    assert time.monotonic() - began < 15
    assert dict(rows)["0-0"]["status"] == "load_timeout" and len(rows) == 6


def test_a_dead_engine_ends_the_run_and_keeps_what_was_answered():
    class Dies(FakeEngine):
        async def generate(self, prompt, sampling, request_id):
            if len(self.asked) == 3:
                raise RuntimeError("engine core died")
            return await super().generate(prompt, sampling, request_id)

    rows = []
    with pytest.raises(RuntimeError, match="engine core died"):
        asyncio.run(
            run_pipeline(
                samples_of(20, 1),
                encode=prompt_of,
                engine=Dies(),
                sampling={"max_tokens": 1},
                limits=Limits(loaders=1),
                on_row=lambda sample, row: rows.append(row),
            )
        )
    assert 1 <= len(rows) <= 3


@pytest.mark.parametrize("limit", [750, 1550, 10_000])
def test_bytes_in_flight_stay_below_the_bound(limit):
    """Each clip holds 100 bytes, its patches here and in the engine twice that each: at most limit // 500 are under way."""
    under_way, most, lock = set(), 0, threading.Lock()

    def encode(sample):
        nonlocal most
        with lock:
            under_way.add(sample.media)
            most = max(most, len(under_way))
        return prompt_of(sample)

    rows = []

    def on_row(sample, row):
        rows.append(row)
        if sample.id.endswith("-1"):
            under_way.discard(sample.media)

    class InOrder(FakeEngine):
        async def generate(self, prompt, sampling, request_id):
            await asyncio.sleep(0.01 if prompt["prompt"] == "q1" else 0.0)
            return Completion("x", "stop", 1, 1)

    stats = asyncio.run(
        run_pipeline(
            samples_of(12, 2),
            encode=encode,
            engine=InOrder(),
            sampling={"max_tokens": 1},
            limits=Limits(loaders=6, max_in_flight_bytes=limit, clip_bytes=100),
            on_row=on_row,
        )
    )
    assert len(rows) == 24 and most <= max(1, limit // 500) and stats.peak_bytes <= limit


def test_gate_serves_the_oldest_first_and_lets_one_giant_through():
    async def scenario():
        gate, order = BytesGate(100), []

        async def work(name, amount):
            await gate.reserve(amount)
            order.append(name)

        await gate.reserve(60)
        tasks = [asyncio.create_task(work("giant", 500)), asyncio.create_task(work("small", 10))]
        await asyncio.sleep(0)
        assert order == []  # the small one does not overtake
        gate.resize(60, 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["giant"]
        gate.resize(500, 0)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(scenario()) == ["giant", "small"]


def test_loaders_work_at_the_same_time():
    """20 clips of 0.05 s on 5 threads: the fake decoder must have been in five places at once."""
    inside, most, lock = 0, 0, threading.Lock()

    def encode(sample):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.05)
        with lock:
            inside -= 1
        return prompt_of(sample)

    pipeline(samples_of(20, 1), encode, FakeEngine(), loaders=5)
    assert most == 5


@pytest.mark.parametrize("first_fails", [False, True])
def test_the_first_clip_goes_ahead_until_the_engine_has_work(monkeypatch, first_fails):
    """Loaders that begin together end together. Clip 0's loader is alone until its first question is asked; where clip 0
    fails, the others begin after its next clip, or when the head start is over."""
    monkeypatch.setattr(_engine, "HEAD_START_S", 60.0)
    ended, before = [], {}

    def encode(sample):
        clip = int(sample.id.split("-")[0])
        before.setdefault(clip, set(ended))
        time.sleep(0.05)
        ended.append(sample.id)
        if clip == 0 and first_fails:
            raise MediaError("0.mp4", "is no video", "")
        return prompt_of(sample)

    pipeline(samples_of(5, 2), encode, FakeEngine(), loaders=4)
    assert before[0] == set()
    first = "1-0" if first_fails else "0-0"
    assert all(first in before[clip] for clip in ((2, 3, 4) if first_fails else (1, 2, 3, 4)))


def test_requests_run_together_up_to_the_limit():
    engine = FakeEngine(delay_s=0.02, slots=100)
    pipeline(samples_of(20, 2), prompt_of, engine, loaders=2, max_concurrent=7)
    assert engine.most == 7


@pytest.mark.parametrize("what", ["frames", "plan", "key"])
def test_shared_frames_ask_the_cache_once_per_clip_and_forget(what):
    """A plan demuxes a whole file that is not cached: three questions must not read it three times."""
    calls = []

    class Cache:
        mode = "off"

        def frames(self, media, settings):
            calls.append(media)
            return object()

        plan = key = frames

    shared, scope = SharedFrames(Cache()), {}
    ask = getattr(shared, what)
    shared.use(scope)
    assert ask("a", 1) is ask("a", 1) is not ask("b", 1)
    assert calls == ["a", "b"] and ask("a", 2) is not ask("a", 1)
    shared.use(None)
    ask("a", 1)
    assert calls == ["a", "b", "a", "a"] and shared.mode == "off"


def test_preprocessing_gives_up_on_a_decoder_that_hangs(capsys):
    """4 videos, 2 loaders: one hangs, one is broken, two are cached."""
    release, seen = threading.Event(), []

    class Cache:
        def frames(self, media, settings):
            if media.path == "0.mp4":
                release.wait(20)
            if media.path == "2.mp4":
                raise MediaError("2.mp4", "is truncated", "download it again")
            seen.append(media.path)

    args = Namespace(loaders=2, decode_timeout_s=0.3, cache_dir="C")
    counts = preprocess(SimpleNamespace(video=None), SharedFrames(Cache()), samples_of(4, 3), args)
    assert counts == {"videos": 4, "failed": 2} and sorted(seen) == ["1.mp4", "3.mp4"]
    release.set()
    said = capsys.readouterr().out
    assert "0.mp4: not decoded within 0.3 s" in said and "2.mp4" in said and "2 of 4 videos are in C" in said


def test_a_thought_over_budget_is_closed_and_concluded():
    class Thinker(FakeEngine):
        async def generate(self, prompt, sampling, request_id):
            self.asked.append(prompt["prompt"])
            if sampling["max_tokens"] == 4:
                return Completion("hmm hmm hmm hmm", "length", 5, 4)
            assert sampling["max_tokens"] == 3
            return Completion("Answer: B", "stop", 9, 2)

    engine, rows = Thinker(), []
    sample = samples_of(1, 1)[0]
    asyncio.run(
        run_pipeline(
            [sample],
            encode=lambda s: prompt_of(s, text="<|im_start|>assistant\n<think>\n"),
            engine=engine,
            sampling={"max_tokens": 100},
            limits=Limits(thinking_budget=4, answer_budget=3),
            on_row=lambda s, row: rows.append(row),
        )
    )
    assert engine.asked[1] == "<|im_start|>assistant\n<think>\nhmm hmm hmm hmm\n</think>\n\n"
    assert rows[0]["response"] == "hmm hmm hmm hmm\n</think>\n\nAnswer: B"
    assert rows[0]["conclusion_forced"] and rows[0]["think_prefilled"] and rows[0]["response_tokens"] == 6


def test_idle_share(monkeypatch):
    """Engine busy in [0, 2], empty in [2, 5], two requests in [5, 6], one in [6, 8]: idle 3 of 8, mean (2+2+2)/8."""
    clock = iter([0.0, 2.0, 5.0, 5.0, 6.0, 8.0])
    monkeypatch.setattr("evaluate._engine.time.perf_counter", lambda: next(clock) + 100)
    occupancy = Occupancy()
    for by in (+1, -1, +1, +1, -1, -1):
        occupancy.change(by)
    assert occupancy.as_dict() == {"engine_wall_s": 8.0, "engine_idle_share": 0.375, "mean_requests_in_engine": 0.75}
