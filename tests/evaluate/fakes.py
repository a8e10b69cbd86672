"""An engine and an encoder without a model, a benchmark over generated clips, and a program that runs them.

    python tests/evaluate/fakes.py --model M --data_dir DIR …      (the kill -9 test starts it as a process of its own)

The fake engine answers from the prompt's text alone, so two runs over the same samples give the same rows.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from data.prompts import build_messages
from data.records import Prompt, Sample
from data.video import VideoSettings, read_video
from evaluate._annotations import load_benchmark
from evaluate._engine import Completion, Engine, RequestFailed, SharedFrames
from evaluate._run import main
from evaluate._scoring import Benchmark

SMALL = VideoSettings(fps=2.0, min_frames=2, max_frames=4, max_pixels=4096, min_pixels=1024)


class FakeEngine(Engine):
    """Answers after `delay_s` with `answer(text)`; records what it was asked and how many requests ran together."""

    def __init__(self, answer=None, delay_s: float = 0.0, slots: int = 8):
        self.answer = answer or (lambda text: "ABCD"[hashlib.sha256(text.encode()).digest()[0] % 4])
        self.delay_s, self.slots = delay_s, asyncio.Semaphore(slots)
        self.asked: list[str] = []
        self.running = self.most = 0

    async def generate(self, prompt, sampling, request_id) -> Completion:
        async with self.slots:
            self.asked.append(request_id)
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(self.delay_s)
            self.running -= 1
        text = self.answer(prompt["prompt"])
        if isinstance(text, Exception):
            raise text
        words = text.split()
        limit = sampling["max_tokens"]
        reason = "length" if len(words) > limit else "stop"
        return Completion(" ".join(words[:limit]) if reason == "length" else text, reason, 10, min(len(words), limit))

    def close(self) -> None:
        pass


class CountingCache:
    """Stands where the frame cache does; counts decodings per file."""

    def __init__(self):
        self.decoded: dict[str, int] = {}

    def frames(self, media, settings):
        self.decoded[media.path] = self.decoded.get(media.path, 0) + 1
        return read_video(media, settings)


class FakeEncoder:
    """Prompt text without a tokenizer; decodes videos for real unless `decode` is False."""

    def __init__(self, style="direct", template=None, *, frames=None, decode=True, delay_s=0.0):
        self.style, self.template, self.frames, self.decode, self.delay_s = style, template, frames, decode, delay_s

    def encode(self, sample: Sample) -> Prompt:
        time.sleep(self.delay_s)
        items = build_messages(sample, self.style, self.template)[0]["content"]
        text = "\n".join(item.get("text", f"[{item['type']}]") for item in items)
        data = {}
        if self.decode and sample.media:
            data = {"video": [self.frames.frames(sample.media[0], SMALL).pixels]}
        empty = np.zeros(0, dtype=np.int64)
        return Prompt(sample, text, {"prompt": text, "multi_modal_data": data}, empty, empty, empty, None, empty)


def fake_parts(decode: bool = True, delay_s: float = 0.0, engine: FakeEngine | None = None):
    """(make_engine, make_encoder, record) for evaluate._run.main; record.engine and .cache are set when they exist."""
    record = SimpleNamespace(engine=None, cache=CountingCache())

    def make_engine(args, encoder):
        record.engine = engine or FakeEngine(delay_s=delay_s)
        return record.engine

    def make_encoder(args, style, template):
        frames = SharedFrames(record.cache)
        return FakeEncoder(style, template, frames=frames, decode=decode), frames

    return make_engine, make_encoder, record


def write_clip(path: Path, seed: int = 0, seconds: float = 1.0, fps: int = 8) -> None:
    """A small H.264 clip of noise that moves."""
    import av

    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(int(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * index, axis=1), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_toy(folder: Path, clips: int, questions: int) -> None:
    """toy.json with `questions` four-option questions about each of `clips` generated videos."""
    rows = []
    for clip in range(clips):
        write_clip(folder / f"clips/{clip:03d}.mp4", seed=clip)
        for question in range(questions):
            rows.append(
                {
                    "problem_id": f"{clip:03d}-{question}",
                    "problem": f"Question {question} about clip {clip}?",
                    "options": ["A. one", "B. two", "C. three", "D. four"],
                    "solution": f"<answer>{'ABCD'[(clip + question) % 4]}</answer>",
                    "problem_type": "multiple choice",
                    "data_type": "video",
                    "path": f"clips/{clip:03d}.mp4",
                }
            )
    (folder / "toy.json").write_text(json.dumps(rows))


def load(args) -> list[Sample]:
    return load_benchmark(args, ("toy.json",), hint="write_toy makes it.", source="toy")


TOY = Benchmark(name="toy", title="Toy", load=load, default_prompt="direct")

__all__ = ["TOY", "FakeEncoder", "FakeEngine", "RequestFailed", "fake_parts", "write_clip", "write_toy"]


def run_until_killed(kills: int, seed: int = 0) -> int:
    """Forks the program again and again, each time sending it SIGKILL soon after it wrote a row, then lets it finish.

    Forking, after everything is imported and before any thread exists, saves the start-up of each run. Prints how many
    runs were really killed; returns the last run's status.
    """
    import importlib
    import random
    import signal

    for name in ("rewards", "evaluate._models", "evaluate._report", "evaluate._judge"):
        importlib.import_module(name)
    out, rng, killed = Path(sys.argv[sys.argv.index("--output_dir") + 1]), random.Random(seed), 0

    def written() -> int:
        return sum(path.stat().st_size for path in out.rglob("predictions*.jsonl"))

    def child(delay_s: float) -> int:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            make_engine, make_encoder, _ = fake_parts(delay_s=delay_s)
            os._exit(main(TOY, make_engine=make_engine, make_encoder=make_encoder))
        return pid

    for _ in range(3 * kills):
        pid, before = child(0.04), written()
        while (ended := os.waitpid(pid, os.WNOHANG)[0]) == 0 and written() == before:
            time.sleep(0.002)
        if not ended:
            time.sleep(rng.random() * 0.06)
            os.kill(pid, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if killed == kills:
            break
    print(f"killed {killed}")
    return os.waitstatus_to_exitcode(os.waitpid(child(0.0), 0)[1])


if __name__ == "__main__":
    if os.environ.get("FAKE_KILLS"):
        sys.exit(run_until_killed(int(os.environ["FAKE_KILLS"])))
    make_engine, make_encoder, _ = fake_parts(delay_s=float(os.environ.get("FAKE_DELAY_S", "0")))
    sys.exit(main(TOY, make_engine=make_engine, make_encoder=make_encoder))
