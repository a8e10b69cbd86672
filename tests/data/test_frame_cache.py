"""The frame cache: what is written is what is read; changed, cut or flipped files are never used."""

import json
import os
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.frame_cache import CacheMiss, FrameCache, cache_files, source_identity, stale_temporaries
from data.records import Media
from data.video import MediaError, VideoSettings, read_video
from tests.data.clips import make_clip

SETTINGS = VideoSettings(fps=4, min_pixels=4096, max_pixels=9216)


@pytest.fixture
def clip(tmp_path):
    return Media("video", path=make_clip(tmp_path / "a.mp4", frames=80, height=90, width=122))


@pytest.fixture
def cache_dir(tmp_path):
    (tmp_path / "cache").mkdir()
    return str(tmp_path / "cache")


def equal(a, b):
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.timestamps_s, b.timestamps_s)
    assert (a.source_fps, a.duration_s, a.total_frames) == (b.source_fps, b.duration_s, b.total_frames)


def test_cached_equals_decoded_and_is_mapped(clip, cache_dir):
    fresh = read_video(clip, SETTINGS)
    equal(FrameCache(cache_dir, "prefer").frames(clip, SETTINGS), fresh)
    cached = FrameCache(cache_dir, "require").frames(clip, SETTINGS)
    equal(cached, fresh)
    assert isinstance(cached.pixels, np.memmap) and not cached.pixels.flags.writeable
    equal(FrameCache(None, "off").frames(clip, SETTINGS), fresh)


def test_format_can_be_read_without_this_program(clip, cache_dir):
    """docs/data.md: 24 bytes, JSON, zeros to a multiple of 4096, uint8 T C H W."""
    frames = FrameCache(cache_dir, "prefer").frames(clip, SETTINGS)
    (path,) = cache_files(cache_dir)
    data = Path(path).read_bytes()
    magic, offset, length = struct.unpack("<8sII", data[:16])
    header = json.loads(data[24 : 24 + length])
    assert magic == b"REELFRM1" and offset % 4096 == 0 and not any(data[24 + length : offset])
    assert header["version"] == 1 and header["lossy"] is False
    pixels = np.frombuffer(data, np.uint8, offset=offset).reshape(header["shape"])
    np.testing.assert_array_equal(pixels, frames.pixels)
    assert header["indices"] == frames.indices.tolist()
    assert header["source"]["size"] == os.path.getsize(clip.path)
    identity = header["source"]["id"]
    assert Path(path).parent == Path(cache_dir, identity[:2], identity)


@pytest.mark.parametrize("place", [3, 9, 40, 4096, -1])
def test_one_flipped_byte_is_never_used(clip, cache_dir, place):
    fresh = FrameCache(cache_dir).frames(clip, SETTINGS)
    (path,) = cache_files(cache_dir)
    data = bytearray(Path(path).read_bytes())
    data[place] ^= 4
    Path(path).write_bytes(data)
    for strict in (FrameCache(cache_dir, "require"), FrameCache(cache_dir, on_damaged="refuse")):
        with pytest.raises(MediaError, match="frames"):
            strict.frames(clip, SETTINGS)
    with pytest.warns(UserWarning, match="again"):
        equal(FrameCache(cache_dir).frames(clip, SETTINGS), fresh)
    equal(FrameCache(cache_dir, "require").frames(clip, SETTINGS), fresh)  # made again


def test_a_cut_file_is_never_used(clip, cache_dir):
    fresh = FrameCache(cache_dir).frames(clip, SETTINGS)
    (path,) = cache_files(cache_dir)
    data = Path(path).read_bytes()
    for length in (0, 10, 100, 5000, len(data) - 1):
        Path(path).write_bytes(data[:length])
        with pytest.raises(MediaError):
            FrameCache(cache_dir, "require").frames(clip, SETTINGS)
    with pytest.warns(UserWarning):
        equal(FrameCache(cache_dir).frames(clip, SETTINGS), fresh)


