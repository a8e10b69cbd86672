"""Bytes in columns of data files: noted, not held; read back by row, in any order, by several threads; memory."""

import base64
import io
import json
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data import preprocess, stored
from data.dataset import load
from data.frame_cache import FrameCache, cache_files, source_identity
from data.records import Media, StoredBytes
from data.video import MediaError, VideoSettings, image_pixels, media_source, read_video
from tests.data.clips import make_clip

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[2]
ROW = {"problem": "How many?", "answer": "2", "problem_type": "numerical"}


def noise(n: int, size: int, seed: int = 0) -> list[bytes]:
    return [bytes(item) for item in np.random.default_rng(seed).integers(0, 256, (n, size), dtype=np.uint8)]


def png(seed: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "store",
    [
        lambda a, b: {"images": [a, b]},
        lambda a, b: {"images": [{"bytes": a, "path": "x.png"}, {"bytes": b, "path": None}]},
        lambda a, b: {
            "images": [base64.b64encode(a).decode(), "data:image/png;base64," + base64.b64encode(b).decode()]
        },
        lambda a, b: {"images": [{"image": {"bytes": a}}, {"image": {"bytes": b}}]},
        lambda a, b: {"image": {"bytes": a}, "video": b},
    ],
    ids=["raw", "struct", "base64", "nested", "two columns"],
)
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_every_way_of_storing_is_read_back(tmp_path, store, kind):
    """47 rows of two items in row groups of 10: forwards, backwards, at random, by three threads at once."""
    contents = noise(94, 3000)
    rows = [{**ROW, "problem_id": i, **store(*contents[2 * i : 2 * i + 2])} for i in range(47)]
    file = str(tmp_path / ("d.parquet" if kind == "parquet" else "saved"))
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=10)
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(file)
    samples = load([file])
    assert all(isinstance(media.data, StoredBytes) for sample in samples for media in sample.media)
    wanted = [(sample.media[item], contents[2 * i + item]) for i, sample in enumerate(samples) for item in (0, 1)]
    shuffled = [wanted[place] for place in np.random.default_rng(1).permutation(94)]
    for order in (wanted, wanted[::-1], shuffled):
        assert all(media_source(media) == content for media, content in order)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(media_source, [media for media, _ in shuffled])) == [content for _, content in shuffled]
    assert max(len(pickle.dumps(media)) for media, _ in wanted) < 600  # what a worker or a rank is sent


def test_equal_content_is_one_medium_whatever_holds_it(tmp_path):
    one, two = noise(2, 5000)
    rows = [{**ROW, "images": [one]}, {**ROW, "images": [two]}, {**ROW, "images": [one]}, {**ROW, "images": [b"small"]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    first, second, third, small = (sample.media[0] for sample in load([str(tmp_path / "d.parquet")]))
    assert first == third and hash(first) == hash(third) and first != second
    assert source_identity(first) == source_identity(Media("image", data=one)) and len(first.data) == 5000
    assert small == Media("image", data=b"small")


def test_a_file_that_changed_is_an_error_not_another_picture(tmp_path):
    file = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "images": [data]} for data in noise(4, 2000)]), file)
    media = [sample.media[0] for sample in load([str(file)])]
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "images": [data]} for data in noise(3, 2000, seed=1)]), file)
    with pytest.raises(MediaError, match=r"<2000 bytes>: is not what .*d\.parquet held in row 3"):
        media_source(media[2])
    with pytest.raises(MediaError, match=r"cannot be read from .*d\.parquet, row 4"):
        media_source(media[3])
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "image": "gone.png"}]), file)
    with pytest.raises(MediaError, match=r"cannot be read from .*d\.parquet, row 1"):
        media_source(media[0])
    file.unlink()
    with pytest.raises(MediaError, match="No such file"):
        media_source(media[0])


