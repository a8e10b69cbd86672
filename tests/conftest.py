"""Fixtures that several rooms use: tiny model folders and small real media files."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nor depend on how this host's name resolves
os.environ["REELRL_PYTEST"] = str(os.getpid())  # inherited by whatever a test starts, however deep


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """After a test that failed (a time limit, say) its processes end too: ranks that nobody waits for any more would
    take the cores from the tests after it."""
    began, failures = time.time(), item.session.testsfailed
    result = yield
    if item.session.testsfailed > failures:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mark = process.environ().get("REELRL_PYTEST")
                if mark == os.environ["REELRL_PYTEST"] and process.create_time() >= began - 1:
                    process.kill()
    return result


@pytest.fixture(autouse=True)
def ordinary_priority():
    """A codec made the whole run real-time once, and ranks that poll then starved the others for an hour."""
    yield
    found = os.sched_getscheduler(0)
    if found != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail(f"left pytest in scheduling class {found}, which all later processes inherit")


def write_clip(path: Path, *, width: int, height: int, frames: int, fps: int, seed: int = 0) -> str:
    """An H.264 file of a coloured square that moves over a textured ground."""
    import av

    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 90, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    colour = rng.integers(120, 255, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            picture = ground.astype(np.uint8).copy()
            left = (number * 5) % (width - 24)
            picture[20:44, left : left + 24] = colour
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory) -> Path:
    """wide.mp4 (4 s at 12 fps, 448x224: no resize for any family), odd.mp4 (3 s at 10 fps, 122x90), still.png
    (230x141)."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "wide.mp4", width=448, height=224, frames=48, fps=12)
    write_clip(folder / "odd.mp4", width=122, height=90, frames=30, fps=10, seed=1)
    pixels = np.random.default_rng(2).integers(0, 256, (141, 230, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "still.png")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """tiny("qwen3_vl", tied=True) -> model folder."""
    from tests.tiny_models import tiny_model

    return tiny_model