def test_identity_follows_content_not_the_name(tmp_path, clip):
    copy = Media("video", path=str(tmp_path / "copy.mp4"))
    Path(copy.path).write_bytes(Path(clip.path).read_bytes())
    assert source_identity(clip, full=True) == source_identity(copy, full=True)
    before = source_identity(clip), source_identity(clip, full=True)
    os.utime(clip.path, ns=(1, 1))
    assert source_identity(clip) != before[0] and source_identity(clip, full=True) == before[1]
    assert source_identity(Media("video", data=b"ab")) != source_identity(Media("video", data=b"ba"))


def test_a_replaced_video_under_the_same_name_is_decoded_again(tmp_path, clip, cache_dir):
    cache = FrameCache(cache_dir)
    cache.frames(clip, SETTINGS)
    make_clip(clip.path, frames=30, height=90, width=122)
    equal(cache.frames(clip, SETTINGS), read_video(clip, SETTINGS))
    with pytest.raises(CacheMiss):
        FrameCache(cache_dir, "require").frames(clip, replace(SETTINGS, fps=1))


def test_same_relative_path_under_two_roots_does_not_collide(tmp_path, cache_dir):
    cache = FrameCache(cache_dir)
    for root, frames in (("x", 20), ("y", 60)):
        (tmp_path / root).mkdir()
        media = Media("video", path=make_clip(tmp_path / root / "a.mp4", frames=frames))
        cache.frames(media, SETTINGS)
        equal(FrameCache(cache_dir, "require").frames(media, SETTINGS), read_video(media, SETTINGS))


def test_every_setting_and_window_has_its_own_key(clip, cache_dir):
    cache = FrameCache(cache_dir)
    changes = {
        "fps": 3, "min_frames": 6, "max_frames": 10, "min_pixels": 4097, "max_pixels": 9217, "total_pixels": 10**6,
        "factor": 28, "temporal_patch": 1, "resize": "native", "backend": "decord", "sampling": "grid",
    }  # fmt: skip
    keys = {cache.key(clip, SETTINGS)} | {cache.key(clip, replace(SETTINGS, **{k: v})) for k, v in changes.items()}
    keys |= {cache.key(replace(clip, start_s=1.0), SETTINGS), cache.key(replace(clip, end_s=1.0), SETTINGS)}
    assert len(keys) == len(changes) + 3
    assert cache.key(clip, SETTINGS) == FrameCache(cache_dir, "require").key(clip, SETTINGS)


def test_finer_serves_coarser_where_exact(clip, cache_dir):
    """80 frames at 20 fps: 4 per second on the grid holds 2 per second and windows, with the very same pixels."""
    grid = replace(SETTINGS, sampling="grid")
    FrameCache(cache_dir).frames(clip, grid)
    require = FrameCache(cache_dir, "require")
    window = replace(clip, start_s=1.0, end_s=3.0)
    for media, settings in ((clip, replace(grid, fps=2)), (clip, replace(grid, max_frames=8)), (window, grid)):
        equal(require.frames(media, settings), read_video(media, settings))
    # Not exact: other times, other size, other resize.
    for settings in (replace(grid, fps=3), replace(grid, max_pixels=65536), replace(grid, resize="native"), SETTINGS):
        with pytest.raises(CacheMiss):
            require.frames(clip, settings)
    assert len(cache_files(cache_dir)) == 1


