"""Small clips whose every frame shows its own number, so that a test can read from the pixels which frame it got.

The number is written in eight vertical bars, black 0 and white 1, most significant left: no codec at sane quality,
scaling or colour conversion flips a bar, and no code under test is needed to read it.
"""

from __future__ import annotations

import os
from fractions import Fraction

import av
import numpy as np

BARS = 8


def numbered(number: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 picture of a number below 256; the bars fill the upper two thirds, a slope of colour the rest."""
    picture = np.zeros((height, width, 3), np.uint8)
    edges = np.linspace(0, width, BARS + 1).round().astype(int)
    for bar in range(BARS):
        bright = 235 if number >> (BARS - 1 - bar) & 1 else 16
        picture[: height * 2 // 3, edges[bar] : edges[bar + 1]] = bright
    picture[height * 2 // 3 :, :, 0] = np.linspace(20, 230, width)
    picture[height * 2 // 3 :, :, 1] = (number * 37) % 200 + 20
    picture[height * 2 // 3 :, :, 2] = np.linspace(200, 40, width)
    return picture


def read_number(picture: np.ndarray) -> int:
    """The number shown by a (3, H, W) picture."""
    _, height, width = picture.shape
    row = picture[:, height // 6 : height // 2].mean(axis=(0, 1))
    centres = ((np.arange(BARS) + 0.5) * width / BARS).astype(int)
    return int(sum((row[centre] > 125) << (BARS - 1 - bar) for bar, centre in enumerate(centres)))


def make_clip(
    path,
    frames: int = 40,
    fps: int | Fraction = 20,
    height: int = 96,
    width: int = 128,
    codec: str = "libx264",
    options: dict | None = None,
    times: list[int] | None = None,
    time_base: Fraction | None = None,
    rotation: int = 0,
    pix_fmt: str = "yuv420p",
    audio: bool = False,
    container_options: dict | None = None,
    format: str | None = None,
) -> str:
    """Writes a clip; `times` are presentation times in `time_base` (default: constant rate). Returns its path."""
    preset = {"preset": "veryfast", "g": "12", "bf": "2"} if codec == "libx264" else {}
    out = av.open(str(path), "w", format=format, options=container_options or {})
    stream = out.add_stream(codec, rate=Fraction(fps), options={**preset, **(options or {})})
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    if time_base is not None:
        stream.codec_context.time_base = time_base
    if rotation:
        stream.set_display_rotation(rotation)
    sound = out.add_stream("aac", rate=16000) if audio else None
    for number in range(frames):
        frame = av.VideoFrame.from_ndarray(numbered(number, height, width), format="rgb24")
        if times is not None:
            frame.pts, frame.time_base = times[number], time_base
        for packet in stream.encode(frame):
            out.mux(packet)
    for packet in stream.encode(None):
        out.mux(packet)
    if sound is not None:
        _write_sound(out, sound, frames / float(fps))
    out.close()
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # As root, SVT-AV1 makes its caller a real-time thread (FIFO, 99). Every process that later tests start would
        # inherit that, and ranks that wait by polling would then keep all others off the cores.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return str(path)


def make_sound(path, seconds: float = 1.0) -> str:
    """An audio-only mp4."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        _write_sound(out, stream, seconds)
    return str(path)


def _write_sound(out, stream, seconds: float) -> None:
    samples = np.zeros((1, 1024), np.float32)
    for block in range(int(seconds * 16000 / 1024) + 1):
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, block * 1024
        for packet in stream.encode(frame):
            out.mux(packet)
    for packet in stream.encode(None):
        out.mux(packet)