def test_a_row_far_into_a_large_group_is_worth_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SLOW_BYTES", 40_000)
    file = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "images": [data]} for data in noise(30, 3000)]), file)
    media = [sample.media[0] for sample in load([str(file)])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for item in media:  # in order: read on from where the last one was
            media_source(item)
    with pytest.warns(UserWarning, match=r"d\.parquet: row group 0 .* row_group_size=100"):
        load([str(file)])
        media_source(
            Media("image", data=StoredBytes(media[25].data.digest, 3000, f"{tmp_path}/./d.parquet", 25, ("images", 0)))
        )


def test_preprocessing_reads_them_in_its_workers(tmp_path, capsys):
    """Images and a clip in a Parquet file: opened and decoded as from files; the damaged one is named by its row."""
    clip = Path(make_clip(tmp_path / "c.mp4", frames=20, height=90, width=122))
    pictures = [png(0), png(1), png(0)]
    torn = png(2)[:3000]
    rows = [{"problem_id": i, "images": [{"bytes": data}], "videos": None} for i, data in enumerate([*pictures, torn])]
    rows.insert(0, {"problem_id": 4, "images": None, "videos": [{"bytes": clip.read_bytes()}]})
    file, cache_dir = str(tmp_path / "d.parquet"), str(tmp_path / "cache")
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    flags = ["--video_max_pixels", "9216", "--fps", "4", "--max_frames", "32", "--workers", "2"]
    assert preprocess.main(["--data", file, "--cache_dir", cache_dir, *flags]) == 1
    assert "5 rows (image 4, video 1), 4 media: 1 videos decoded" in capsys.readouterr().out
    (failed,) = [json.loads(line) for line in Path(cache_dir, "failed.jsonl").read_text().splitlines()]
    assert (failed["line"], failed["id"]) == (5, "3") and "damaged image" in failed["reason"]
    settings = VideoSettings(fps=4, max_frames=32, max_pixels=9216)
    jobs = list(preprocess.collect([file], None, (0, 1), None)[0])
    assert len(cache_files(cache_dir)) == 1 and [media.kind for media in jobs] == ["video"] + ["image"] * 3
    cached = FrameCache(cache_dir, "require").frames(jobs[0], settings)
    np.testing.assert_array_equal(cached.pixels, read_video(Media("video", path=str(clip)), settings).pixels)
    np.testing.assert_array_equal(image_pixels(jobs[2]), image_pixels(Media("image", data=pictures[1])))
    assert FrameCache(cache_dir).known_failure(jobs[3]) is not None


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import pyarrow.parquet
from data.dataset import load
from data.video import media_source

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

load([sys.argv[2]])  # a small one: what reading takes in code
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
samples = load([sys.argv[3]])
print(kilobytes("VmHWM") - before, kilobytes("VmRSS") - before)
for sample in samples[::-7]:
    media_source(sample.media[0])
print(kilobytes("VmHWM") - before, sum(len(sample.media[0].data) for sample in samples))
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """64 MB of images and 192 MB, in row groups of 8 MB (holding them took 2.4 times the file): the same few megabytes."""
    table = {name: [value] * 1000 for name, value in ROW.items()}
    peaks = []
    for name, times in (("small", 0), ("once", 1), ("thrice", 3)):
        with parquet.ParquetWriter(tmp_path / f"{name}.parquet", SCHEMA) as out:
            for turn in range(times or 1):
                images = [[data] for data in noise(1000 if times else 8, 64_000, seed=turn)]
                rows = pyarrow.table({**{k: v[: len(images)] for k, v in table.items()}, "images": images}, SCHEMA)
                out.write_table(rows, row_group_size=125)
    for name in ("once", "thrice"):
        files = [str(tmp_path / f"{which}.parquet") for which in ("small", name)]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(ROOT), *files], capture_output=True, text=True, check=True
        )
        (loading, held), (reading, noted) = (map(int, line.split()) for line in done.stdout.splitlines())
        assert noted == 64_000_000 * (1 if name == "once" else 3)
        assert held < 20_000, done.stdout  # kB
        peaks.append(max(loading, reading))
    assert max(peaks) < 64_000, peaks
    assert peaks[1] < peaks[0] + 15_000, peaks


SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ROW] + [("images", pyarrow.list_(pyarrow.binary()))])


def test_a_saved_folder_written_again_is_an_error_and_no_crash(tmp_path):
    """The old part is still mapped when its file is cut and written anew: touching the map would end the process."""

    def save(contents: list[bytes]) -> None:
        table = pyarrow.table({"problem": ["How many?"] * len(contents), "image": contents})
        with (
            pyarrow.OSFile(str(tmp_path / "d.arrow"), "wb") as out,
            pyarrow.ipc.new_stream(out, table.schema) as writer,
        ):
            writer.write_table(table, 5)

    contents = noise(20, 5000)
    save(contents)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "d.arrow"}]}))
    places = [stored.keep_place(content, str(tmp_path), row, ("image",)) for row, content in enumerate(contents)]
    assert stored.read_stored(places[0]) == contents[0]
    save(contents[:2])
    assert stored.read_stored(places[1]) == contents[1]
    with pytest.raises(ValueError, match=r"row 4 .*2 rows"):
        stored.read_stored(places[3])


@pytest.mark.parametrize("value", [[1, 300], {"a": 1}, 10**13, True])
def test_bytes_that_are_none_are_one_bad_row(tmp_path, value):
    good = {**ROW, "image": {"bytes": base64.encodebytes(png(0)).decode()}}  # with line breaks
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, {**ROW, "image": {"bytes": value}})))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*bytes is (list|dict|int|bool)"):
        load([str(file)])
    (sample,) = load([str(file)], on_bad_sample="skip")
    assert sample.media[0].data == png(0)