def test_variable_rate_windows_come_from_the_cache_too(tmp_path, cache_dir):
    from fractions import Fraction

    times = [40 * i + 300 * (i // 10) for i in range(40)]
    media = Media("video", path=make_clip(tmp_path / "v.mp4", times=times, time_base=Fraction(1, 1000)))
    settings = VideoSettings(fps=30, min_pixels=4096, max_pixels=12288)  # every frame
    FrameCache(cache_dir).frames(media, settings)
    window = replace(media, start_s=0.4, end_s=1.5)
    coarse = replace(settings, fps=4)
    for item in (window, media):
        equal(FrameCache(cache_dir, "require").frames(item, coarse), read_video(item, coarse))


def test_require_fails_at_start_with_a_list(tmp_path, clip, cache_dir):
    cache = FrameCache(cache_dir)
    cache.frames(clip, SETTINGS)
    others = [Media("video", path=make_clip(tmp_path / f"{i}.mp4", frames=4 + i)) for i in range(2)]
    require = FrameCache(cache_dir, "require")
    assert require.check([clip, Media("image", path="x.png")], SETTINGS) == []
    with pytest.raises(CacheMiss) as caught:
        require.check([clip, *others], SETTINGS)
    assert all(media.path in str(caught.value) for media in others) and clip.path not in str(caught.value)
    assert cache.check([clip, *others], SETTINGS) == [media.path for media in others]


def test_mistyped_directory_and_mode(tmp_path):
    with pytest.raises(ValueError, match=r"--cache_dir .*nowhere does not exist"):
        FrameCache(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--cache must be one of"):
        FrameCache(str(tmp_path), "always")
    with pytest.raises(ValueError, match="needs --cache_dir"):
        FrameCache(None, "require")


def test_lossy_tier_is_marked_and_kept_apart(clip, cache_dir):
    raw = FrameCache(cache_dir).frames(clip, SETTINGS)
    lossy = FrameCache(cache_dir, storage="jpeg")
    first, again = lossy.frames(clip, SETTINGS), lossy.frames(clip, SETTINGS)
    equal(first, again)
    difference = np.abs(first.pixels.astype(int) - raw.pixels)
    assert 0 < difference.mean() < 3
    assert lossy.key(clip, SETTINGS) != FrameCache(cache_dir).key(clip, SETTINGS)
    equal(FrameCache(cache_dir, "require").frames(clip, SETTINGS), raw)


def test_lists_of_frames_and_bytes_are_cached(tmp_path, clip, cache_dir):
    from PIL import Image

    paths = []
    for number in range(6):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (122, 90), (number * 40, 0, 0)).save(paths[-1])
    for media in (Media("video", frames=tuple(paths), fps=2.0), Media("video", data=Path(clip.path).read_bytes())):
        FrameCache(cache_dir).frames(media, SETTINGS)
        equal(FrameCache(cache_dir, "require").frames(media, SETTINGS), read_video(media, SETTINGS))


def test_a_full_disk_does_not_stop_training(clip, cache_dir, monkeypatch):
    monkeypatch.setattr("data.frame_file.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.warns(UserWarning, match="No space left"):
        frames = FrameCache(cache_dir).frames(clip, SETTINGS)
    monkeypatch.undo()
    equal(frames, read_video(clip, SETTINGS))
    assert cache_files(cache_dir) == [] and not list(Path(cache_dir).rglob("*.tmp-*"))


def test_stale_temporaries_are_those_of_dead_processes(cache_dir):
    import socket

    folder = Path(cache_dir, "ab", "ab" * 16)
    folder.mkdir(parents=True)
    host = socket.gethostname()
    dead = folder / f"x.frames.tmp-{host}-4194305"  # above the largest pid Linux gives
    for path in (dead, folder / f"x.frames.tmp-{host}-{os.getpid()}", folder / "x.frames.tmp-elsewhere-7"):
        path.write_bytes(b"")
    assert stale_temporaries(cache_dir) == [str(dead)]
    assert len(stale_temporaries(cache_dir, all_hosts=True)) == 2
    child = subprocess.Popen(["true"])  # ends, and is a zombie until someone waits for it
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = folder / f"x.frames.tmp-{host}-{child.pid}"
    zombie.write_bytes(b"")
    assert set(stale_temporaries(cache_dir)) == {str(dead), str(zombie)}
    child.wait()
