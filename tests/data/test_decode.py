"""Every container and codec gives the frames asked for (each frame shows its number), and bad files one clear line."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from data import decode
from data.decode import MediaError, backend_problem, probe, read_frames
from data.records import Media
from data.video import VideoSettings, read_video
from tests.data.clips import make_clip, make_sound, read_number

SETTINGS = VideoSettings(fps=7, max_frames=64, min_pixels=96 * 128, max_pixels=96 * 128 * 4)
GOOD = {
    "b_frames.mp4": {},
    "no_b_frames.mp4": {"options": {"bf": "0"}},
    "one_group.mp4": {"options": {"g": "250"}},
    "open_groups.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}},
    "matroska.mkv": {},
    "stream.ts": {},
    "flash.flv": {},
    "old.avi": {"codec": "mpeg4"},
    "vp8.webm": {"codec": "libvpx", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "10"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "keyint=10:log-level=none"}},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "odd_size.mp4": {"height": 95, "width": 129, "pix_fmt": "yuv444p"},
    "animated.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "with_sound.mp4": {"audio": True},
    "start_offset.mp4": {"times": [3000 + 50 * i for i in range(40)], "time_base": Fraction(1, 1000)},
}


@pytest.mark.parametrize("name", GOOD)
def test_frames_are_those_of_their_index(tmp_path, name):
    path = make_clip(tmp_path / name, **GOOD[name])
    frames = read_video(Media("video", path=path), SETTINGS)
    # 40 frames at 20 fps last 2 s: 14 frames at 7 fps, linspace(0, 39, 14) = 0, 3, 6 ... 39.
    assert frames.indices.tolist() == list(range(0, 40, 3))
    assert [read_number(picture) for picture in frames.pixels] == list(range(0, 40, 3))
    np.testing.assert_allclose(frames.timestamps_s, np.arange(0, 40, 3) / 20, atol=1e-9)
    assert (frames.source_fps, frames.duration_s, frames.total_frames) == (20.0, 2.0, 40)


@pytest.mark.parametrize("wanted", [[0], [39], [11, 12, 13], [0, 39], [23, 5, 37], list(range(40))])
@pytest.mark.parametrize("name", ["b_frames.mp4", "open_groups.mp4", "hevc.mp4", "vp9.webm", "stream.ts"])
def test_any_subset_by_plan(tmp_path, name, wanted):
    path = make_clip(tmp_path / name, **GOOD[name])
    got = dict(read_frames(path, probe(path), wanted))
    assert {index: read_number(picture.transpose(2, 0, 1)) for index, picture in got.items()} == {i: i for i in wanted}


@pytest.mark.parametrize("step_s, held", [(10, np.int32), (100, np.int64)])
def test_tables_are_small_where_ticks_are(tmp_path, step_s, held):
    """20 frames, one each 10 s or 100 s at a million ticks per second: 1.9e8 ticks fit half the memory, 1.9e9 do not."""
    ticks = [number * step_s * 1_000_000 for number in range(20)]
    path = make_clip(tmp_path / "slow.mp4", frames=20, times=ticks, time_base=Fraction(1, 1_000_000))
    timeline = probe(path)
    assert timeline.pts.dtype == timeline.packet_pts.dtype == held and not timeline.sequential
    assert timeline.times_s.tolist() == [number * float(step_s) for number in range(20)]
    wanted = [3, 11, 12, 19]
    assert {index: read_number(frame.transpose(2, 0, 1)) for index, frame in read_frames(path, timeline, wanted)} == {
        index: index for index in wanted
    }


def test_plan_really_seeks(tmp_path):
    """Frames far apart in a long clip with short groups: the seek path, which short clips do not reach."""
    path = make_clip(tmp_path / "long.mp4", frames=250, height=32, width=64)
    timeline = probe(path)
    assert not timeline.sequential
    got = dict(read_frames(path, timeline, [3, 100, 249]))
    assert {index: read_number(picture.transpose(2, 0, 1)) for index, picture in got.items()} == {
        3: 3,
        100: 100,
        249: 249,
    }


@pytest.mark.parametrize("name", ["b_frames.mp4", "no_b_frames.mp4", "open_groups.mp4"])
def test_equal_to_decord_bit_for_bit(tmp_path, name):
    decord = pytest.importorskip("decord")
    path = make_clip(tmp_path / name, height=90, width=122, **GOOD[name])
    reader = decord.VideoReader(path, num_threads=1)
    got = dict(read_frames(path, probe(path), list(range(0, 40, 3))))
    for index, picture in got.items():
        np.testing.assert_array_equal(picture, reader[index].asnumpy())


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_equals_decord(tmp_path, degrees):
    decord = pytest.importorskip("decord")
    path = make_clip(tmp_path / "phone.mp4", rotation=degrees, height=64, width=96, frames=6)
    timeline = probe(path)
    assert (timeline.height, timeline.width) == ((96, 64) if degrees != 180 else (64, 96))
    upright = dict(read_frames(path, timeline, [5]))[5]
    np.testing.assert_array_equal(upright, decord.VideoReader(path, num_threads=1)[5].asnumpy())


def test_real_clips_equal_decord(shared_media):
    decord = pytest.importorskip("decord")
    for name in ("bikes.mp4", "carphone_distorted.mp4"):
        path = str(shared_media / name)
        reader = decord.VideoReader(path, num_threads=1)
        got = dict(read_frames(path, probe(path), list(range(0, len(reader), 17))))
        assert len(got) > 5
        for index, picture in got.items():
            np.testing.assert_array_equal(picture, reader[index].asnumpy())


def test_decord_backend_gives_the_same_frames(tmp_path):
    pytest.importorskip("decord")
    path = make_clip(tmp_path / "a.mp4", height=90, width=122)
    ours = read_video(Media("video", path=path), SETTINGS)
    settings = VideoSettings(**{**SETTINGS.__dict__, "backend": "decord"})
    np.testing.assert_array_equal(ours.pixels, read_video(Media("video", path=path), settings).pixels)
    stream = make_clip(tmp_path / "a.ts")
    with pytest.raises(MediaError, match="MPEG-TS"):
        read_video(Media("video", path=stream), settings)


def test_conversion_starts_no_threads(tmp_path):
    """One process per core: a converter that starts a thread per core and picture would undo it."""
    path = make_clip(tmp_path / "a.mp4")
    before = set(os.listdir("/proc/self/task"))
    frames = read_frames(path, probe(path), [0, 5, 10])
    next(frames)
    assert set(os.listdir("/proc/self/task")) <= before
    frames.close()


class Chain:
    """Stands where the decoders do: notes who is asked for what, and lets the first ones fail."""

    def __init__(self, monkeypatch, path, plan_gives: int, error: Exception, time_shift_s: float = 0.0):
        import torch

        self.asked: list[tuple[str, list[int]]] = []
        self.timeline = probe(path)
        original = decode._decode_by_plan

        def by_plan(source, timeline, wanted):
            self.asked.append(("plan", wanted))
            yield from original(source, timeline, wanted[:plan_gives])
            raise error

        def sequential(source, timeline, wanted):
            self.asked.append(("sequential", wanted))
            raise error
            yield

        test = self

        class VideoDecoder:
            def __init__(self, source, num_ffmpeg_threads, seek_mode):
                test.asked.append(("torchcodec", [num_ffmpeg_threads, seek_mode]))

            def __len__(self):
                return 40

            def get_frame_at(self, index):
                test.asked.append(("torchcodec frame", [index]))
                seconds = float(test.timeline.pts[index] * test.timeline.time_base) + time_shift_s
                return SimpleNamespace(data=torch.full((3, 2, 2), index, dtype=torch.uint8), pts_seconds=seconds)

        monkeypatch.setattr(decode, "_decode_by_plan", by_plan)
        monkeypatch.setattr(decode, "_decode_sequential", sequential)
        package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
        decoders.VideoDecoder = VideoDecoder
        monkeypatch.setitem(sys.modules, "torchcodec", package)
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


def test_torchcodec_is_the_last_link_of_the_chain(tmp_path, monkeypatch):
    """Plan, then from the beginning, then torchcodec, each only for the frames still missing."""
    path = make_clip(tmp_path / "a.mp4")
    chain = Chain(monkeypatch, path, 1, decode._PlanFailed("nothing came out"))
    got = dict(read_frames(path, chain.timeline, [30, 3, 20]))
    assert chain.asked == [
        ("plan", [3, 20, 30]), ("sequential", [20, 30]), ("torchcodec", [1, "exact"]),
        ("torchcodec frame", [20]), ("torchcodec frame", [30]),
    ]  # fmt: skip
    assert read_number(got[3].transpose(2, 0, 1)) == 3
    assert [np.unique(got[index]).tolist() for index in (20, 30)] == [[20], [30]] and got[20].shape == (2, 2, 3)


@pytest.mark.parametrize(
    "error, container, shift, asked",
    [
        (decode._PictureDamaged("picture at 0.1 s is damaged"), None, 0.0, 0),  # it would invent the picture
        (decode.av.InvalidDataError(1, "Invalid data"), None, 0.0, 0),
        (decode._PlanFailed("2 wanted frames did not come out"), "mpegts", 0.0, 0),  # wrong frames without a word
        (decode._PlanFailed("2 wanted frames did not come out"), None, 0.05, 2),  # the neighbour of the frame asked for
    ],
)
def test_torchcodec_is_not_trusted_where_it_is_wrong(tmp_path, monkeypatch, error, container, shift, asked):
    path = make_clip(tmp_path / "a.mp4")
    chain = Chain(monkeypatch, path, 0, error, shift)
    timeline = replace(chain.timeline, container=container or chain.timeline.container)
    with pytest.raises(MediaError, match=r"frames are missing|is damaged") as caught:
        dict(read_frames(path, timeline, [3, 20]))
    assert "torchcodec" not in caught.value.reason  # the verdict is the first decoder's
    assert sum(name.startswith("torchcodec") for name, _ in chain.asked) == asked


def test_a_backend_that_does_not_load_says_so(tmp_path, monkeypatch):
    assert backend_problem("pyav") is None
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert backend_problem("torchcodec") == "torchcodec is not installed"
    path = make_clip(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="torchcodec is not installed; use --decoder pyav"):
        read_video(Media("video", path=path), replace(SETTINGS, backend="torchcodec"))

    def broken(name):
        raise RuntimeError("Could not load libtorchcodec.\nLikely causes: ...")

    monkeypatch.setattr(decode.importlib, "import_module", broken)
    assert backend_problem("torchcodec") == "torchcodec does not load (Could not load libtorchcodec.)"


def test_variable_rate_is_chosen_by_time(tmp_path):
    """Frames 0..19 at 20 ms, 20..29 at 400 ms: evenly spaced times, not evenly spaced numbers."""
    times = [20 * i for i in range(20)] + [380 + 400 * (i - 19) for i in range(20, 30)]
    path = make_clip(tmp_path / "vfr.mp4", frames=30, times=times, time_base=Fraction(1, 1000))
    timeline = probe(path)
    assert not timeline.constant_rate
    np.testing.assert_allclose(timeline.times_s, np.asarray(times) / 1000, atol=1e-6)
    # fps = 29 / 4.38 s; 30 frames last 4.531 s; at 2 fps that is 9.06, so 8 frames at 0, 4.38/7 = 0.626, 1.251, ...
    frames = read_video(Media("video", path=path), VideoSettings(fps=2, min_pixels=12288, max_pixels=49152))
    by_hand = [min(range(30), key=lambda i: abs(times[i] / 1000 - k * 4.38 / 7)) for k in range(8)]
    assert by_hand == [0, 20, 21, 23, 24, 26, 27, 29]
    assert frames.indices.tolist() == by_hand
    assert [read_number(picture) for picture in frames.pixels] == by_hand


def test_bytes_and_too_few_frames(tmp_path):
    path = make_clip(tmp_path / "one.mp4", frames=1)
    with open(path, "rb") as file:
        frames = read_video(Media("video", data=file.read()), SETTINGS)
    assert frames.indices.tolist() == [0, 0]  # one temporal patch: the only picture twice
    np.testing.assert_array_equal(frames.pixels[0], frames.pixels[1])
    three = read_video(Media("video", path=make_clip(tmp_path / "three.mp4", frames=3)), SETTINGS)
    assert three.indices.tolist() == [0, 2]


def test_one_pixel(tmp_path):
    path = make_clip(tmp_path / "1x1.mkv", height=1, width=1, codec="ffv1", pix_fmt="bgr0", frames=6)
    frames = read_video(Media("video", path=path), SETTINGS)
    # 0.3 s at 7 fps would be 2 frames: min_frames makes 4. 12288 pixels from 1x1: sides of ceil(110.9 / 32) = 4.
    assert frames.pixels.shape == (4, 3, 128, 128)
    assert len(np.unique(frames.pixels[0].reshape(3, -1), axis=1).T) == 1  # a single colour


def test_stream_joined_in_its_middle(tmp_path):
    """A TS file cut at a packet boundary begins inside a group: the pictures before the first key never come."""
    whole = Path(make_clip(tmp_path / "whole.ts")).read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(whole[188 * 60 :])
    frames = read_video(Media("video", path=str(path)), SETTINGS)
    numbers = [read_number(picture) for picture in frames.pixels]
    first = numbers[0]
    assert first > 0
    assert numbers == [first + index for index in frames.indices]  # consecutive from the first picture that is shown
    assert numbers[-1] == 39


def bad_files(folder) -> dict[str, tuple[str, str]]:
    """name -> (path, part of the expected reason)."""
    good = make_clip(folder / "good.mp4", container_options={"movflags": "faststart"})
    data = Path(good).read_bytes()
    tail_index = Path(make_clip(folder / "tail.mp4")).read_bytes()
    matroska = Path(make_clip(folder / "good.mkv")).read_bytes()
    huge = bytearray(matroska)
    place = huge.index(b"\x44\x89\x88") + 3  # Duration, 8 bytes, milliseconds
    huge[place : place + 8] = np.array(1e12, ">f8").tobytes()
    flipped = bytearray(data)
    chance, start = random.Random(4), data.index(b"mdat") + 8
    for _ in range(60):
        flipped[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
    contents = {
        "zero.mp4": (b"", "is empty"),
        "garbage.mp4": (random.Random(0).randbytes(5000), "cannot be opened"),
        "no_moov.mp4": (tail_index[: tail_index.index(b"moov") - 4], "cannot be opened"),
        "truncated.mp4": (data[: len(data) * 6 // 10], "is truncated: 40 frames listed"),
        "truncated.mkv": (matroska[: len(matroska) * 6 // 10], "is truncated"),
        "huge_duration.mkv": (bytes(huge), "1000000000.0 s announced"),
        "bit_flips.mp4": (bytes(flipped), "damaged|cannot be decoded"),
        "text.txt": (b"Only words here.\n" * 50, "not a video|no video|cannot be opened"),
    }
    files = {}
    for name, (content, reason) in contents.items():
        (folder / name).write_bytes(content)
        files[name] = (str(folder / name), reason)
    files["sound.mp4"] = (make_sound(folder / "sound.mp4"), "no video stream")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    files["loop.mp4"] = (str(folder / "loop.mp4"), "cannot be reached")
    files["folder"] = (str(folder), "not a regular file")
    files["missing.mp4"] = (str(folder / "missing.mp4"), "does not exist")
    os.mkfifo(folder / "pipe.mp4")
    files["pipe.mp4"] = (str(folder / "pipe.mp4"), "not a regular file")
    return files


def test_bad_files_end_in_one_clear_line(tmp_path):
    for name, (path, reason) in bad_files(tmp_path).items():
        with pytest.raises(MediaError, match=reason) as caught:
            read_video(Media("video", path=path), SETTINGS)
        line = str(caught.value)
        assert path in line and "\n" not in line and caught.value.remedy, name


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = make_clip(tmp_path / "secret.mp4")
    os.chmod(path, 0)
    with pytest.raises(MediaError, match="permission denied"):
        read_video(Media("video", path=path), SETTINGS)


def test_huge_duration_in_an_mp4_header_changes_nothing(tmp_path):
    """MP4 frame times come from the sample table; the movie header may say what it likes."""
    path = make_clip(tmp_path / "a.mp4")
    data = bytearray(Path(path).read_bytes())
    place = data.index(b"mvhd") + 4 + 4 + 8 + 4  # version and flags, two dates, time scale
    data[place : place + 4] = b"\x7f\xff\xff\xff"
    Path(path).write_bytes(data)
    frames = read_video(Media("video", path=path), SETTINGS)
    assert (frames.total_frames, frames.duration_s) == (40, 2.0)


def test_any_truncation_or_flip_ends_in_frames_or_a_media_error(tmp_path):
    """Nothing else escapes: no other exception, no wrong frame accepted as right after a cut."""
    data = Path(make_clip(tmp_path / "a.mp4", container_options={"movflags": "faststart"})).read_bytes()
    chance = random.Random(1)
    path = tmp_path / "b.mp4"
    outcomes = []
    for trial in range(60):
        damaged = bytearray(data)
        if trial % 2:
            del damaged[chance.randrange(40, len(data)) :]
        else:
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            frames = read_video(Media("video", path=str(path)), SETTINGS)
        except MediaError:
            outcomes.append("error")
            continue
        outcomes.append("frames")
        assert trial % 2 == 0  # a cut file is never accepted
        assert len(frames.pixels) == len(frames.indices)
    assert set(outcomes) == {"error", "frames"}


@pytest.mark.slow
def test_8k(tmp_path):
    """7680x4320: the right frames, in memory that one picture explains (RGB float32 of it is 398 MB).

    Size by hand: sqrt(7680 * 4320 / 262144) = 11.25; 4320 / 11.25 = 384, 7680 / 11.25 = 682.7, down to 672.
    """
    path = make_clip(tmp_path / "8k.mp4", frames=4, height=4320, width=7680, options={"preset": "ultrafast", "bf": "0"})
    code = (
        "import re; from data.records import Media; from data.video import VideoSettings, read_video;"
        "from tests.data.clips import read_number; import torch;"
        "memory = lambda name: int(re.search(name + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024;"
        "before = memory('VmRSS');"
        f"frames = read_video(Media('video', path={path!r}), VideoSettings(fps=20));"
        "print(frames.pixels.shape, [read_number(p) for p in frames.pixels], memory('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.startswith("(4, 3, 384, 672) [0, 1, 2, 3] "), done.stdout + done.stderr
    assert 400 < int(done.stdout.split()[-1]) < 1500, done.stdout  # MB
